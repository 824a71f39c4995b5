"""Images in a NumPy file: MedMNIST, Keras, or plain ``X`` and ``y``.

In: an ``.npz`` file. Out: a :class:`Listing` whose paths are ``PART/ROW`` or ``ROW``, and each image as the bytes of a PNG.
Nothing is unpickled. CIFAR's batches, which are pickles, are not read.
"""

from __future__ import annotations

import io
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from topwork.data.columns import Row, listing_of, named_labels
from topwork.data.samples import Listing, Rules
from topwork.errors import ImageError, UsageError
from topwork.text import escape, first_names

_IMAGES, _LABELS = ("images", "image", "x", "data", "features"), ("labels", "label", "y", "targets", "target")
_CLASSES = ("class_names", "classes", "label_names", "labels_names", "names")
_PARTS = ("train", "val", "valid", "validation", "test")
_MAX_BYTES = 8 << 30


def list_arrays(path: Path, rules: Rules) -> Listing:
    """The images of the arrays in a file; ``train_images`` and ``x_train`` name a part, ``images`` and ``X`` all.

    Raises:
        UsageError: unreadable, or without images of a usual shape and as many labels.
    """
    rows: list[Row] = []
    names = _names(path)
    for part, (images, labels) in names.items():
        pixels, numbers = _array(path, images), np.asarray(_array(path, labels))
        if pixels.ndim not in (3, 4) or len(pixels) != len(numbers):
            raise UsageError(
                f"{escape(path.name)}: {images} has the shape {pixels.shape} and {labels} {numbers.shape}; "
                "expected (N, H, W) or (N, H, W, channels) and as many labels."
            )
        _brightness(path, images)
        for row, own in enumerate(_named(path, _labels_of(numbers), rules)):
            known = {"train": "train", "test": "test"}.get(part, "valid" if part else None)
            rows.append(Row(f"{part}/{row}" if part else str(row), own, known))
    several = sum(len(row.labels) > 1 for row in rows)
    if several and not rules.multi_label:
        raise UsageError(f"{escape(path.name)}: {several:,} images have several labels: add --multi-label.")
    pairs = ", ".join(f"{images} with {labels}" for images, labels in names.values())
    return listing_of(path, "arrays", rows, rules, [f"Read {escape(path.name)}: {pairs}."])


def read_array(root: Path, path: str) -> bytes:
    """One image of a file as PNG."""
    part, _, row = path.rpartition("/")
    try:
        name = _names(root)[part][0]
        pixels = _array(root, name)[int(row)]
        black, white = _brightness(root, name)
    except (UsageError, KeyError, IndexError, ValueError):
        raise ImageError("is no longer in the file") from None
    if (black, white) != (0, 255):
        pixels = np.rint((pixels.astype(np.float32) - black) * (255 / (white - black)))
    return _png(pixels.clip(0, 255).astype(np.uint8))


def _brightness(path: Path, name: str) -> tuple[int, int]:
    """The values of black and white in an array of images: 0 to 255, 0 to 65535, or, for floats, also 0 to 1 or -1 to 1.

    Raises:
        UsageError: the values lie elsewhere, as after standardizing, so that no brightness is known.
    """
    return _kept_brightness(path, _version(path), name)


@lru_cache(maxsize=8)
def _kept_brightness(path: Path, version: tuple[int, int], name: str) -> tuple[int, int]:
    pixels = _kept(path, version, name)
    if pixels.dtype.kind == "b" or not pixels.size:
        return 0, 1
    low, high = pixels.min(), pixels.max()
    ranges = [(0, 1), (-1, 1), (0, 255), (0, 65535)] if pixels.dtype.kind == "f" else [(0, 255), (0, 65535)]
    for black, white in ranges:
        if pixels.dtype.kind in "iuf" and black <= low and high <= white:
            return black, white
    raise UsageError(
        f"{escape(path.name)}: {escape(name)} has values from {low} to {high} ({pixels.dtype}); expected 0 to 255, 0 to 65535, or "
        "floats from 0 to 1 or -1 to 1."
    )


def _named(path: Path, labels: list[tuple[str, ...]], rules: Rules) -> list[tuple[str, ...]]:
    """Class numbers as names, if the user gave a file of them or the arrays include one."""
    own = next((name for name in _file(path, _version(path)).files if name.lower() in _CLASSES), None)
    if own is None or rules.class_names is not None:
        return named_labels(labels, rules)[0]
    names = dict(enumerate(text for (text,) in _labels_of(_array(path, own))))
    if not all(label.isdecimal() and int(label) in names for found in labels for label in found):
        return labels
    return [tuple(names[int(label)] for label in found) for found in labels]


def _names(path: Path) -> dict[str, tuple[str, str]]:
    """The names of the arrays of images and of labels, by part; "" for a file without parts."""
    try:
        found = _file(path, _version(path)).files
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UsageError(f"{escape(str(path))}: cannot be read as a NumPy file: {str(error).lower()}.") from None
    names = {name.lower(): name for name in found}
    pairs: dict[str, tuple[str, str]] = {}
    for part in ("", *_PARTS):
        images, labels = (
            next(
                (
                    names[n]
                    for one in kind
                    for n in ((f"{part}_{one}", f"{one}_{part}") if part else (one,))
                    if n in names
                ),
                None,
            )
            for kind in (_IMAGES, _LABELS)
        )
        if images and labels:
            pairs[part] = (images, labels)
    if not pairs:
        raise UsageError(
            f"{escape(str(path))}: no arrays of images and labels; found: {first_names(found)}. "
            "Expected X and y, images and labels, or train_images, train_labels, val_images, ..."
        )
    return pairs


def _labels_of(numbers: NDArray[Any]) -> list[tuple[str, ...]]:
    """Labels of one number or name each, or of a row of 0 and 1."""
    if numbers.ndim == 2 and numbers.shape[1] > 1:
        return [tuple(str(column) for column in np.flatnonzero(row)) for row in numbers]
    return [
        (str(int(value)) if isinstance(value, float) and value.is_integer() else _text(value),)
        for value in numbers.reshape(-1).tolist()
    ]


def _text(value: Any) -> str:
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


def _png(pixels: NDArray[np.uint8]) -> bytes:
    if pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4) and pixels.shape[0] in (1, 3, 4):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    buffer = io.BytesIO()
    try:
        Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", compress_level=1)
    except (TypeError, ValueError, SystemError):
        raise ImageError(f"an array of the shape {pixels.shape} is no image") from None
    return buffer.getvalue()


def _version(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


@lru_cache(maxsize=2)
def _file(path: Path, _version: tuple[int, int]) -> Any:
    with zipfile.ZipFile(path) as file:
        n_bytes = sum(member.file_size for member in file.infolist())
    if n_bytes > _MAX_BYTES:
        raise ValueError(f"its arrays need more than {_MAX_BYTES >> 30} GiB")
    return np.load(path, allow_pickle=False)


def _array(path: Path, name: str) -> NDArray[Any]:
    return _kept(path, _version(path), name)


@lru_cache(maxsize=8)
def _kept(path: Path, version: tuple[int, int], name: str) -> NDArray[Any]:
    try:
        return np.asarray(_file(path, version)[name])
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zipfile.zlib.error) as error:  # type: ignore[attr-defined]
        raise UsageError(f"{escape(str(path))}: {escape(name)} cannot be read: {str(error).lower()}.") from None
