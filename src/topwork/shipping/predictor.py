"""The one way to predict: used by the verb, the server and the pages.

In: a model folder, then images as files or bytes. Out: one :class:`Prediction` for each input, in order, errors included.
Imports neither torch nor timm as long as OpenVINO runs the network.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from topwork.data.images import decode
from topwork.data.loader import in_order
from topwork.data.sources import read_regular_file
from topwork.data.transforms import Pixels, fit_to_input
from topwork.errors import ImageError
from topwork.evaluation.decisions import Thresholds, decide
from topwork.evaluation.predictions import softmax
from topwork.evaluation.unknown import UnknownDetector
from topwork.features.engine import BATCH, Engine, OpenVINOEngine, TorchEngine
from topwork.models.classifier import COMPILED, Classifier, load_classifier

DIGITS = 6  # probabilities are rounded here, once, so that every way of asking gives the same text


@dataclass(frozen=True)
class Prediction:
    """The answer for one input.

    Attributes:
        path: as it was given.
        outcome: ``label``, ``ambiguous``, ``unknown`` or ``error``.
        label: most probable class, also when the outcome is ambiguous or unknown; None after an error.
        probability: of that class, calibrated.
        top: (class name, probability) pairs, most probable first.
        error: why there is no answer.
    """

    path: str
    outcome: str
    label: str | None = None
    probability: float | None = None
    top: tuple[tuple[str, float], ...] = ()
    error: str | None = None


class Predictor:
    """A loaded model. Safe to call from several threads.

    Args:
        model: a run or model folder, or a classifier already read.
        n_top: how many classes each prediction names.
    """

    def __init__(self, model: str | Path | Classifier, n_top: int = 5) -> None:
        self.classifier = model if isinstance(model, Classifier) else load_classifier(model)
        self.n_top = n_top
        self.engine = engine_of(self.classifier)
        self._thresholds, self._detector = _decision_rule(self.classifier)
        self._lock = threading.Lock()

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; the position is the label."""
        return self.classifier.classes

    def predict(self, images: Iterable[str | Path | bytes]) -> list[Prediction]:
        """Predictions for files (paths) or file contents (bytes)."""
        return list(self.stream(list(images)))

    def stream(self, images: Sequence[str | Path | bytes], n_threads: int | None = None) -> Iterator[Prediction]:
        """Predictions one by one, in order, with bounded memory, however many images there are."""
        names: list[str] = []
        slots: list[Pixels | str] = []
        for name, loaded in in_order(self._load, list(enumerate(images)), n_threads):
            names.append(name)
            slots.append(loaded)
            if len(slots) == BATCH:
                yield from self._answer(names, slots)
                names, slots = [], []
        yield from self._answer(names, slots)

    def answer(self, pixels: Pixels) -> tuple[NDArray[np.float64], NDArray[np.str_]]:
        """Probabilities (B, C) and outcomes (B,) for input-sized uint8 (B, H, W, 3)."""
        with self._lock:
            features = self.engine.run(pixels)
        probabilities = softmax(self.classifier.head.logits(dict(features)))
        scores = self._detector.score(features["last"]) if self._detector else None
        return probabilities, decide(probabilities, scores, self._thresholds)

    def _load(self, numbered: tuple[int, str | Path | bytes]) -> tuple[str, Pixels | str]:
        number, image = numbered
        name = f"#{number}" if isinstance(image, bytes) else str(image)
        spec = self.classifier.backbone.spec
        try:
            data = image if isinstance(image, bytes) else read_regular_file(Path(image))
            return name, fit_to_input(decode(data, min_side=spec.min_side).pixels, spec)
        except ImageError as error:
            return name, str(error)
        except MemoryError:
            return name, "not enough memory to decode it"

    def _answer(self, names: list[str], slots: list[Pixels | str]) -> Iterator[Prediction]:
        good = [slot for slot in slots if not isinstance(slot, str)]
        answers = iter(zip(*self.answer(np.stack(good)), strict=True)) if good else iter(())
        for name, slot in zip(names, slots, strict=True):
            if isinstance(slot, str):
                yield Prediction(name, "error", error=slot)
            else:
                yield self._prediction(name, *next(answers))

    def _prediction(self, name: str, probabilities: NDArray[np.float64], outcome: str) -> Prediction:
        order = np.argsort(-probabilities, kind="stable")[: self.n_top]
        top = tuple((self.classes[i], round(float(probabilities[i]), DIGITS)) for i in order)
        return Prediction(name, str(outcome), top[0][0], top[0][1], top)


def _decision_rule(classifier: Classifier) -> tuple[Thresholds, UnknownDetector | None]:
    """What the model folder says about when an answer is a label."""
    stored, centres = classifier.thresholds, classifier.arrays.get("unknown_centres")
    thresholds = Thresholds(**{key: stored.get(key) for key in ("unknown", "confidence", "set_probability")})
    if centres is None or thresholds.unknown is None:
        return thresholds, None
    return thresholds, UnknownDetector(centres, thresholds.unknown, float(stored["unknown_false_alarm_rate"]), 0)


def engine_of(classifier: Classifier) -> Engine:
    """What runs the network of a saved model: its compiled form where OpenVINO is, else torch."""
    compiled = classifier.backbone.folder / COMPILED[0]
    if compiled.is_file():
        try:
            return OpenVINOEngine(compiled, classifier.precision)
        except ImportError:
            pass  # OpenVINO is not installed here: torch gives the same answers, later
    return TorchEngine(classifier.backbone, "f32")
