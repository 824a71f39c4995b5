"""Augmentation depends on (seed, epoch, sample) only; batches are never tiny; decoded images are what prediction sees."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from topwork.data.images import decode
from topwork.data.transforms import InputSpec, fit_to_input
from topwork.errors import TopworkError
from topwork.training import streams as module
from topwork.training.recipe import AUGMENTATIONS, Augmentation
from topwork.training.streams import ImageStream, augment, batches_of, decode_all, epoch_order
from training.drawn import SPEC, drawn_images


@pytest.mark.parametrize("name", list(AUGMENTATIONS))
def test_a_view_depends_on_seed_epoch_and_key_only(name):
    pixels, labels = drawn_images(12)
    stream = ImageStream(pixels, labels, SPEC, AUGMENTATIONS[name], seed=3)
    together = stream.load(np.arange(12), 5)
    one_by_one = np.concatenate([stream.load(np.array([row]), 5) for row in reversed(range(12))])[::-1]
    assert np.array_equal(together, one_by_one)
    # other rows, same keys: the sample is what counts
    order = np.random.default_rng(0).permutation(12)
    shuffled = ImageStream(pixels[order], labels[order], SPEC, AUGMENTATIONS[name], seed=3, keys=order)
    assert np.array_equal(shuffled.load(np.arange(12), 5), together[order])


@pytest.mark.parametrize("name", [name for name in AUGMENTATIONS if name != "none"])
def test_epochs_seeds_and_samples_differ(name):
    pixels, labels = drawn_images(12)
    stream = ImageStream(pixels, labels, SPEC, AUGMENTATIONS[name], seed=3)
    rows = np.arange(12)
    assert not np.array_equal(stream.load(rows, 0), stream.load(rows, 1))
    other = ImageStream(pixels, labels, SPEC, AUGMENTATIONS[name], seed=4)
    assert not np.array_equal(stream.load(rows, 0), other.load(rows, 0))


def test_nothing_asked_changes_nothing():
    pixels, labels = drawn_images(4)
    stream = ImageStream(pixels, labels, SPEC)
    assert np.array_equal(stream.load(np.arange(4), 0), pixels)
    assert np.array_equal(stream.load(np.arange(4), None), pixels)


def test_flips_are_mirror_images_about_half_the_time():
    pixels, _ = drawn_images(1)
    views = [augment(pixels[0], Augmentation(flip=True), SPEC, np.random.default_rng(n)) for n in range(200)]
    flipped = [np.array_equal(view, pixels[0][:, ::-1]) for view in views]
    assert all(np.array_equal(v, pixels[0]) or f for v, f in zip(views, flipped, strict=True))
    assert 70 < sum(flipped) < 130


def test_turns_show_all_eight_positions_and_keep_the_pixels():
    pixels, _ = drawn_images(1)
    how = Augmentation(flip=True, flip_vertical=True, turns=True)
    views = {augment(pixels[0], how, SPEC, np.random.default_rng(n)).tobytes() for n in range(200)}
    assert len(views) == 8
    wide = InputSpec(height=8, width=16)
    picture = np.random.default_rng(0).integers(0, 255, (8, 16, 3), np.uint8)
    shapes = {augment(picture, how, wide, np.random.default_rng(n)).shape for n in range(20)}
    assert shapes == {(8, 16, 3)}


def test_crops_stay_inside_and_have_the_asked_area():
    ramp = np.tile(np.arange(64, dtype=np.uint8)[None, :, None] * 3, (64, 1, 3))
    how = Augmentation(scale=(0.25, 0.25))
    spec = InputSpec(height=32, width=32)
    for n in range(20):
        view = augment(ramp, how, spec, np.random.default_rng(n))
        assert view.shape == (32, 32, 3)
        assert int(view[0, -1, 0]) - int(view[0, 0, 0]) == pytest.approx(31 * 3, abs=5)


def test_colour_changes_are_bounded():
    grey = np.full((16, 16, 3), 100, np.uint8)
    views = [augment(grey, Augmentation(colour=0.3), SPEC, np.random.default_rng(n)) for n in range(50)]
    assert 70 <= min(view.min() for view in views) < 80
    assert 120 < max(view.max() for view in views) <= 130


@given(st.integers(1, 500), st.integers(1, 64))
def test_batches_cover_all_rows_in_nearly_equal_parts(n, batch_size):
    order = epoch_order(n, 0, 3)
    parts = batches_of(order, batch_size)
    assert sorted(np.concatenate(parts)) == list(range(n))
    sizes = [len(part) for part in parts]
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    if n > 1 and batch_size > 2:
        assert min(sizes) > 1


def test_orders_differ_by_epoch_and_seed_and_repeat():
    assert np.array_equal(epoch_order(50, 1, 2), epoch_order(50, 1, 2))
    assert not np.array_equal(epoch_order(50, 1, 2), epoch_order(50, 1, 3))
    assert not np.array_equal(epoch_order(50, 1, 2), epoch_order(50, 2, 2))


def jpeg(seed):
    buffer = io.BytesIO()
    picture = np.random.default_rng(seed).integers(0, 255, (40, 60, 3), np.uint8)
    Image.fromarray(picture).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize("in_memory", [10**9, 0])
def test_decoded_images_are_the_pixels_that_prediction_sees(in_memory, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "IN_MEMORY_BYTES", in_memory)
    monkeypatch.setenv("TOPWORK_CACHE", str(tmp_path))
    files = [jpeg(n) for n in range(5)]
    pixels = decode_all(lambda row: files[row], [3, 1, 4], SPEC)
    expected = [fit_to_input(decode(files[row], min_side=SPEC.min_side).pixels, SPEC) for row in (3, 1, 4)]
    assert np.array_equal(pixels, np.stack(expected))
    assert not list(tmp_path.iterdir())  # the file has no name left
    assert decode_all(lambda row: files[row], [0], SPEC, margin=1.15).shape == (1, 19, 19, 3)


def test_an_image_that_vanished_is_named():
    def read(row):
        raise FileNotFoundError(2, "No such file or directory")

    with pytest.raises(TopworkError, match=r"cats/1.jpg: was fine when scanned.*No such file"):
        decode_all(read, [0], SPEC, name=lambda row: "cats/1.jpg")
