"""Augmentation depends on (seed, epoch, sample) only; batches are never tiny; decoded images are what prediction sees."""

import io
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from topwork.data import shards
from topwork.data.augment import PIPELINES
from topwork.data.images import decode
from topwork.data.transforms import fit_to_input
from topwork.errors import TopworkError
from topwork.training import batches as module
from topwork.training.batches import ImageDataset, ahead, batches_of, decode_all, epoch_order, to_device
from training.drawn import SPEC, drawn_images


def views(data, rows, epoch):
    return to_device(data.load(np.asarray(rows), epoch), "cpu").numpy()


@pytest.mark.parametrize("name", list(PIPELINES))
def test_a_view_depends_on_seed_epoch_and_key_only(name):
    pixels, labels = drawn_images(12)
    data = ImageDataset(pixels, labels, SPEC, name, seed=3)
    together = views(data, range(12), 5)
    one_by_one = np.concatenate([views(data, [row], 5) for row in reversed(range(12))])[::-1]
    assert np.array_equal(together, one_by_one)
    # other rows, same keys: the sample is what counts
    order = np.random.default_rng(0).permutation(12)
    shuffled = ImageDataset(pixels[order], labels[order], SPEC, name, seed=3, keys=order)
    assert np.array_equal(views(shuffled, range(12), 5), together[order])


@pytest.mark.parametrize("name", [name for name in PIPELINES if name != "none"])
def test_epochs_seeds_and_samples_differ(name):
    pixels, labels = drawn_images(12)
    data = ImageDataset(pixels, labels, SPEC, name, seed=3)
    assert not np.array_equal(views(data, range(12), 0), views(data, range(12), 1))
    other = ImageDataset(pixels, labels, SPEC, name, seed=4)
    assert not np.array_equal(views(data, range(12), 0), views(other, range(12), 0))


def test_nothing_asked_changes_nothing():
    pixels, labels = drawn_images(4)
    data = ImageDataset(pixels, labels, SPEC)
    assert np.array_equal(data.load(np.arange(4), 0), pixels)
    assert np.array_equal(data.load(np.arange(4), None), pixels)


def test_flips_are_mirror_images_about_half_the_time():
    pixels, labels = drawn_images(1)
    data = ImageDataset(pixels, labels, SPEC, "flip")
    seen = [views(data, [0], epoch)[0] for epoch in range(200)]
    flipped = [np.array_equal(view, pixels[0][:, ::-1]) for view in seen]
    assert all(np.array_equal(v, pixels[0]) or f for v, f in zip(seen, flipped, strict=True))
    assert 70 < sum(flipped) < 130


def test_an_input_that_was_cut_out_is_not_cut_a_second_time():
    pixels, labels = drawn_images(2)
    data = ImageDataset(pixels, labels, replace(SPEC, fit="crop", crop_fraction=0.5), "flip")
    seen = {views(data, [0], epoch).tobytes() for epoch in range(20)}
    assert seen == {pixels[0].tobytes(), pixels[0][:, ::-1].tobytes()}


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
    monkeypatch.setattr(shards, "IN_MEMORY", in_memory)
    monkeypatch.setenv("TOPWORK_CACHE", str(tmp_path))
    files = [jpeg(n) for n in range(5)]
    manifest = SimpleNamespace(read_unchanged=files.__getitem__)
    pixels = decode_all(manifest, [3, 1, 4], SPEC)
    expected = [fit_to_input(decode(files[row], min_side=SPEC.min_side).pixels, SPEC) for row in (3, 1, 4)]
    assert np.array_equal(pixels, np.stack(expected))
    assert not list(tmp_path.iterdir())  # the file has no name left
    assert decode_all(manifest, [0], SPEC, margin=1.15).shape == (1, 19, 19, 3)


def test_an_image_that_vanished_is_named():
    def read(row):
        raise FileNotFoundError(2, "No such file or directory")

    with pytest.raises(TopworkError, match=r"cats/1.jpg: changed since the scan.*[Nn]o such file"):
        decode_all(SimpleNamespace(read_unchanged=read, samples=[SimpleNamespace(path="cats/1.jpg")]), [0], SPEC)


def test_batches_come_in_order_and_are_prepared_ahead():
    data = ImageDataset(*drawn_images(40), SPEC, "standard")
    batches = batches_of(epoch_order(40, 0, 0), 4)
    prepared = []
    loading = ahead(lambda rows: prepared.append(rows) or data.load(rows, 0), batches)
    first, _ = next(loading)
    assert np.array_equal(first, batches[0])
    while len(prepared) < 1 + module.AHEAD:  # while nobody asks for them
        time.sleep(0.01)
    found = list(loading)
    assert [rows.tolist() for rows, _ in found] == [rows.tolist() for rows in batches[1:]]
    assert all(np.array_equal(to_device(loaded, "cpu"), views(data, rows, 0)) for rows, loaded in found)
