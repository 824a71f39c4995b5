"""Batch prediction into a file: one writer, damaged journals, layouts, wrong use."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from terminal import topwork
from topwork.errors import TopworkError, UsageError
from topwork.export.batch import COLUMNS, Layout, _append_rows, predict_to_file
from topwork.export.inputs import list_inputs
from topwork.export.predictor import Predictor
from topwork.files import locked


@pytest.fixture(scope="module")
def predictor(runs):
    return Predictor(runs["plain"], n_top=3)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- one writer, and what a dead one left


def test_the_second_of_two_writers_is_refused(predictor, images, tmp_path):
    out = tmp_path / "rows.jsonl"
    with locked(out), pytest.raises(UsageError, match=r"rows\.jsonl: another process is writing here"):
        predict_to_file(predictor, images, out)
    predict_to_file(predictor, images, out)
    assert [row["path"] for row in rows_of(out)] == images
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("damage", [b"\xff\xfe\n", b"{\n", b"[1]\n", b'{"path": 1}\n', b"\n", b"[" * 100_000 + b"\n"])
def test_a_damaged_line_of_the_journal_costs_only_the_rows_from_there_on(predictor, images, tmp_path, damage):
    whole = tmp_path / "whole.jsonl"
    predict_to_file(predictor, images, whole)
    out, journal = tmp_path / "rows.jsonl", tmp_path / ".rows.jsonl.journal"
    _append_rows(predictor, images, journal, None, None, None)
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:11], damage, *lines[12:]]))
    counts = predict_to_file(predictor, images, out)
    assert counts["n_resumed"] == 10
    assert out.read_bytes() == whole.read_bytes()


def test_a_place_that_cannot_be_written_is_named(predictor, images, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TopworkError, match="file"):
        predict_to_file(predictor, images[:1], tmp_path / "file" / "rows.csv")


# ---- wrong use


@pytest.mark.parametrize("name", ["missing.jpg", "missing/*.jpg", "missing"])
def test_a_missing_path_is_wrong_use_and_nothing_is_written(runs, images, tmp_path, name):
    done = topwork("predict", runs["plain"], images[0], tmp_path / name, "--out", tmp_path / "rows.csv")
    assert done.returncode == 2
    assert name in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_missing_path_of_a_list_is_a_row(tmp_path):
    assert list_inputs([str(tmp_path / "missing.jpg")]) == [str(tmp_path / "missing.jpg")]


def test_texts_beside_images_are_no_inputs(tmp_path):
    for name in (
        "a.jpg",
        "b/c.PNG",
        "no ending",
        "damaged.bin",
        "README.md",
        "labels.csv",
        "export.ndjson",
        "labels.xlsx",
        "b/c.xml",
        ".hidden.jpg",
    ):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(name)
    expected = ["a.jpg", "b/c.PNG", "damaged.bin", "no ending"]
    folder = str(tmp_path / "in")
    assert list_inputs([folder]) == [f"{folder}/{name}" for name in expected]
    shutil.make_archive(folder, "zip", folder)
    assert sorted(list_inputs([f"{folder}.zip"])) == [f"{folder}.zip/{name}" for name in [".hidden.jpg", *expected]]
    assert list_inputs([f"{folder}/README.md"]) == [f"{folder}/README.md"], "what is named has its row"
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "x.txt").write_text("perhaps an image")
    assert list_inputs([str(tmp_path / "texts")]) == [str(tmp_path / "texts" / "x.txt")]


def test_too_many_failures_end_with_status_3_and_do_not_block_the_next_run(runs, images, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"")
    out = tmp_path / "rows.csv"
    bad = [tmp_path / "broken.jpg", images[0]]
    for out_option in ([], ["--out", out]):
        done = topwork("predict", runs["plain"], *bad, *out_option)
        assert done.returncode == 3, done.stderr
    assert "1 error" in done.stdout
    assert topwork("predict", runs["plain"], *images[:2], "--out", out).returncode == 0, "the failed run is replaced"
    done = topwork("predict", runs["plain"], *images[:2], "--out", out)
    assert (done.returncode, "exists already" in done.stderr) == (2, True), "a good one is not"
    assert topwork("predict", runs["plain"], *bad, "--max-reject-fraction", "0.5").returncode == 0


@pytest.mark.parametrize("options", [["--all-probabilities"], ["--csv-safe"], ["--out", "rows.xlsx"]])
def test_options_without_effect_and_unknown_endings_are_refused(runs, images, options):
    done = topwork("predict", runs["plain"], images[0], *options)
    assert done.returncode == 2
    assert options[0] in done.stderr


# ---- layouts


def test_a_probability_column_for_each_class(predictor, images, tmp_path):
    layout = Layout(1, predictor.classes)
    for ending in ("csv", "jsonl", "parquet"):
        predict_to_file(predictor, images[:4], tmp_path / f"rows.{ending}", layout=layout)
    names = [f"probability_{name}" for name in predictor.classes]
    table = pq.read_table(tmp_path / "rows.parquet")
    assert table.column_names == [*COLUMNS, *names]
    expected = [[dict(p.top)[name] for name in predictor.classes] for p in predictor.predict(images[:4])]
    np.testing.assert_allclose(np.array([table[name].to_pylist() for name in names]).T, expected)
    found = rows_of(tmp_path / "rows.jsonl")
    assert [[row[name] for name in names] for row in found] == expected
    assert [len(row["top"]) for row in found] == [1] * 4
    with open(tmp_path / "rows.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [[float(row[name]) for name in names] for row in rows] == expected


def test_counts_by_outcome_and_class_are_printed(runs, images, tmp_path):
    done = topwork("predict", runs["plain"], *images[:9], "--out", tmp_path / "rows.csv", "--all-probabilities")
    assert done.returncode == 0, done.stderr
    assert f"Wrote 9 rows to {tmp_path / 'rows.csv'}" in done.stdout
    answers = Predictor(runs["plain"]).predict(images[:9])
    label = answers[0].label
    n = sum(answer.label == label for answer in answers)
    assert any(line.split() == [label, str(n)] for line in done.stdout.splitlines())


def test_csv_cells_are_exact_unless_safe_ones_are_asked_for(predictor, images, tmp_path):
    names = ['=HYPERLINK("http://evil.example")', "+1", "-1", "@SUM(1)", "plain.jpg"]
    inputs = []
    for name in names:
        (tmp_path / name.replace("/", "_")).write_bytes(Path(images[0]).read_bytes())
        inputs.append(name.replace("/", "_"))
    for is_safe in (False, True):
        out = tmp_path / f"{is_safe}.csv"
        relative = [str(tmp_path / name) for name in inputs]
        loaded = [predictor.load(path, name) for path, name in zip(relative, inputs, strict=True)]
        predictor_rows = predictor.answer_loaded(loaded)
        from topwork.export.batch import _write_csv, row_of

        _write_csv(iter([row_of(p) for p in predictor_rows]), out, Layout(is_csv_safe=is_safe))
        with open(out, newline="") as file:
            found = [row["path"] for row in csv.DictReader(file)]
        assert found == ([f"'{name}" for name in inputs[:4]] + inputs[4:] if is_safe else inputs)


# ---- what Predictor.predict takes


def test_one_image_of_any_kind_is_a_list_of_one(predictor, images):
    path = images[0]
    expected = predictor.predict([path])[0]
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
        given = [path, Path(path), Path(path).read_bytes(), image, pixels, pixels[None]]
        found = [predictor.predict(one) for one in given]
    assert [len(answers) for answers in found] == [1] * len(given)
    assert [answers[0].top for answers in found] == [expected.top] * len(given)
    assert [answers[0].path for answers in found] == [path, path, "#0", "#0", "#0", "#0"]
    mixed = predictor.predict([path, pixels, Path(path).read_bytes()])
    assert [answer.top for answer in mixed] == [expected.top] * 3


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_pillow_images_are_seen_as_files_are(predictor, tmp_path, mode):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (64, 64, 4), dtype=np.uint8), "RGBA")
    image = (
        Image.fromarray(rng.integers(0, 65536, (64, 64)).astype(np.uint16)) if mode == "I;16" else image.convert(mode)
    )
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    image.save(path)
    assert predictor.predict(image)[0].top == predictor.predict(path)[0].top


@pytest.mark.parametrize("wrong", [np.zeros((8, 8, 3)), np.zeros((8, 8, 3, 2, 2), np.uint8), [3]])
def test_what_is_no_image_is_named(predictor, wrong):
    with pytest.raises(TopworkError, match="image"):
        predictor.predict(wrong)
