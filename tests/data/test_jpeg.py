"""JPEG: what is harmless, what is lost, colors, cost."""

from __future__ import annotations

import re

import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data.drawn import (
    ARITHMETIC_JPEG,
    ODDLY_SAMPLED_JPEG,
    THREE_SCAN_JPEG,
    encoded,
    exif,
    scene,
    tall_jpeg,
    with_segment,
)
from topwork.data.images import Decoded, decode
from topwork.data.jpeg import orientation_of
from topwork.errors import ImageError

SCENE = scene(96, 80)
PLAIN = encoded(SCENE, "JPEG", quality=90)
PROGRESSIVE = encoded(SCENE, "JPEG", quality=90, progressive=True)
RESTARTING = encoded(SCENE, "JPEG", quality=90, restart_marker_rows=1)
EOI = b"\xff\xd9"


def same(data: bytes, sound: bytes = PLAIN) -> Decoded:
    """Decodes, and checks that the pixels are those of a sound file."""
    found = decode(data)
    assert np.array_equal(found.pixels, decode(sound).pixels)
    return found


def rejected(data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data)
    return str(caught.value)


def places(data: bytes, marker: int) -> list[int]:
    return [match.start() for match in re.finditer(bytes([0xFF, marker]), data)]


# ---- broken metadata is no reason to lose sound pixels

BROKEN_EXIF = {
    "empty": b"",
    "no byte order": b"XX*\0\0\0\0\x08",
    "only a byte order": b"II",
    "directory beyond the end": b"MM\0*\xff\xff\xff\xff",
    "more tags than bytes": exif(6)[:8] + b"\xff\xff" + bytes(10),
    "cut": exif(6)[:-10],
    "random": np.random.default_rng(0).bytes(400),
    "orientation 0": exif(0),
    "orientation 9": exif(9),
    "orientation as text": exif(6, kind=3).replace(b"\x01\x12\0\3", b"\x01\x12\0\2"),
    "directory within itself": b"MM\0*\0\0\0\4",
}


@pytest.mark.parametrize("block", BROKEN_EXIF.values(), ids=BROKEN_EXIF.keys())
def test_broken_exif_does_no_harm(block: bytes) -> None:
    assert same(with_segment(PLAIN, 0xE1, b"Exif\0\0" + block)).facts.orientation == 1


def test_odd_segments_do_no_harm() -> None:
    for marker, body in (
        (0xFE, b"a comment"),
        (0xFE, b""),
        (0xE1, b"http://ns.adobe.com/xap/1.0/\0<broken"),
        (0xE2, b"ICC_PROFILE\0\x05\x01broken"),
        (0xE2, b"MPF\0broken"),
        (0xED, b"Photoshop 3.0\x008BIM\xff\xff\xff"),
        (0xE0, b"JFIF\0"),
        (0xE0, b"JFXX\0\x10" + PLAIN[:500]),
        (0xE1, b"Exif\0\0" + exif(1) + PLAIN),  # a thumbnail, with markers of its own
    ):
        same(with_segment(PLAIN, marker, body))


def test_the_first_exif_block_counts() -> None:
    two = with_segment(with_segment(PLAIN, 0xE1, b"Exif\0\0" + exif(8)), 0xE1, b"Exif\0\0" + exif(6))
    assert decode(two).facts.orientation == 6


@pytest.mark.parametrize("n_bytes", [1, 3, 8, 30, 300])
@pytest.mark.parametrize("sound", [PLAIN, PROGRESSIVE, RESTARTING, THREE_SCAN_JPEG])
def test_stray_bytes_before_a_marker_do_no_harm(sound: bytes, n_bytes: int) -> None:
    stray = b"\x11" * n_bytes
    for marker in (0xDB, 0xC4, 0xDA, 0xD9):  # tables, scans, the end
        for place in {places(sound, marker)[0], places(sound, marker)[-1]}:
            same(sound[:place] + stray + sound[place:], sound)


