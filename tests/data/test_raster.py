"""Turning, cutting into bands, levels of gray, limits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from data.drawn import exif, scene, stored
from topwork.data.exif import orientation_of
from topwork.data.raster import (
    MAX_PIXELS,
    Raster,
    check_memory,
    check_size,
    finish,
    flat,
    gray_levels,
    in_bands,
    turned,
    upright,
)
from topwork.errors import ImageError


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turning_agrees_with_pillow(orientation: int) -> None:
    pixels = scene(31, 22)
    image = Image.fromarray(pixels)
    image.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(upright(pixels, orientation), expected)
    found = turned(pixels, orientation)
    assert found.flags.c_contiguous
    assert np.array_equal(found, expected)
    assert np.array_equal(turned(stored(orientation, pixels), orientation), pixels)


@given(heights=st.lists(st.integers(1, 20), min_size=1, max_size=8), n_rows=st.integers(1, 30))
def test_bands_are_the_stack_cut_anew(heights: list[int], n_rows: int) -> None:
    stack = np.arange(sum(heights) * 3, dtype=np.uint8).reshape(-1, 3)
    ends = np.cumsum(heights)
    images = [Image.fromarray(stack[end - height : end]) for end, height in zip(ends, heights, strict=True)]
    bands = [np.asarray(band) for band in in_bands(images, n_rows)]
    assert np.array_equal(np.concatenate(bands), stack)
    assert all(len(band) == n_rows for band in bands[:-1])
    assert 1 <= len(bands[-1]) <= n_rows


@pytest.mark.parametrize(
    ("maximum", "limit", "end"),
    [
        (65535, 65535, 65535),
        (8192, 65535, 65535),  # an eighth of the range: the range stays
        (8191, 65535, 8191),  # 13 bits
        (4095, 65535, 4095),
        (4096, 65535, 8191),
        (1000, 65535, 1023),
        (255, 65535, 255),
        (3, 65535, 255),
        (0, 65535, 255),
        (4095, 4095, 4095),
        (512, 4095, 4095),
        (511, 4095, 511),
    ],
)
def test_gray_of_16_bits_follows_one_rule(maximum: int, limit: int, end: int) -> None:
    levels = gray_levels(maximum, limit)
    assert levels.dtype == np.uint8
    for value in (0, end // 3, end // 2, end):
        assert levels[value] == round(value * 255 / end)
    assert (np.diff(levels[: end + 1].astype(int)) >= 0).all()


def test_flat_lays_over_white() -> None:
    image = Image.fromarray(np.array([[[200, 100, 0, 128], [1, 2, 3, 0], [1, 2, 3, 255]]], np.uint8))
    assert np.asarray(flat(image)).tolist() == [[[227, 177, 127], [255, 255, 255], [1, 2, 3]]]


def test_rows_that_a_reader_does_not_bring_are_noticed() -> None:
    rows = Image.fromarray(scene(40, 30))
    for height, is_whole in ((30, True), (31, False)):
        raster = Raster("PNG", 40, height, "RGB", lambda n_rows: in_bands([rows], n_rows), 0)
        if is_whole:
            assert np.array_equal(finish(raster, None).pixels, scene(40, 30))
        else:
            with pytest.raises(ImageError, match="rows are missing"):
                finish(raster, None)


def test_sizes_are_checked() -> None:
    check_size(12_000, 10_000)
    for width, height in ((0, 5), (5, 0), (12_000, 10_001), (MAX_PIXELS, 2), (2_000_000, 1)):
        with pytest.raises(ImageError):
            check_size(width, height)
    check_memory(10**9)
    with pytest.raises(ImageError, match=r"1\.1 GB"):
        check_memory(11 * 10**8)


# ---- EXIF


@pytest.mark.parametrize("kind", [3, 4])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_read_from_exif(orientation: int, order: str, kind: int) -> None:
    block = exif(orientation, order, kind)
    assert orientation_of(block) == orientation
    assert orientation_of(b"Exif\0\0" + block) == orientation


@given(st.binary(max_size=60), st.sampled_from([b"", b"II*\0", b"MM\0*", b"MM\0*\0\0\0\x08\0\x01"]))
def test_any_other_bytes_are_an_orientation_too(tail: bytes, head: bytes) -> None:
    assert orientation_of(head + tail) in range(1, 9)


@pytest.mark.parametrize("n_bytes", range(26))
def test_a_cut_exif_block_means_as_it_is(n_bytes: int) -> None:
    assert orientation_of(exif(6)[: min(n_bytes, 21)]) == 1


@pytest.mark.parametrize("orientation", [0, 9, 1000])
def test_an_orientation_that_does_not_exist_means_as_it_is(orientation: int) -> None:
    assert orientation_of(exif(orientation)) == 1
