"""scikit-learn estimators: ``ImageClassifier`` (a probe) and ``ImageFeatures`` (its features).

Images are paths, arrays, Pillow images, or a DataFrame with a column of paths. ``tests/test_estimator.py`` runs
scikit-learn's checks, and lists those that cannot apply to images.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin  # noqa: TID253 - loaded only for these names
from sklearn.utils import check_random_state  # noqa: TID253
from sklearn.utils.multiclass import check_classification_targets  # noqa: TID253
from sklearn.utils.validation import check_is_fitted  # noqa: TID253

from topwork.data.folders import read_regular_file
from topwork.data.images import as_rgb, decode, encoded_image
from topwork.data.loader import in_order
from topwork.data.transforms import Fit, Pixels, fit_to_input
from topwork.errors import ImageError, InputError
from topwork.evaluation.calibration import fit_temperature
from topwork.evaluation.predictions import softmax
from topwork.features.embed import Embedder, Features
from topwork.features.engine import load_engine
from topwork.features.probe import fit_probe
from topwork.models.backbone import load_backbone
from topwork.text import count, escape, first_names

PATH_COLUMNS = ("path", "file", "filename", "filepath", "image")
ONE_LABEL = (
    "pass one label per image (for one-hot rows, y.argmax(axis=1); for several labels per image, columns of 0 and 1 and "
    "sklearn.multioutput.MultiOutputClassifier)"
)


class _ImageEstimator(BaseEstimator):  # type: ignore[misc]
    """Parameters and reading of images; features are kept on disk by content, so each image is embedded once."""

    backbone: str
    fit_mode: str
    size: int | None
    n_jobs: int | None

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False  # the input is images, not tables of numbers
        tags.input_tags.string = True
        tags.no_validation = True
        return tags

    def _features(self, X: Any) -> Features:
        """Embeds images that are not in the store yet."""
        if self.fit_mode not in get_args(Fit):
            raise InputError(f"fit_mode={self.fit_mode!r} must be one of {', '.join(get_args(Fit))}.")
        backbone = load_backbone(self.backbone).with_spec(fit=self.fit_mode, height=self.size, width=self.size)
        embedder = Embedder(backbone, load_engine(backbone, precision="f32"))
        hashes = []
        try:
            for content_hash, pixels in in_order(
                lambda image: _load(image, embedder), _images(X), _n_threads(self.n_jobs)
            ):
                hashes.append(content_hash)
                if pixels is not None:
                    embedder.take(content_hash, pixels)
        finally:
            embedder.flush()
        return Features(tuple(hashes), embedder.store)


class ImageClassifier(ClassifierMixin, _ImageEstimator):  # type: ignore[misc]
    """A calibrated linear head on frozen features, chosen by cross-validation on the training images.

    Args:
        backbone: see :func:`topwork.load_backbone`.
        head: ``plain``, ``extended`` or ``auto``.
        fit_mode: resize mode: ``squash``, ``crop`` or ``pad``.
        size: input side in pixels; None for that of pretraining.
        random_state: seed of the cross-validation folds: an int, a ``numpy.random.RandomState``, or None.
        n_jobs: threads that decode images; None or -1 for one per core.

    Attributes:
        classes_: sorted class labels.
        head_: the fitted :class:`topwork.models.head.LinearHead`, including the temperature.
        temperature_: the calibration temperature.
    """

    def __init__(
        self,
        backbone: str = "auto",
        head: str = "auto",
        fit_mode: str = "squash",
        size: int | None = None,
        random_state: Any = 0,
        n_jobs: int | None = None,
    ) -> None:
        self.backbone = backbone
        self.head = head
        self.fit_mode = fit_mode
        self.size = size
        self.random_state = random_state
        self.n_jobs = n_jobs

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> ImageClassifier:
        """Fits the head.

        Args:
            X: N images: paths, Pillow images, uint8 arrays (H, W, 3) or (H, W), or a DataFrame with a column of paths.
            y: (N,) or (N, 1) labels of any kind that NumPy can sort.
            sample_weight: (N,) weights of the images; 0 leaves an image out.

        Raises:
            UsageError: an image cannot be used (named); labels are missing, too few, or not one per image.
        """
        images = _images(X)
        weights = None if sample_weight is None else _checked_weights(sample_weight, len(images))
        if weights is not None and (weights == 0).any() and len(y) == len(images):
            kept = np.flatnonzero(weights)
            images, y, weights = [images[row] for row in kept], np.asarray(y)[kept], weights[kept]
        self.classes_, encoded = _encoded(y, len(images))
        seed = self.random_state
        if not isinstance(seed, (int, np.integer)):
            seed = check_random_state(seed).randint(2**31 - 1)
        probe = fit_probe(
            self._features(images),
            encoded,
            len(self.classes_),
            head=self.head,
            seed=int(seed),
            sample_weight=weights,
        )
        scored = None if weights is None else weights[probe.rows]
        self.temperature_ = fit_temperature(probe.out_of_fold_logits, encoded[probe.rows], scored)
        self.head_ = probe.head.divided_by(self.temperature_)
        return self

    def decision_function(self, X: Any) -> NDArray[np.float64]:
        """(N, C) calibrated logits; (N,) their difference for two classes, by scikit-learn's convention."""
        logits = self._logits(X)
        return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """(N, C) calibrated probabilities, columns as in ``classes_``."""
        return softmax(self._logits(X))

    def predict_log_proba(self, X: Any) -> NDArray[np.float64]:
        """(N, C) logarithms of :meth:`predict_proba`."""
        return np.asarray(np.log(self.predict_proba(X)))

    def predict(self, X: Any) -> NDArray[Any]:
        """(N,) predicted labels."""
        logits = self._logits(X)
        return np.asarray(self.classes_[logits.argmax(1)])

    def _logits(self, X: Any) -> NDArray[np.float64]:
        check_is_fitted(self, "head_")
        images = _images(X)
        if not images:
            return np.zeros((0, len(self.classes_)))
        return self.head_.logits(self._features(images).blocks(self.head_.transform.blocks))


