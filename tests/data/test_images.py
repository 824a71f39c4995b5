"""The promises of the one decoder, over all formats. What belongs to one format is tested in that format's file."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import threading
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from data.drawn import (
    bmp,
    encoded,
    exif,
    files,
    flat_png,
    png,
    scene,
    stored,
    tall_jpeg,
    tiff,
    tiff_tags,
    with_segment,
)
from topwork.data.images import BACKGROUND, FORMATS, MAX_PIXELS, OUT_OF_MEMORY, Decoded, decode, sniff
from topwork.errors import ImageError

SCENE = scene()
FILES = files(SCENE)
EMBEDDED = ("JPEG arithmetic", "JPEG odd sampling", "JPEG three scans")  # these show a smaller scene
SOURCE = Path(__file__).parents[2] / "src"


def reason(data: bytes, **options: int) -> str:
    """Why a file is rejected; fails if it is not."""
    with pytest.raises(ImageError) as caught:
        decode(data, **options)
    text = str(caught.value)
    assert 0 < len(text) < 200
    assert "\n" not in text
    return text


def distance(found: Decoded, expected: np.ndarray) -> float:
    """Mean difference of two images, 0..255."""
    assert found.pixels.shape == expected.shape
    return float(np.abs(found.pixels.astype(int) - expected.astype(int)).mean())


# ---- what comes out


@pytest.mark.parametrize("name", FILES)
def test_every_format_shows_the_drawing(name: str) -> None:
    found = decode(FILES[name])
    facts = found.facts
    expected = scene(40, 32) if name in EMBEDDED else SCENE
    assert found.pixels.dtype == np.uint8
    assert found.pixels.flags.c_contiguous
    assert facts.format == name.split()[0] == sniff(FILES[name][:32])
    assert (facts.width, facts.height, facts.orientation) == (expected.shape[1], expected.shape[0], 1)
    assert facts.is_animated == name.endswith(("animated", "pages"))
    if facts.is_gray:
        assert (found.pixels == found.pixels[..., :1]).all()
        if name == "TIFF fax":
            return
        channel = expected[..., :1] if "interlaced" in name else Image.fromarray(expected).convert("L")
        expected = np.broadcast_to(np.asarray(channel).reshape(*expected.shape[:2], 1), expected.shape)
    if name in ("PNG alpha", "WEBP lossless"):
        alpha = np.asarray(Image.fromarray(SCENE).convert("L"))[..., None] / 255
        expected = np.rint(SCENE * alpha + 255 * (1 - alpha)).astype(np.uint8)
    exact = name.startswith(("PNG", "BMP", "TIFF")) and "palette" not in name and "JPEG" not in name
    assert distance(found, expected) <= (0.5 if exact else 12)


@pytest.mark.parametrize("min_side", [1, 12, 13, 24, 25, 48, 1000])
@pytest.mark.parametrize("name", FILES)
def test_a_smaller_image_keeps_the_short_side_and_the_facts(name: str, min_side: int) -> None:
    full = decode(FILES[name])
    small = decode(FILES[name], min_side=min_side)
    assert small.facts == full.facts
    assert min(min_side, *full.pixels.shape[:2]) <= min(small.pixels.shape[:2])
    factor = full.pixels.shape[0] / small.pixels.shape[0]
    assert factor in (1, 2, 4, 8)
    assert distance(small, np.asarray(Image.fromarray(full.pixels).reduce(int(factor)))) <= 6


def test_large_images_of_every_format_come_smaller() -> None:
    pixels = scene(400, 300)
    for name, data in files(pixels).items():
        if name not in EMBEDDED:
            assert decode(data, min_side=64).pixels.shape == (75, 100, 3), name


def test_facts_say_how_colors_are_stored() -> None:
    modes = {name: decode(data).facts.mode for name, data in FILES.items()}
    assert modes["JPEG"] == modes["PNG"] == modes["WEBP"] == modes["BMP"] == modes["TIFF"] == "RGB"
    assert modes["JPEG gray"] == modes["PNG gray"] == modes["PNG interlaced"] == "L"
    assert modes["PNG palette"] == modes["GIF"] == modes["BMP palette"] == "P"
    assert modes["PNG alpha"] == modes["WEBP lossless"] == "RGBA"
    assert (modes["JPEG CMYK"], modes["PNG 16 bit"], modes["TIFF fax"]) == ("CMYK", "I;16", "1")


# ---- upright


def oriented(format: str, orientation: int, order: str) -> bytes:
    pixels = Image.fromarray(stored(orientation, SCENE))
    block = exif(orientation, order)
    if format == "JPEG":
        return with_segment(encoded(pixels, "JPEG", quality=95), 0xE1, b"Exif\0\0" + block)
    if format == "TIFF":
        tags = tiff_tags(pixels.width, pixels.height, [8, 8, 8], 2) | {274: (3, [orientation])}
        return tiff(tags, [pixels.tobytes()], order=order)
    return encoded(pixels, format, exif=block, **({"lossless": True} if format == "WEBP" else {}))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_images_are_turned_upright(format: str, orientation: int, order: str) -> None:
    data = oriented(format, orientation, order)
    found = decode(data)
    assert found.facts.orientation == orientation
    assert (found.facts.width, found.facts.height) == (64, 48)
    assert found.pixels.flags.c_contiguous
    assert distance(found, SCENE) <= (3 if format == "JPEG" else 0)
    small = decode(data, min_side=32 if format == "JPEG" else 24)
    assert small.pixels.shape[0] <= 48
    assert distance(small, np.asarray(Image.fromarray(SCENE).reduce(48 // small.pixels.shape[0]))) <= 4


# ---- brightness


def test_transparent_pixels_show_the_background() -> None:
    empty = np.zeros((8, 8, 4), np.uint8)
    for name in ("PNG", "WEBP", "TIFF"):
        assert (decode(encoded(empty, name)).pixels == BACKGROUND).all(), name


@pytest.mark.parametrize(
    "data",
    [
        encoded(np.full((4, 4), 7, np.int32), "TIFF"),
        encoded(np.full((4, 4), 0.5, np.float32), "TIFF"),
        tiff(tiff_tags(4, 4, [16], 1) | {339: (3, [2])}, [bytes(32)]),
        tiff(tiff_tags(4, 4, [8], 1) | {339: (3, [2])}, [bytes(16)]),
        tiff(tiff_tags(4, 4, [64], 1), [bytes(128)]),
    ],
    ids=["int32", "float32", "int16", "int8", "uint64"],
)
def test_samples_without_an_agreed_brightness_are_rejected(data: bytes) -> None:
    assert "no agreed brightness" in reason(data)


# ---- content decides


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"  <svg width='3'/>", "SVG"),
        (b"%PDF-1.7\n", "PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
        (b"\0\0\1\0\1\0\x10\x10", "icon"),
        (b"\0\0\0\x18ftypmsf1\0\0\0\0", "HEIF sequence"),
        (b"\0\0\0\x18ftypavif\0\0\0\0", "AVIF"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0", "video"),
        (b"8BPS\0\1", "Photoshop"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"PK\3\4", "ZIP"),
        (b"BMW drivers are not bitmaps, whatever the first two letters say", "format"),
        (b"II*\0\x10\0\0\0CR\2\0 is a camera raw file", "format"),
        (b"not an image", "format"),
        (b"P6 1 1 255 abc", "format"),
        (b"\xff\xd8", "format"),
    ],
)
def test_other_formats_are_rejected(data: bytes, name: str) -> None:
    text = reason(data)
    assert text.startswith("not an image of a supported format")
    assert all(supported in text for supported in FORMATS)
    assert name in text
    assert sniff(data[:32]) is None


def test_formats_that_pillow_would_read_are_rejected() -> None:
    image = Image.fromarray(SCENE)
    for other in ("PPM", "TGA", "ICO", "ICNS", "JPEG2000", "AVIF", "PCX", "SGI", "DDS", "EPS", "PDF", "MSP"):
        drawn = image.convert("1") if other == "MSP" else image
        assert reason(encoded(drawn, other)).startswith("not an image"), other


def test_an_empty_file_is_named() -> None:
    assert reason(b"") == "the file is empty"
    assert sniff(b"") is None


# ---- decoded to the last row, or rejected


@pytest.mark.parametrize("share", [0.02, 0.2, 0.5, 0.8, 0.95, 0.99])
@pytest.mark.parametrize("name", [name for name in FILES if name != "TIFF pages"])
def test_truncated_files_are_rejected(name: str, share: float) -> None:
    data = FILES[name]
    reason(data[: int(len(data) * share)])


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("TIFF")])
def test_a_file_that_lacks_its_last_bytes_is_rejected(name: str) -> None:
    # A GIF without its closing byte is whole. A TIFF may end in anything.
    reason(FILES[name][: -2 if name.startswith("GIF") else -1])


def test_of_several_tiff_pages_only_the_first_need_be_whole() -> None:
    data = FILES["TIFF pages"]
    assert distance(decode(data[: int(len(data) * 0.8)]), SCENE) == 0
    reason(data[: int(len(data) * 0.4)])


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("JPEG")])
@pytest.mark.parametrize("share", [0.75, 0.9, 0.97])
def test_a_truncated_jpeg_with_an_end_mark_is_rejected(name: str, share: float) -> None:
    data = FILES[name]
    start = data.index(b"\xff\xda")
    assert "truncated" in reason(data[: start + int((len(data) - start) * share)] + b"\xff\xd9")


def test_truncated_files_stay_rejected_where_a_program_told_pillow_to_load_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for name, data in FILES.items():
        for share in (0.3, 0.6, 0.95) if name != "TIFF pages" else ():
            assert reason(data[: int(len(data) * share)]), name


def test_bytes_after_the_image_do_no_harm() -> None:
    for name, data in FILES.items():
        found = decode(data + b"\0\0 and more \xff\xd8\xff\xd9" * 3)
        assert np.array_equal(found.pixels, decode(data).pixels), name


# ---- cost


@pytest.mark.parametrize(
    "data",
    [
        flat_png(60_000, 60_000, bits=1, color=0),
        flat_png(12_000, 10_001, bits=1, color=0),
        FILES["JPEG"].replace(b"\x00\x30\x00\x40", b"\xff\x00\xff\x00", 1),
        FILES["GIF"][:6] + b"\xff\xff\xff\xff" + FILES["GIF"][10:],
        FILES["WEBP"].replace(b"\x9d\x01\x2a\x40\x00\x30\x00", b"\x9d\x01\x2a\xff\x3f\xff\x3f"),
        bmp(2**31 - 1, 2**31 - 1, 24, b""),
        bmp(200_000, -200_000, 1, b""),
        tiff(tiff_tags(100_000, 100_000, [1], 1), [b"\0"]),
        flat_png(2_000_000, 10, bits=1, color=0),
    ],
    ids=["PNG", "PNG just above", "JPEG", "GIF", "WEBP", "BMP", "BMP top-down", "TIFF", "PNG wide"],
)
def test_too_many_pixels_are_rejected_before_decoding(data: bytes) -> None:
    start = time.process_time()
    assert reason(data).startswith("too large")
    assert time.process_time() - start < 0.5


def test_memory_is_counted_with_the_finished_pixels() -> None:
    data = tiff(tiff_tags(11_000, 10_900, [8, 8, 8], 2, 8), [zlib.compress(b"")])
    assert "GB of memory" in reason(data)
    assert "GB of memory" not in reason(data, min_side=224)


MEASURE = """
import json, resource, sys, time
data = open(sys.argv[1], "rb").read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
from topwork.data.images import decode
from topwork.errors import ImageError
start, shape, reason = time.process_time(), None, None
try:
    shape = decode(data, min_side=json.loads(sys.argv[2])).pixels.shape
