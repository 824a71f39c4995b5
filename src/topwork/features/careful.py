"""The second look: which quick answers are computed again, and how.

In: pixels of a whole image. Out: features as exact as this machine gives them: decoded large, resized with Pillow's
arithmetic, run through the network in f32, not rounded. The quick way (``engine.py``, ``transforms.py``) differs from
that by a little: bf16, where the processor has it, a quicker resizer beside it, large photographs shrunk while they are
decoded. So it could name another class where two are close, or state a probability that is off. Whoever answers for
images takes a second look where that is possible (docs/decisions/0020-second-look.md), and nowhere else.

Needs neither torch nor timm where there is a compiled form of the network.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from topwork.data.images import DECODER_VERSION, decode
from topwork.data.loader import in_order
from topwork.data.transforms import InputSpec, Pixels, fit_to_input
from topwork.errors import ImageError
from topwork.features.engine import BATCH, Blocks, Engine, OpenVINOEngine, TorchEngine, compiled_form
from topwork.features.store import BLOCKS, FeatureStore
from topwork.models.backbone import Backbone
from topwork.models.classifier import COMPILED, Classifier

# Largest error of the difference of two logits of one image, by precision of the network, with a margin over what was
# measured; more, for a photograph that was shrunk while it was decoded.
LOGIT_ERROR = {"f32": 0.005, "bf16": 0.4}
SHRUNK_ERROR = 0.15
TOLERANCE = 0.01  # of a probability
FORMAT = 2  # bump when a careful feature changes meaning
_ROWS_PER_SHARD = 512


def unsure_rows(classifier: Classifier, probabilities: NDArray[np.float64], is_shrunk: ArrayLike) -> NDArray[np.bool_]:
    """(N,) which of the quick (N, C) probabilities of a classifier get a second look; see :func:`needs_second_look`."""
    thresholds = classifier.thresholds["labels"] if classifier.multi_label else None
    return needs_second_look(probabilities, classifier.precision, is_shrunk, thresholds)


def needs_second_look(
    probabilities: ArrayLike, precision: str, is_shrunk: ArrayLike, thresholds: ArrayLike | None = None
) -> NDArray[np.bool_]:
    """(N,) whether a quick answer could name another class, or be off by more than ``TOLERANCE``.

    With an error of at most e in every difference of two logits, the best class is the same where it leads by e; and
    since a probability is the logistic function of such differences, it changes by at most e p (1 - p) to first order,
    which no class exceeds where p is that of the best. Of several labels each has a logit of its own and a threshold.

    Args:
        probabilities: (N, C), C at least 2, or 1 with thresholds.
        precision: of the network that gave them, ``bf16`` or ``f32``.
        is_shrunk: (N,) see :func:`is_shrunk`.
        thresholds: (C,) from which on a label is given, where an image may have several.
    """
    stated = np.asarray(probabilities, np.float64)
    error = LOGIT_ERROR.get(precision, LOGIT_ERROR["bf16"]) + SHRUNK_ERROR * np.asarray(is_shrunk, np.float64)
    if thresholds is not None:
        odds = _log_odds(stated) - _log_odds(np.asarray(thresholds, np.float64))
        off = error[:, None] * stated * (1 - stated)
        return np.asarray(((np.abs(odds) < error[:, None]) | (off > TOLERANCE)).any(axis=1))
    best, second = -np.partition(-stated, 1, axis=1)[:, :2].T
    is_close = best < second * np.exp(error)
    return np.asarray(is_close | (error * best * (1 - best) > TOLERANCE))


def _log_odds(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    inside = probabilities.clip(1e-12, 1 - 1e-12)
    return np.asarray(np.log(inside / (1 - inside)))


def is_shrunk(width: int, height: int, spec: InputSpec) -> bool:
    """Whether an image of that size was shrunk while it was decoded for the input."""
    return -(-min(width, height) // 2) >= spec.min_side


def careful_pixels(data: bytes, spec: InputSpec) -> Pixels:
    """The input for the bytes of an image file.

    Photographs that are shrunk while decoding keep at least eight times the input's side, so that the result is that
    of full size within a level, at bounded cost.

    Raises:
        ImageError: see :func:`topwork.data.images.decode`.
    """
    return fit_to_input(decode(data, min_side=4 * spec.min_side).pixels, replace(spec, resizer="pillow"))


class CarefulNetwork:
    """The network in f32, not rounded. Safe to share.

    An image gets the same features alone and in any batch (tested), so an answer never depends on its neighbors.

    Args:
        engine: one that runs already, taken where it is in f32.
    """

    def __init__(self, backbone: Backbone, engine: Engine | None = None) -> None:
        self.backbone = backbone
        self._engine = engine if engine is not None and engine.precision == "f32" else None
        self._lock = threading.Lock()

    def run(self, images: Pixels) -> Blocks:
        """float32 ``last`` and ``stages`` of uint8 (B, H, W, 3)."""
        with self._lock:
            if self._engine is None:
                self._engine = _exact_engine(self.backbone)
            return self._engine.run_unrounded(images)

    @property
    def fingerprint(self) -> str:
        """Names everything a careful feature depends on, apart from the image."""
        spec = replace(self.backbone.spec, resizer="pillow")
        facts = ("careful", FORMAT, DECODER_VERSION, self.backbone.weights_digest, spec.as_dict())
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
            blocks = [network.run(batch) for batch in _batches(in_order(pixels_of, some))]
            store.append(some, {name: np.concatenate([b[name] for b in blocks]) for name in BLOCKS})
    except ImageError:
        return None
    return {name: store.load(hashes, name).astype(np.float32, copy=False) for name in BLOCKS}


def _batches(images: Iterator[Pixels]) -> Iterator[Pixels]:
    batch: list[Pixels] = []
    for pixels in images:
        batch.append(pixels)
        if len(batch) == BATCH:
            yield np.stack(batch)
            batch = []
    if batch:
        yield np.stack(batch)


def _exact_engine(backbone: Backbone) -> Engine:
    """The network in f32 on the processor: its compiled form, if there is one."""
    own = backbone.folder / COMPILED[0]
    xml = own if own.is_file() else compiled_form(backbone)
    if xml is not None:
        try:
            return OpenVINOEngine(xml, "f32")
        except ImportError:
            pass  # OpenVINO is not installed here: torch gives the same answers, later
    return TorchEngine(backbone, "f32", "cpu")
