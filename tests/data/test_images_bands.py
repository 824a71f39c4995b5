"""Many-band TIFF: the bands that were asked for, however the file lays them out; hostile files are refused with a reason."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from drawing import draw_folders
from terminal import topwork
from topwork.data.images import decode, select_bands
from topwork.data.manifest import scan
from topwork.data.samples import Rules
from topwork.errors import ImageError, UsageError
from topwork.export.predictor import Predictor
from topwork.models.classifier import load_classifier
from topwork.run import load_run
from topwork.settings import band_numbers


def tiff(samples: np.ndarray, *, planar: bool = False, **options: object) -> bytes:
    """(H, W, N) samples as a file."""
    buffer = io.BytesIO()
    own = np.moveaxis(samples, -1, 0) if planar else samples
    config = "separate" if planar else "contig"
    tifffile.imwrite(buffer, own, photometric="minisblack", planarconfig=config, metadata=None, **options)
    return buffer.getvalue()


def samples(n_bands: int = 5, dtype: str = "u1", height: int = 45, width: int = 70) -> np.ndarray:
    top = 1000 if dtype != "u1" else 256
    return np.random.default_rng(0).integers(0, top, (height, width, n_bands)).astype(dtype)


def stretched(values: np.ndarray) -> np.ndarray:
    low, high = np.percentile(values.astype(np.float32), (2, 98), axis=(0, 1))
    return np.rint(255 * np.clip((values - low) / (high - low), 0, 1)).astype(np.uint8)


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("tile", [None, (32, 48)])
@pytest.mark.parametrize(
    ("compression", "predictor", "dtype"),
    [
        *((None, False, dtype) for dtype in ("u1", "u2", ">u2", "i2", "f4")),
        *(("zlib", False, dtype) for dtype in ("u1", "u2", ">u2", "f4")),
        *(("zlib", True, dtype) for dtype in ("u1", "u2", ">u2", "i2")),
        *(("lzw", True, dtype) for dtype in ("u1", "u2")),
    ],
)
def test_the_bands_that_were_asked_for(planar, tile, compression, predictor, dtype):
    order = {"byteorder": ">"} if dtype.startswith(">") else {}
    values = samples(dtype=dtype.strip(">"))
    options = {
        "tile": tile,
        "compression": compression,
        "predictor": predictor or None,
        "rowsperstrip": None if tile else 16,
    }
    data = tiff(values, planar=planar, **order, **options)
    chosen = values[:, :, [3, 1, 0]]
    expected = chosen if dtype == "u1" else stretched(chosen)
    found = decode(select_bands(data, "4,2,1")).pixels
    assert np.abs(found.astype(int) - expected).max() <= (dtype != "u1"), "rounding"


def test_without_the_option_the_reason_names_it():
    with pytest.raises(ImageError, match=r"has 5 bands.*--bands 3,2,1"):
        decode(tiff(samples()))


def test_other_files_and_big_tiff():
    values = samples()
    assert np.array_equal(decode(select_bands(tiff(values, bigtiff=True), "3,2,1")).pixels, values[:, :, [2, 1, 0]])
    assert select_bands(b"\xff\xd8\xffjpeg", "3,2,1") == b"\xff\xd8\xffjpeg"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tiff(samples(2)), "has no band 3 .*only 2"),
        (tiff(samples(1)[:, :, 0]), "only 1$"),
        (tiff(samples(5, "f8")), "64 bits"),
        (tiff(samples())[:200], "damaged|truncated|missing"),
        (b"II*\0" + b"\xff" * 40, "damaged"),
    ],
)
def test_what_cannot_be_read_is_named(data, reason):
    with pytest.raises(ImageError, match=reason):
        select_bands(data, "3,2,1")


@given(st.data())
def test_damaged_files_give_a_reason_and_nothing_else(data):
    file = bytearray(tiff(samples(4), compression="zlib", predictor=True, rowsperstrip=16))
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, 400) if data.draw(st.booleans()) else st.integers(0, len(file) - 1))
        file[place] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ImageError):
        decode(select_bands(bytes(file), "3,2,1"))


@pytest.mark.parametrize("text", ["", "1,2", "3, 2, 1", "1,2,3,4", "0,1,2", "a,b,c", "-1,2,3"])
def test_what_are_no_three_bands(text):
    with pytest.raises(UsageError, match="three band numbers"):
        band_numbers(text)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Drawn images in bands 5, 4 and 3; the first two are noise."""
    drawn = draw_folders(tmp_path_factory.mktemp("drawn"), n_each=10)
    folder = tmp_path_factory.mktemp("bands") / "data"
    for path in sorted(drawn.glob("*/*.jpg")):
        rgb = np.asarray(Image.open(path))
        noise = np.random.default_rng(len(path.name)).integers(0, 256, (*rgb.shape[:2], 2)).astype(np.uint8)
        target = folder / path.relative_to(drawn).with_suffix(".tif")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(tiff(np.concatenate([noise, rgb[:, :, ::-1]], -1), compression="zlib"))
    return folder


def test_a_model_remembers_its_bands(data, tmp_path):
    run = tmp_path / "run"
    done = topwork("fit", data, "--out", run, "--bands", "5,4,3", "--backbone", "random:test_efficientnet", "--json")
    assert done.returncode == 0, done.stderr
    assert load_classifier(run).backbone.spec.bands == "5,4,3"
    held_out = load_run(run)
    rows = held_out.split.test
    paths = [str(held_out.manifest.root / held_out.manifest.samples[row].path) for row in rows]
    answers = {path: answer.label for path, answer in zip(paths, Predictor(run).predict(paths), strict=True)}
    predicted = held_out.predictions_of("test").logits.argmax(1)
    names = [held_out.manifest.classes[label] for label in predicted]
    assert sorted(answers.values()) == sorted(names)
    assert all(Path(path).parent.name == label for path, label in answers.items()), "noise would be guessed"
    assert np.array_equal(decode(held_out.manifest.read(0)).pixels.shape, (96, 96, 3))
    evaluated = topwork("evaluate", run, data, "--json")
    assert json.loads(evaluated.stdout)["accuracy"]["value"] == 1.0, evaluated.stderr
    other = topwork("evaluate", run, data, "--bands", "1,2,3")
    assert (other.returncode, "the model was trained with --bands 5,4,3" in other.stderr) == (2, True)
    exported = topwork("export", run, "--to", "onnx", "--out", tmp_path / "m.onnx")
    assert (exported.returncode, "trained with --bands" in exported.stderr) == (2, True)


def test_without_the_option_a_scan_says_what_to_add(data):
    done = topwork("scan", data, "--quick")
    assert done.returncode == 2
    assert "--bands 3,2,1" in done.stderr
    assert topwork("scan", data, "--quick", "--bands", "9,2,1").stderr.count("has no band 9") == 1


def test_bands_of_images_without_any_are_said_to_have_no_effect(tmp_path):
    draw_folders(tmp_path / "data", n_each=2)
    assert (
        "--bands 3,2,1 has no effect: none of the images is a TIFF."
        in scan(tmp_path / "data", rules=Rules(bands="3,2,1")).notes
    )