class ImageFeatures(TransformerMixin, _ImageEstimator):  # type: ignore[misc]
    """Transforms images to pooled features of a pretrained network, as the first step of a scikit-learn pipeline.

    Args:
        backbone, fit_mode, size, n_jobs: see :class:`ImageClassifier`.
    """

    def __init__(
        self, backbone: str = "auto", fit_mode: str = "squash", size: int | None = None, n_jobs: int | None = None
    ) -> None:
        self.backbone = backbone
        self.fit_mode = fit_mode
        self.size = size
        self.n_jobs = n_jobs

    def fit(self, X: Any = None, y: Any = None) -> ImageFeatures:  # noqa: ARG002 - scikit-learn's signature
        """Nothing is fitted."""
        self.n_features_out_ = load_backbone(self.backbone).n_features
        return self

    def transform(self, X: Any) -> NDArray[np.float32]:
        """(N, D) features of N images."""
        check_is_fitted(self, "n_features_out_")
        images = _images(X)
        if not images:
            return np.zeros((0, self.n_features_out_), np.float32)
        return self._features(images).block("last").astype(np.float32)

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[Any]:  # noqa: ARG002
        """Names of the columns, for ``set_output``."""
        check_is_fitted(self, "n_features_out_")
        return np.array([f"feature{n}" for n in range(self.n_features_out_)], dtype=object)


def _images(X: Any) -> list[Any]:
    """The images as a list; for a DataFrame, the column of paths."""
    columns = getattr(X, "columns", None)
    if columns is not None:
        names = [name for name in PATH_COLUMNS if name in columns] or list(columns if len(columns) == 1 else ())
        if not names:
            raise InputError(
                f"X has the columns {first_names([str(c) for c in columns])}: name the one with paths 'path'."
            )
        X = X[names[0]]
    is_one_array = isinstance(X, np.ndarray) and X.dtype == np.uint8 and X.ndim == 3 and X.shape[2] == 3
    if is_one_array or isinstance(X, (str, bytes, os.PathLike)) or hasattr(X, "getexif"):
        raise InputError("X is a single image; pass a list of images.")
    if isinstance(X, np.ndarray) and X.dtype != np.uint8 and X.ndim == 2 and X.shape[1] == 1:
        X = X[:, 0]
    return list(X)


def _encoded(y: Any, n_images: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Sorted class labels, and (N,) the class of each image."""
    try:
        labels = np.asarray(y)
    except ValueError:  # lists of different lengths
        raise InputError(f"y has several labels for some images: {ONE_LABEL}.") from None
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise InputError(f"y has shape {labels.shape}: {ONE_LABEL}.")
    if len(labels) != n_images:
        raise InputError(f"{count(n_images, 'image')} but {count(len(labels), 'label')}.")
    if not n_images:
        raise InputError("There are no images to fit on.")
    missing = [row for row, label in enumerate(labels.tolist()) if label is None or label != label]
    if missing:
        raise InputError(f"y[{missing[0]}] has no label; remove such images.")
    try:
        check_classification_targets(labels)
        classes, encoded = np.unique(labels, return_inverse=True)
    except (TypeError, ValueError) as error:
        raise InputError(f"y cannot be used as class labels: {error}") from None
    if len(classes) < 2:
        raise InputError(f"All labels are {classes.tolist()[0]!r}; a classifier needs at least two classes.")
    return classes, encoded.astype(np.int64)


def _checked_weights(sample_weight: Any, n_images: int) -> NDArray[np.float64]:
    """(N,) finite weights, none negative and one positive."""
    try:
        weights = np.asarray(sample_weight, np.float64)
    except (TypeError, ValueError):
        raise InputError("sample_weight must be one number per image.") from None
    if weights.shape != (n_images,):
        raise InputError(f"sample_weight has shape {weights.shape}; pass one number per image: ({n_images},).")
    if not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise InputError("sample_weight must be finite, not negative, and positive for at least one image.")
    return weights


def _n_threads(n_jobs: int | None) -> int | None:
    """Number of threads, by joblib's convention: -1 is one per core, -2 one less."""
    if n_jobs == 0:
        raise InputError("n_jobs=0 is not allowed; use a positive number, or -1 for one thread per core.")
    if n_jobs is None or n_jobs > 0:
        return n_jobs
    return max(1, (os.cpu_count() or 1) + 1 + n_jobs)


def _load(image: Any, embedder: Embedder) -> tuple[str, Pixels | None]:
    """Content hash, and input-sized pixels if they are new."""
    spec = embedder.spec
    if isinstance(image, np.ndarray):
        pixels = as_rgb(image)
        content_hash = hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()
        return content_hash, fit_to_input(pixels, spec) if embedder.wants(content_hash) else None
    try:
        data = read_regular_file(Path(image)) if isinstance(image, (str, os.PathLike)) else encoded_image(image)
        content_hash = hashlib.sha256(data).hexdigest()
        if not embedder.wants(content_hash):
            return content_hash, None
        return content_hash, fit_to_input(decode(data, min_side=spec.min_side).pixels, spec)
    except ImageError as error:
        name = escape(str(image)) if isinstance(image, (str, os.PathLike)) else "An image"
        raise InputError(f"{name}: {error}") from None
