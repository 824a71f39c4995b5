"""Prediction, for the command line, the server and the pages.

In: a model folder, then images as files or bytes. Out: one :class:`Prediction` for each input, in order, errors included.
Imports neither torch nor timm as long as OpenVINO runs the network.

Predictions are computed in f32 from pixels resized by Pillow, so that the top class is the same as that of exports,
timm and transformers, and does not depend on the runtime or on other images in the batch
(docs/decisions/0042-f32-answers.md).
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from topwork.data import remote
from topwork.data.images import as_rgb, decode, encoded_image, select_bands
from topwork.data.loader import in_order
from topwork.data.transforms import Pixels, fit_to_input, smaller
from topwork.errors import ImageError, TopworkError
from topwork.evaluation.calibration import Thresholds, decide, unknown_detector
from topwork.evaluation.predictions import join_labels
from topwork.export.inputs import list_inputs, read_image
from topwork.export.runtime import Precision, Runtime, engine_of
from topwork.features.cluster import Cluster, chunks, packed, shared, unpacked
from topwork.features.engine import BATCH, with_resizer
from topwork.files import atomic_file, error_reason
from topwork.models.classifier import Classifier, load_classifier
from topwork.settings import HERE, ClusterSettings
from topwork.text import Described

PICTURE_SIDE = 640  # pixels, of the long side of a heatmap
DIGITS = 6  # probabilities are rounded here, once, so that all interfaces print the same

Image = str | os.PathLike[str] | bytes | NDArray[np.uint8] | Any  # a path, a file's content, pixels, a Pillow image


@dataclass(frozen=True)
class Prediction:
    """The prediction for one input.

    Attributes:
        path: as it was given.
        outcome: ``label``, ``ambiguous``, ``unknown`` or ``error``.
        label: most probable class, even if the outcome is ambiguous or unknown; None after an error. With several
            labels per image: those that reach their thresholds, joined by ``|``, or "".
        probability: of that class, calibrated; of several labels, the lowest; of none, of the most probable class.
        top: (class name, probability) pairs, most probable first.
        error: why there is no prediction.
    """

    path: str
    outcome: str
    label: str | None = None
    probability: float | None = None
    top: tuple[tuple[str, float], ...] = ()
    error: str | None = None


@dataclass(frozen=True, eq=False)
class Loaded:
    """One input after reading: ``pixels`` in the input size, or an error."""

    name: str
    pixels: Pixels | None = None
    error: str | None = None


class Predictor(Described):
    """A loaded model; thread-safe. Copies and pickles open the network again, from the model folder.

    Args:
        model: a run or model folder, or a loaded classifier.
        n_top: number of classes in each prediction.
        tta: test-time augmentation: average the probabilities of each image and its horizontal flip (2x slower). A
            model that was fitted with flips uses them anyway.
        runtime, precision: see :func:`topwork.export.runtime.engine_of`.
        cluster: machines that read and classify the images of :meth:`stream`.
    """

    def __init__(
        self,
        model: str | Path | Classifier,
        n_top: int = 5,
        *,
        tta: bool = False,
        runtime: Runtime = "auto",
        precision: Precision = "f32",
        cluster: ClusterSettings = HERE,
    ) -> None:
        is_opened = isinstance(model, Classifier) or remote.is_url(model)
        source = model if is_opened else Path(cast(Path, model)).absolute()  # a copy may have another working directory
        self._arguments: dict[str, Any] = {
            "model": source, "n_top": n_top, "tta": tta, "runtime": runtime, "precision": precision, "cluster": cluster
        }  # fmt: skip
        self._cluster = None if cluster.ray is None else Cluster(cluster)
        if cluster.num_gpus_per_worker and runtime == "auto":
            runtime = "torch"
        self.classifier = model if isinstance(model, Classifier) else load_classifier(model, multi_label=True)
        self.n_top = n_top
        self.tta = tta and self.classifier.backbone.spec.mirror == "none"
        self.engine = engine_of(self.classifier, runtime, precision)
        self.spec = with_resizer(self.classifier.backbone, self.engine).spec
        self._thresholds, self._detector = Thresholds.of(self.classifier), unknown_detector(self.classifier)
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), **self._arguments), ()

    def facts(self) -> dict[str, object]:
        """Shown in notebooks."""
        return self.classifier.facts() | {"Runtime": self.engine.kind}

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; the position is the label."""
        return self.classifier.classes

    def predict(self, images: Image | Iterable[Image]) -> list[Prediction]:
        """Predictions for one image or several: paths, contents of files, Pillow images, or uint8 (H, W, 3) arrays.

        A folder, an archive or a pattern such as ``new/*.jpg`` stands for the images in it, as for ``topwork predict``.

        Raises:
            InputError: not an image, such as an array of floats.
            UsageError: a folder without images.
        """
        return list(self.stream(_listed(images)))

    def stream(self, images: Sequence[Image], n_threads: int | None = None) -> Iterator[Prediction]:
        """Predictions one by one, in order, with bounded memory, however many images there are."""
        if self._cluster is not None:
            for part in self._cluster.map(self._in_worker(n_threads), chunks(images)):
                yield from part
            return
        batch: list[Loaded] = []
        urls = [image for image in images[:1000] if isinstance(image, str)]
        n_threads = remote.n_threads_for(Path(), urls, n_threads)
        for loaded in in_order(self._load_numbered, list(enumerate(images)), n_threads):
            batch.append(loaded)
            if len(batch) == BATCH:
                yield from self.answer_loaded(batch)
                batch = []
        yield from self.answer_loaded(batch)

    def _in_worker(self, n_threads: int | None) -> Callable[[], Callable[[Sequence[Image]], list[Prediction]]]:
        """Creates the same predictor in a worker."""
        assert self._cluster is not None
        n_threads = self._cluster.n_threads(n_threads)
        files = shared(packed(self.classifier.backbone.folder))
        n_top, tta, runtime, precision = self.n_top, self.tta, self.engine.kind, self.engine.precision

        def make() -> Callable[[Sequence[Image]], list[Prediction]]:
            import ray

            folder = unpacked(ray.get(files))
            predictor = Predictor(folder, n_top, tta=tta, runtime=cast(Any, runtime), precision=cast(Any, precision))
            return lambda images: list(predictor.stream(images, n_threads))

        return make

    def as_trained(self, data: bytes) -> bytes:
        """A file with the bands that the model was trained on; raises ImageError."""
        return select_bands(data, self.spec.bands) if self.spec.bands else data

    def load(self, image: Image, name: str) -> Loaded:
        """Reads, decodes and resizes one image; errors are in the value."""
        try:
            if isinstance(image, np.ndarray):
                return Loaded(name, fit_to_input(as_rgb(image), self.spec))
            data = read_image(image) if isinstance(image, (str, os.PathLike, bytes)) else encoded_image(image)
            pixels = decode(self.as_trained(data), min_side=self.spec.min_side).pixels
            return Loaded(name, fit_to_input(pixels, self.spec))
        except ImageError as error:
            return Loaded(name, error=str(error))
        except MemoryError:
            return Loaded(name, error="not enough memory to decode it")

    def answer_loaded(self, batch: Sequence[Loaded]) -> list[Prediction]:
        """Predictions for loaded images, in order, errors included."""
        good = [item.pixels for item in batch if item.pixels is not None]
        answers = iter(zip(*self.answer(np.stack(good)), strict=True)) if good else iter(())
        return [
            Prediction(item.name, "error", error=item.error)
            if item.pixels is None
            else self._prediction(item.name, *next(answers))
            for item in batch
        ]

    def answer(self, pixels: Pixels) -> tuple[NDArray[np.float64], NDArray[np.str_]]:
        """Probabilities (B, C) and outcomes (B,) for input-sized uint8 (B, H, W, 3)."""
        probabilities, scores = self._scored(pixels)
        return probabilities, decide(probabilities, scores, self._thresholds)

    def _scored(self, pixels: Pixels) -> tuple[NDArray[np.float64], NDArray[np.float32] | None]:
        """Probabilities and unknown scores, the mean over the views."""
        views = [pixels, np.ascontiguousarray(pixels[:, :, ::-1])] if self.tta else [pixels]
        with self._lock:
            features = [self.engine.run(view) for view in views]
        stated = self._thresholds.task.probabilities
        probabilities = np.mean([stated(self.classifier.head.logits(dict(f))) for f in features], axis=0)
        if self._detector is None:
            return probabilities, None
        return probabilities, np.mean([self._detector.score(f["last"]) for f in features], axis=0, dtype=np.float32)

    def _load_numbered(self, numbered: tuple[int, Image]) -> Loaded:
        number, image = numbered
        return self.load(image, str(image) if isinstance(image, (str, os.PathLike)) else f"#{number}")

    def _prediction(self, name: str, probabilities: NDArray[np.float64], outcome: str) -> Prediction:
        order = np.argsort(-probabilities, kind="stable")[: self.n_top]
        top = tuple((self.classes[i], round(float(probabilities[i]), DIGITS)) for i in order)
        if self.classifier.multi_label:
            given = self._thresholds.task.given(probabilities[None])[0]
            sureness = float(probabilities[given].min() if given.any() else probabilities.max())
            return Prediction(name, str(outcome), join_labels(self.classes, given), round(sureness, DIGITS), top)
        label = int(self._thresholds.task.given(probabilities[None])[0].argmax())
        return Prediction(name, str(outcome), self.classes[label], round(float(probabilities[label]), DIGITS), top)


