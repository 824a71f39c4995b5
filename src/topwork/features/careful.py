"""The second look: what a quick answer that is not sure is computed again with.

In: pixels of a whole image. Out: features as exact as this machine gives them: resized with Pillow's arithmetic, run
through the network in f32, not rounded. The quick way (``engine.py``, often bf16) is several times faster, and moves a
probability near one half by up to 0.05: enough to turn over one answer in a hundred against the same weights run
elsewhere. So whoever answers for images takes a second look wherever the best class has less than ``LEAST_SURE``
(docs/decisions/0020-second-look.md). Exports, timm and transformers then give the same best class.

Needs neither torch nor timm where there is a compiled form of the network.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topwork.data.images import DECODER_VERSION, decode
from topwork.data.loader import in_order
from topwork.data.transforms import InputSpec, Pixels
from topwork.errors import ImageError, ModelError
from topwork.features.engine import compiled_path, openvino_core
from topwork.features.store import BLOCKS, FeatureStore
from topwork.models.backbone import Backbone
from topwork.models.classifier import COMPILED, Classifier

LEAST_SURE = 0.97
CLOSE_TO_A_THRESHOLD = 0.1  # of several labels: quick arithmetic moves a probability by up to 0.06
FORMAT = 1  # bump when a careful feature changes meaning
_ROWS_PER_SHARD = 512

Blocks = dict[str, NDArray[np.float32]]


def careful_pixels(data: bytes, spec: InputSpec) -> Pixels:
    """The input for the bytes of an image file.

    Photographs that are shrunk while decoding keep at least eight times the input's side, so that the result is that
    of full size within a level, at bounded cost.

    Raises:
        ImageError: see :func:`topwork.data.images.decode`.
    """
    return fit_with_pillow(decode(data, min_side=4 * spec.min_side).pixels, spec)


def fit_with_pillow(pixels: Pixels, spec: InputSpec) -> Pixels:
    """The (height, width, 3) input for decoded pixels, resized as the stand-alone ``predict.py`` resizes."""
    from PIL import Image

    image, filters = (
        Image.fromarray(pixels),
        {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC},
    )
    chosen, size = filters[spec.interpolation], (spec.width, spec.height)
    if spec.fit == "squash":
        return np.asarray(image.resize(size, chosen))
    if spec.fit == "crop":
        scale = min(image.width / spec.width, image.height / spec.height) * spec.crop_fraction
        width, height = min(image.width, spec.width * scale), min(image.height, spec.height * scale)
        left, top = (image.width - width) / 2, (image.height - height) / 2
        return np.asarray(image.resize(size, chosen, box=(left, top, left + width, top + height)))
    scale = min(spec.width / image.width, spec.height / image.height)
    width = min(spec.width, max(1, round(image.width * scale)))
    height = min(spec.height, max(1, round(image.height * scale)))
    canvas = Image.new("RGB", size, tuple(spec.background))
    canvas.paste(image.resize((width, height), chosen), ((spec.width - width) // 2, (spec.height - height) // 2))
    return np.asarray(canvas)


def unsure_rows(classifier: Classifier, probabilities: NDArray[np.float64]) -> NDArray[np.bool_]:
    """(N,) which of the quick (N, C) probabilities another runtime's arithmetic might turn over."""
    if classifier.multi_label:
        away = np.abs(probabilities - np.asarray(classifier.thresholds["labels"]))
        return np.asarray((away < CLOSE_TO_A_THRESHOLD).any(axis=1))
    return np.asarray(probabilities.max(axis=1) < LEAST_SURE)


class CarefulNetwork:
    """The network in f32, one image at a time, so that an answer never depends on its neighbours. Safe to share."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self._lock = threading.Lock()
        self._run: Callable[[Pixels], list[NDArray[np.float32]]] | None = None

    def run(self, images: Pixels) -> Blocks:
        """float32 ``last`` and ``stages`` of uint8 (B, H, W, 3)."""
        with self._lock:
            if self._run is None:
                self._run = _compiled(self.backbone) or _traced(self.backbone)
            rows = [self._run(images[row : row + 1]) for row in range(len(images))]
        return {name: np.concatenate([row[number] for row in rows]) for number, name in enumerate(BLOCKS)}

    @property
    def fingerprint(self) -> str:
        """Names everything a careful feature depends on, apart from the image."""
        facts = ("careful", FORMAT, DECODER_VERSION, self.backbone.weights_digest, self.backbone.spec.as_dict())
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def careful_features(
    network: CarefulNetwork, cache: Path, hashes: Sequence[str], read: Callable[[int], bytes]
) -> Blocks | None:
    """Careful features of some images, kept in the feature store by content.

    Args:
        hashes: content hash of each image.
        read: gives the bytes of the image at a position in ``hashes``.

    Returns:
        None where an image cannot be read any more.
    """
    store = FeatureStore(cache, network.fingerprint)
    new = {key: row for row, key in enumerate(hashes) if key not in store}
    keys = list(new)

    def pixels_of(key: str) -> Pixels:
        return careful_pixels(read(new[key]), network.backbone.spec)

    try:
        for start in range(0, len(keys), _ROWS_PER_SHARD):
            some = keys[start : start + _ROWS_PER_SHARD]
            blocks = [network.run(pixels[None]) for pixels in in_order(pixels_of, some)]
            store.append(some, {name: np.concatenate([b[name] for b in blocks]) for name in BLOCKS})
    except ImageError:
        return None
    return {name: store.load(hashes, name).astype(np.float32, copy=False) for name in BLOCKS}


def _compiled(backbone: Backbone) -> Callable[[Pixels], list[NDArray[np.float32]]] | None:
    """OpenVINO's form in f32 for one image, if there is one."""
    xml = next((p for p in (backbone.folder / COMPILED[0], compiled_path(backbone)) if p.is_file()), None)
    if xml is None:
        return None
    try:
        core = openvino_core()
    except ImportError:
        return None
    try:
        model = core.read_model(xml)
        model.reshape([1, *model.input(0).shape[1:]])
        compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    except RuntimeError as error:
        raise ModelError(f"{xml}: cannot be compiled: {str(error).splitlines()[0]}") from None

    def run(image: Pixels) -> list[NDArray[np.float32]]:
        outputs = compiled.create_infer_request().infer({0: np.ascontiguousarray(image)})
        return [np.array(outputs[number]) for number in range(len(BLOCKS))]

    return run


def _traced(backbone: Backbone) -> Callable[[Pixels], list[NDArray[np.float32]]]:
    import torch

    from topwork.features.engine import feature_network

    network: Any = feature_network(backbone)

    def run(image: Pixels) -> list[NDArray[np.float32]]:
        with torch.inference_mode():
            return [value.numpy() for value in network(torch.from_numpy(np.array(image)))]

    return run
