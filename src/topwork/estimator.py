"""``ImageClassifier``: topwork's probe as a scikit-learn estimator over image paths or pixel arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin  # noqa: TID253 - loaded only for this name
from sklearn.utils.validation import check_is_fitted  # noqa: TID253

from topwork.data.folders import read_regular_file
from topwork.data.images import decode
from topwork.data.loader import in_order
from topwork.data.transforms import Pixels, fit_to_input
from topwork.errors import ImageError, UsageError
from topwork.evaluation.calibration import fit_temperature
from topwork.evaluation.predictions import softmax
from topwork.features.embed import Embedder, Features
from topwork.features.engine import load_engine
from topwork.features.probe import fit_probe
from topwork.models.backbone import load_backbone
from topwork.text import escape


class ImageClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A calibrated linear head on frozen features; everything about it chosen by cross-validation on what it is given.

    Features are kept on disk by content, so that cross-validating or refitting embeds each image once.

    Args:
        backbone: see :func:`topwork.load_backbone`.
        head: ``plain``, ``extended`` or ``auto``.
        fit_mode: ``squash``, ``crop`` or ``pad``: how an image gets the input's shape.
        size: input side in pixels; None takes the one the weights were trained at.
        random_state: seed of the folds.
        n_jobs: threads that decode; None takes one a core.

    Attributes:
        classes_: sorted class labels.
        head_: the fitted :class:`topwork.models.head.LinearHead`, temperature included.
        temperature_: what its logits were divided by.
    """

    def __init__(
        self,
        backbone: str = "auto",
        head: str = "auto",
        fit_mode: str = "squash",
        size: int | None = None,
        random_state: int = 0,
        n_jobs: int | None = None,
    ) -> None:
        self.backbone = backbone
        self.head = head
        self.fit_mode = fit_mode
        self.size = size
        self.random_state = random_state
        self.n_jobs = n_jobs

    def fit(self, X: Any, y: Any) -> ImageClassifier:
        """Fits the head.

        Args:
            X: N images: paths, or uint8 arrays (H, W, 3) or (H, W).
            y: N labels of any kind that NumPy can sort.

        Raises:
            UsageError: an image cannot be used (named), or the lengths differ.
        """
        labels = np.asarray(y)
        if len(X) != len(labels):
            raise UsageError(f"{len(X)} images but {len(labels)} labels.")
        self.classes_, encoded = np.unique(labels, return_inverse=True)
        features = self._features(X)
        probe = fit_probe(features, encoded, len(self.classes_), head=self.head, seed=self.random_state)
        self.temperature_ = fit_temperature(probe.out_of_fold_logits, encoded[probe.rows])
        self.head_ = probe.head.divided_by(self.temperature_)
        return self

    def decision_function(self, X: Any) -> NDArray[np.float64]:
        """(N, C) calibrated logits; (N,) their difference for two classes, as scikit-learn has it."""
        logits = self._logits(X)
        return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """(N, C) calibrated probabilities, columns as in ``classes_``."""
        return softmax(self._logits(X))

    def predict(self, X: Any) -> NDArray[Any]:
        """(N,) most probable labels."""
        return np.asarray(self.classes_[self._logits(X).argmax(1)])

    def _logits(self, images: Any) -> NDArray[np.float64]:
        check_is_fitted(self, "head_")
        features = self._features(images)
        return self.head_.logits(features.blocks(self.head_.transform.blocks))

    def _features(self, images: Sequence[Any]) -> Features:
        """Embeds what the store does not know yet."""
        backbone = load_backbone(self.backbone).with_spec(fit=self.fit_mode, height=self.size, width=self.size)
        embedder = Embedder(backbone, load_engine(backbone, precision="f32"))

        def load(image: Any) -> tuple[str, Pixels | None]:
            return _load(image, embedder)

        hashes = []
        try:
            for content_hash, pixels in in_order(load, list(images), self.n_jobs):
                hashes.append(content_hash)
                if pixels is not None:
                    embedder.take(content_hash, pixels)
        finally:
            embedder.flush()
        return Features(tuple(hashes), embedder.store)


def _load(image: Any, embedder: Embedder) -> tuple[str, Pixels | None]:
    """Content hash, and input-sized pixels when they are new."""
    spec = embedder.spec
    if isinstance(image, (str, Path)):
        try:
            data = read_regular_file(Path(image))
            content_hash = hashlib.sha256(data).hexdigest()
            if not embedder.wants(content_hash):
                return content_hash, None
            return content_hash, fit_to_input(decode(data, min_side=spec.min_side).pixels, spec)
        except ImageError as error:
            raise UsageError(f"{escape(str(image))}: {error}") from None
    pixels = _as_rgb(np.asarray(image))
    content_hash = hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()
    return content_hash, fit_to_input(pixels, spec) if embedder.wants(content_hash) else None


def _as_rgb(array: NDArray[Any]) -> Pixels:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3)):
        raise UsageError(
            f"An image array must be uint8 of shape (H, W, 3) or (H, W), not {array.dtype} {array.shape}. "
            "Scale floats to 0..255 and convert them first."
        )
    if array.ndim == 2:
        array = array[:, :, None]
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))