except ImageError as error:
    reason = str(error)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
kilo = 1 if sys.platform == "darwin" else 1024
print(json.dumps([shape, reason, time.process_time() - start, (after - before) * kilo + len(data)]))
"""


def cost(data: bytes, folder: Path, min_side: int | None = 224) -> tuple[list[int] | None, str | None, float, int]:
    """Shape or reason, processor seconds, and bytes of memory that decoding takes in a process of its own."""
    path = folder / "image"
    path.write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, path, json.dumps(min_side)],
        env={"PYTHONPATH": str(SOURCE)},
        capture_output=True,
        check=True,
        text=True,
    )
    shape, text, seconds, n_bytes = json.loads(done.stdout)
    return shape, text, seconds, n_bytes


measured = pytest.mark.skipif(sys.platform == "win32", reason="the memory of a process cannot be measured here")
LARGE = (10_500, 10_480)  # 110 million pixels


@measured
@pytest.mark.parametrize(
    ("bits", "color"), [(8, 2), (8, 6), (16, 0), (8, 3)], ids=["RGB", "RGBA", "16 bit gray", "palette"]
)
def test_a_large_png_costs_less_than_promised(bits: int, color: int, tmp_path: Path) -> None:
    shape, _, seconds, n_bytes = cost(flat_png(*LARGE, bits=bits, color=color), tmp_path)
    assert shape == [328, 329, 3]
    assert seconds < 10
    assert n_bytes < 1e9


@measured
def test_a_large_jpeg_costs_less_than_promised(tmp_path: Path) -> None:
    data = tall_jpeg(*LARGE)
    for min_side, shape in ((224, [1310, 1313, 3]), (None, [10_480, 10_500, 3])):
        found, _, seconds, n_bytes = cost(data, tmp_path, min_side)
        assert found == shape
        assert seconds < 10
        assert n_bytes < 1e9


@measured
@pytest.mark.slow
@pytest.mark.parametrize("format", ["WEBP", "WEBP lossless", "GIF", "BMP", "TIFF", "TIFF 16 bit", "JPEG progressive"])
def test_large_files_of_other_formats_cost_less_than_promised(format: str, tmp_path: Path) -> None:
    drawn = Image.fromarray(scene(*LARGE))
    options: dict[str, object] = {
        "WEBP": {"method": 0},
        "WEBP lossless": {"lossless": True, "quality": 0, "method": 0},
    }.get(format, {})
    if format == "TIFF 16 bit":
        data = encoded(np.asarray(drawn.convert("L")).astype(np.uint16) * 257, "TIFF")
    elif format == "JPEG progressive":
        data = encoded(drawn, "JPEG", progressive=True, subsampling=0)
    else:
        data = encoded(drawn.quantize(64) if format == "GIF" else drawn, format.split()[0], **options)
    shape, text, seconds, n_bytes = cost(data, tmp_path)
    assert shape is not None, text
    assert seconds < 10
    assert n_bytes < 1e9


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process cannot be limited here")
def test_no_memory_left_is_a_reason_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(flat_png(10_000, 10_000, bits=8, color=2))
    program = """