def _listed(images: Any) -> list[Image]:
    """A lone image is a list of one; an array (N, H, W, 3) holds N; a folder holds its images."""
    if isinstance(images, (str, os.PathLike)) and os.fspath(images):
        return [*list_inputs([os.fspath(images)])]
    if isinstance(images, (str, bytes)) or hasattr(images, "getexif"):
        return [images]
    if isinstance(images, np.ndarray) and images.ndim < 4:
        return [images]
    found: list[Image] = []
    for image in images:
        name = os.fspath(image) if isinstance(image, (str, os.PathLike)) else ""
        found += list_inputs([name]) if name and not remote.is_url(name) and Path(name).is_dir() else [image]
    return found


class Heatmaps:
    """Heatmaps of one predictor; thread-safe."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self._network: Any = None
        self._lock = threading.Lock()

    def picture(self, data: bytes, label: str) -> Pixels:
        """uint8 (h, w, 3): the upright image, long side at most ``PICTURE_SIDE``, with a heatmap for a class."""
        from topwork.evaluation.explain import find_evidence, overlay
        from topwork.features.feature_maps import open_network

        classifier = self.predictor.classifier
        spec = self.predictor.spec
        pixels = decode(self.predictor.as_trained(data), min_side=max(spec.min_side, PICTURE_SIDE)).pixels
        with self._lock:
            if self._network is None:
                self._network = open_network(classifier.backbone)
            number = classifier.classes.index(label)
            found = find_evidence(
                classifier, fit_to_input(pixels, spec)[None], [[number]], self._network, self.predictor.engine
            )
        seen = found.maps[0, 0]
        return overlay(smaller(pixels, PICTURE_SIDE), seen, spec, max(float(seen.max()), 1e-9))

    def jpeg(self, data: bytes, label: str) -> bytes:
        """The picture as a JPEG file."""
        return bytes(simplejpeg.encode_jpeg(self.picture(data, label), quality=88))

    def write(self, folder: Path, number: int, prediction: Prediction) -> None:
        """Writes the heatmap of a prediction as ``NUMBER-NAME.jpg``; nothing for errors.

        Raises:
            TopworkError: the folder cannot be written.
        """
        if prediction.label is None:
            return
        name = re.sub(r"[^A-Za-z0-9._-]", "_", Path(prediction.path).stem)[:80]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            picture = self.jpeg(read_image(prediction.path), prediction.top[0][0])
            with atomic_file(folder / f"{number:06d}-{name}.jpg") as partial:
                partial.write_bytes(picture)
        except ImageError:
            return  # deleted in the meantime
        except OSError as error:
            raise TopworkError(f"{folder}: cannot be written: {error_reason(error)}.") from None