def test_stray_bytes_in_header_and_scan_at_once() -> None:
    table = places(PLAIN, 0xDB)[0]
    same(PLAIN[:table] + b"junk!" + PLAIN[table:-2] + b"\x22" * 50 + EOI)
    odd_table = places(ODDLY_SAMPLED_JPEG, 0xDB)[0]
    same(ODDLY_SAMPLED_JPEG[:odd_table] + b"junk!" + ODDLY_SAMPLED_JPEG[odd_table:], ODDLY_SAMPLED_JPEG)


def test_an_unknown_version_and_color_transform_do_no_harm() -> None:
    version = PLAIN.index(b"JFIF\0") + 5
    same(PLAIN[:version] + b"\x09\x03" + PLAIN[version + 2 :])
    same(with_segment(PLAIN, 0xEE, b"Adobe\0\x64" + bytes(4) + b"\x01"))
    jfif = PLAIN.index(b"\xff\xe0")
    without_jfif = PLAIN[:jfif] + PLAIN[jfif + 18 :]
    same(with_segment(without_jfif, 0xEE, b"Adobe\0\x64" + bytes(4) + b"\x07"))


def test_fill_bytes_and_bytes_after_the_end_do_no_harm() -> None:
    table = places(PLAIN, 0xDB)[0]
    same(PLAIN[:table] + b"\xff" * 9 + PLAIN[table:-2] + b"\xff" * 9 + EOI)
    same(PLAIN + PLAIN)
    same(PLAIN + b"\0" * 1000)


# ---- lost pixels


@pytest.mark.parametrize(
    "sound", [PLAIN, PROGRESSIVE, RESTARTING, THREE_SCAN_JPEG, ARITHMETIC_JPEG, ODDLY_SAMPLED_JPEG]
)
def test_missing_data_are_noticed_whatever_ends_the_file(sound: bytes) -> None:
    first = places(sound, 0xDA)[0] + 20
    for end in (b"", EOI, b"\0" * 9 + EOI, EOI + sound):
        if sound is ARITHMETIC_JPEG and end.startswith(b"\0"):
            continue  # zeros and nothing mean the same there
        for share in (0.3, 0.6, 0.9):
            assert rejected(sound[: first + int(share * (len(sound) - first))] + end)


@pytest.mark.parametrize("sound", [PROGRESSIVE, THREE_SCAN_JPEG])
def test_every_scan_must_be_there(sound: bytes) -> None:
    """libjpeg does not mind: it would show a blurred image, or one without color."""
    for place in places(sound, 0xDA)[1:]:
        start = max(table for table in [place, *places(sound, 0xC4)] if table <= place)
        cut = sound[:start] + EOI
        simplejpeg.decode_jpeg(cut)
        assert "scans are missing" in rejected(cut)


def test_a_lost_restart_interval_is_noticed() -> None:
    marks = [match.start() for match in re.finditer(rb"\xff[\xd0-\xd7]", RESTARTING)]
    assert "damaged" in rejected(RESTARTING[: marks[0]] + RESTARTING[marks[1] :])


def test_stray_bytes_do_not_hide_a_loss() -> None:
    table, start = places(PLAIN, 0xDB)[0], places(PLAIN, 0xDA)[0]
    middle = (start + len(PLAIN)) // 2
    assert "truncated" in rejected(PLAIN[:table] + b"junk!" + PLAIN[table:middle] + EOI)
    assert rejected(PLAIN[:middle] + b"\x22" * 50 + EOI)


def test_a_header_without_an_image_is_rejected() -> None:
    start = places(PLAIN, 0xDA)[0]
    for n_bytes in (3, 4, 20, start - 1, start, start + 2, start + 5):
        assert "truncated" in rejected(PLAIN[:n_bytes])
        assert rejected(PLAIN[:n_bytes] + EOI)


# ---- colors


def test_inks_on_white_look_right() -> None:
    inks = np.zeros((32, 64, 4), np.uint8)
    inks[:, :16, 0], inks[:, 16:32, 1], inks[:, 32:48, 2], inks[:, 48:, 3] = 255, 255, 255, 128
    data = encoded(Image.frombytes("CMYK", (64, 32), inks.tobytes()), "JPEG", quality=95)
    found = decode(data)
    assert found.facts.mode == "CMYK"
    for x, color in ((8, (0, 255, 255)), (24, (255, 0, 255)), (40, (255, 255, 0)), (56, (127, 127, 127))):
        assert np.abs(found.pixels[16, x].astype(int) - color).max() <= 3