import resource, sys
from topwork.data import png
from topwork.data.images import OUT_OF_MEMORY, decode
from topwork.errors import ImageError
data = open(sys.argv[1], "rb").read()
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 100_000_000,) * 2)
try:
    decode(data, min_side=224)
except ImageError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, path],
        env={"PYTHONPATH": str(SOURCE)},
        capture_output=True,
        check=True,
        text=True,
    )
    assert done.stdout.strip() == OUT_OF_MEMORY


# ---- the process is left alone


def test_a_jpeg_is_decoded_without_pillow_or_torch(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(FILES["JPEG"])
    program = (
        "import sys; from topwork.data.images import decode; decode(open(sys.argv[1], 'rb').read(), min_side=24); "
    )
    program += "print([name for name in ('PIL', 'torch', 'scipy', 'matplotlib') if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program, path],
        env={"PYTHONPATH": str(SOURCE)},
        capture_output=True,
        check=True,
        text=True,
    )
    assert done.stdout.strip() == "[]"


def test_nothing_is_warned_about_and_no_setting_is_touched() -> None:
    """Each of these makes ``PIL.Image.open`` warn, or fail over metadata."""
    odd = {
        "more pixels than Pillow likes": flat_png(10_000, 9_500, bits=1, color=0),
        "large strip": tiff(tiff_tags(10_000, 9_500, [1], 1, 8), [zlib.compress(bytes(1250 * 9_500))]),
        "broken EXIF": with_segment(FILES["JPEG"], 0xE1, b"Exif\0\0" + exif(1)[:8] + b"\xff\xff" * 9),
        "broken MPO": with_segment(FILES["JPEG"], 0xE2, b"MPF\0" + exif(1)[:8] + b"\xff" * 30),
        "tag of too many values": tiff(tiff_tags(4, 4, [8], 1) | {259: (3, [1, 1]), 282: (4, [1, 2, 3])}, [bytes(16)]),
        "tag beyond the end": tiff(tiff_tags(4, 4, [8], 1) | {270: (2, [65])}, [bytes(16)]).replace(
            b"\x0e\x01\x02\0\1\0\0\0", b"\x0e\x01\x02\0\xff\xff\xff\0"
        ),
        "two animations": png(SCENE, bits=8, color=2, extra=2 * (b"\0\0\0\x08acTL" + bytes(12))),
    }
    settings = [Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for data in [*odd.values(), *FILES.values()]:
            decode(data, min_side=64)
    assert not caught
    assert settings == [Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)]


