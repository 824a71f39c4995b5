"""Images in NumPy files: brightness, class names and shapes as people store them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from topwork.data.embedded import list_arrays, read_array
from topwork.data.samples import Rules
from topwork.errors import UsageError

GRAYS = np.linspace(0, 255, 64).round().astype(np.uint8).reshape(8, 8)
IMAGES = np.stack([GRAYS, GRAYS[::-1], GRAYS.T, np.zeros_like(GRAYS)])  # a dark image is read as the others are
LABELS = np.array([0, 1, 0, 1])


def saved(folder: Path, **arrays: np.ndarray) -> Path:
    np.savez(folder / "data.npz", **arrays)
    return folder / "data.npz"


def read(path: Path, row: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(read_array(path, row))))


@pytest.mark.parametrize(
    "images",
    [
        IMAGES,
        IMAGES.astype(np.int64),
        IMAGES.astype(np.float64),
        IMAGES.astype(np.uint16) * 257,
        IMAGES.astype(np.float32) / 255,
        IMAGES.astype(np.float32) / 127.5 - 1,
        IMAGES.astype(np.float32) * 257,
    ],
    ids=["uint8", "int64", "floats to 255", "uint16", "floats to 1", "floats from -1", "floats to 65535"],
)
def test_brightness_is_that_of_all_images(images, tmp_path) -> None:
    path = saved(tmp_path, X=images, y=LABELS)
    assert len(list_arrays(path, Rules()).entries) == 4
    for row, expected in enumerate(IMAGES):
        assert np.abs(read(path, str(row)).astype(int) - expected).max() <= 1


def test_masks_are_black_and_white(tmp_path) -> None:
    path = saved(tmp_path, X=IMAGES > 100, y=LABELS)
    assert set(np.unique(read(path, "0"))) == {0, 255}


@pytest.mark.parametrize(
    "images",
    [(IMAGES - 127.5) / 60, np.where(IMAGES > 9, np.nan, 0.5), IMAGES.astype(np.int64) * -1, IMAGES.astype(complex)],
)
def test_values_without_a_brightness_are_refused(images, tmp_path) -> None:
    with pytest.raises(UsageError, match=r"data.npz: X has values from .*expected 0 to 255"):
        list_arrays(saved(tmp_path, X=images, y=LABELS), Rules())


@pytest.mark.parametrize(
    ("labels", "more", "names"),
    [
        (LABELS, {}, {"0", "1"}),
        (LABELS[:, None].astype(float), {}, {"0", "1"}),
        (np.eye(2, dtype=int)[LABELS], {}, {"0", "1"}),
        (np.array(["cat", "dog"])[LABELS], {}, {"cat", "dog"}),
        (np.array([b"cat", b"dog"])[LABELS], {}, {"cat", "dog"}),
        (LABELS, {"class_names": np.array(["cat", "dog"])}, {"cat", "dog"}),
        (LABELS, {"class_names": np.array(["cat"])}, {"0", "1"}),
        (LABELS.astype(bool), {}, {"False", "True"}),
    ],
)
def test_labels_as_people_store_them(labels, more, names, tmp_path) -> None:
    assert {
        entry.label for entry in list_arrays(saved(tmp_path, images=IMAGES, labels=labels, **more), Rules()).entries
    } == names


@pytest.mark.parametrize(
    "arrays", [{"X": IMAGES}, {"X": IMAGES, "y": LABELS[:3]}, {"X": IMAGES.reshape(4, 64), "y": LABELS}]
)
def test_arrays_that_are_no_labeled_images_are_refused(arrays, tmp_path) -> None:
    with pytest.raises(UsageError, match=r"data.npz"):
        list_arrays(saved(tmp_path, **arrays), Rules())


def test_pickled_objects_are_never_read(tmp_path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        list_arrays(saved(tmp_path, X=IMAGES, y=np.array(["a", None, "b", "c"], dtype=object)), Rules())