def test_inks_stored_as_brightness_and_color_look_right() -> None:
    """Adobe's YCCK: brightness and color of the inverted inks, and black. Pillow writes the four planes inverted."""
    planes = Image.fromarray(255 - SCENE).convert("YCbCr").split()
    stored = [Image.fromarray(255 - np.asarray(plane)) for plane in planes] + [Image.new("L", planes[0].size, 0)]
    data = encoded(Image.merge("CMYK", stored), "JPEG", quality=95)
    mark = data.index(b"Adobe") + 11
    found = decode(data[:mark] + b"\2" + data[mark + 1 :])
    assert np.abs(found.pixels.astype(int) - SCENE).mean() < 3


def test_colors_stored_as_rgb_look_right() -> None:
    data = encoded(SCENE, "JPEG", quality=95, keep_rgb=True)
    assert np.abs(decode(data).pixels.astype(int) - SCENE).mean() < 3


def test_arithmetic_and_odd_files_look_right() -> None:
    for data in (ARITHMETIC_JPEG, THREE_SCAN_JPEG, ODDLY_SAMPLED_JPEG):
        assert np.abs(decode(data).pixels.astype(int) - scene(40, 32)).mean() < 12


@pytest.mark.parametrize(
    ("offset", "value", "text"), [(4, 12, "12 bits"), (9, 2, "2 color components"), (6, 0, "pixels")]
)
def test_what_is_not_supported_is_named(offset: int, value: int, text: str) -> None:
    frame = places(PLAIN, 0xC0)[0]
    assert text in rejected(PLAIN[: frame + offset] + bytes([value]) + PLAIN[frame + offset + 1 :])


# ---- size and cost


@pytest.mark.parametrize(
    ("min_side", "height"), [(None, 80), (81, 80), (80, 80), (41, 80), (40, 40), (20, 20), (10, 10), (1, 10)]
)
def test_photos_come_at_a_half_a_quarter_or_an_eighth(min_side: int | None, height: int) -> None:
    assert decode(PLAIN, min_side=min_side).pixels.shape == (height, height * 96 // 80, 3)


def test_thousands_of_scans_are_refused() -> None:
    last = places(PROGRESSIVE, 0xC4)[-1]
    assert "too many scans" in rejected(PROGRESSIVE[:-2] + PROGRESSIVE[last:-2] * 2000 + EOI)


def test_scans_are_counted_by_what_they_cost() -> None:
    """A scan costs a pass over all blocks, so fewer are allowed to a larger image."""
    large = encoded(Image.new("RGB", (5000, 4000)), "JPEG", progressive=True)
    last = places(large, 0xC4)[-1]
    assert "too many scans" in rejected(large[:-2] + large[last:-2] * 300 + EOI)


def test_memory_of_progressive_files_is_counted() -> None:
    frame = places(PROGRESSIVE, 0xC2)[0]
    large = PROGRESSIVE[: frame + 5] + b"\x2a\x80\x2a\x80" + PROGRESSIVE[frame + 9 :]  # 118 million pixels
    sampling = frame + 11
    assert "GB of memory" in rejected(large[:sampling] + b"\x11" + large[sampling + 1 :])


def test_much_arithmetic_coding_is_refused() -> None:
    assert "arithmetic" in rejected(ARITHMETIC_JPEG[:-2] + bytes(20_000_000) + EOI)


def test_too_many_segments_are_refused() -> None:
    comment = b"\xff\xfe\0\2"
    assert "too many segments" in rejected(PLAIN[:2] + comment * 600_000 + PLAIN[2:])


def test_a_tall_jpeg_is_what_it_is_made_to_be() -> None:
    strip = decode(encoded(scene(64, 16), "JPEG", quality=90)).pixels
    found = decode(tall_jpeg(64, 40)).pixels
    assert (
        np.abs(found - np.concatenate([strip, strip, strip])[:40].astype(int)).mean() < 3
    )  # colors blend at the seams


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