def test_many_threads_decode_at_once() -> None:
    expected = {name: decode(data).pixels for name, data in FILES.items()}
    barrier = threading.Barrier(8)

    def work(seed: int) -> bool:
        names = random.Random(seed).sample(list(FILES), len(FILES)) * 3
        barrier.wait()
        return all(np.array_equal(decode(FILES[name]).pixels, expected[name]) for name in names)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


# ---- files of any bytes


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A file with some bytes changed, cut out or put in, half of the time near its start."""
    found = bytearray(data)
    reach = len(found) if rng.random() < 0.5 else min(len(found), 120)
    place = rng.randrange(reach)
    match rng.randrange(5):
        case 0:
            for _ in range(rng.randrange(1, 6)):
                found[rng.randrange(reach)] = rng.randrange(256)
        case 1:
            found[place] ^= 1 << rng.randrange(8)
        case 2:
            del found[place : place + rng.randrange(1, 30)]
        case 3:
            found[place:place] = rng.randbytes(rng.randrange(1, 30))
        case 4:
            found[place : place + 4] = rng.choice([b"\xff\xff\xff\xff", bytes(4), b"\x7f\xff\xff\xff", b"\1\0\0\0"])
    return bytes(found)


@pytest.mark.parametrize("name", FILES)
def test_any_bytes_give_an_image_or_a_reason(name: str) -> None:
    rng = random.Random(name)
    for _ in range(40):
        data = mutated(FILES[name], rng)
        start = time.process_time()
        try:
            found = decode(data, min_side=rng.choice([None, 16]))
            assert found.pixels.shape[2] == 3
        except ImageError:
            pass
        assert time.process_time() - start < 5


def test_random_bytes_after_each_magic_number() -> None:
    rng = random.Random(0)
    for data in FILES.values():
        for n_kept in (4, 12, 20, 40):
            reason(data[:n_kept] + rng.randbytes(500))


def test_every_real_image_is_used(shared_data: Path) -> None:
    """The three small data sets hold one file that is no image: a placeholder GIF is one."""
    for path in sorted((shared_data / "ants-bees").rglob("*.*")):
        decode(path.read_bytes(), min_side=64)


def test_matches_pillow_on_real_photos(shared_data: Path) -> None:
    for path in sorted((shared_data / "ants-bees").rglob("*.jpg"))[::20]:
        expected = np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("RGB"))
        assert distance(decode(path.read_bytes()), expected) < 1


def test_the_limit_is_what_the_promise_says() -> None:
    assert MAX_PIXELS == 120_000_000
