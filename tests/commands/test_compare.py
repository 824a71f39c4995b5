"""The verbs examine and compare as a user runs them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from drawing import draw_folders
from terminal import topwork
from topwork.commands.compare import compare_runs, list_runs
from topwork.commands.fit import fit
from topwork.console import runs_lines
from topwork.errors import UsageError
from topwork.settings import FitSettings

SHAPES = ("disc", "square", "cross")
SMALL = "random:test_efficientnet"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return draw_folders(tmp_path_factory.mktemp("data"), n_each=30, shapes=SHAPES)


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    settings = FitSettings(backbone=SMALL, near_duplicates=False)  # drawn shapes are alike
    fit(data, folder / "good", settings)
    fit(data, folder / "weak", replace(settings, size=32))
    fit(data, folder / "other-split", replace(settings, size=32, seed=1))
    return folder


def test_a_better_run_is_called_better_and_pictures_are_shown(runs, tmp_path):
    part, (found,) = compare_runs([runs / "weak", runs / "good"])
    assert part == "test"
    values = found.as_dict()
    assert values["n"] == 18
    assert values["accuracy_second"] >= values["accuracy_first"]
    assert values["n_gained"] - values["n_lost"] == round(18 * values["difference"])
    gained = [row for row in values["disagreements"] if row["change"] == "gained"]
    assert all(row["second"] == row["label"] != row["first"] for row in gained)
    page = tmp_path / "page.html"
    done = topwork("compare", runs / "weak", runs / "good", "--out", page, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["comparisons"][0]["sentence"] == found.sentence
    assert page.read_text().count("data:image/jpeg") == len(values["disagreements"])


def test_runs_of_images_that_were_moved_and_renamed_are_compared(tmp_path):
    """Images are known by their content; a picture that is not there any more is said to be missing."""
    data = draw_folders(tmp_path / "data", n_each=10, shapes=SHAPES)
    settings = FitSettings(backbone=SMALL, size=32, near_duplicates=False)
    fit(data, tmp_path / "a", settings)
    data.rename(tmp_path / "moved")
    for number, path in enumerate(sorted((tmp_path / "moved").rglob("*.jpg"))):
        path.rename(path.with_name(f"{number}.jpg"))
    fit(tmp_path / "moved", tmp_path / "b", replace(settings, split_of=str(tmp_path / "a"), seed=3, resize="crop"))
    _, (found,) = compare_runs([tmp_path / "a", tmp_path / "b"])
    assert found.as_dict()["n"] == 6
    page = tmp_path / "page.html"
    assert topwork("compare", tmp_path / "a", tmp_path / "b", "--out", page).returncode == 0
    assert page.is_file()


def test_a_run_against_itself_shows_no_clear_difference(runs):
    _, (found,) = compare_runs([runs / "good", runs / "good"])
    assert "No significant difference (p = 1.00)" in found.sentence
    assert found.as_dict()["disagreements"] == []


def test_different_images_are_refused(runs):
    with pytest.raises(UsageError, match="not evaluated on the same images"):
        compare_runs([runs / "good", runs / "other-split"])
    done = topwork("compare", runs / "good", runs / "other-split")
    assert done.returncode == 2
    assert "not evaluated on the same images" in done.stderr


def test_wrong_use_of_compare_is_named(runs, tmp_path):
    with pytest.raises(UsageError, match="at least two runs"):
        compare_runs([runs / "good"])
    with pytest.raises(UsageError, match="no finished run"):
        compare_runs([runs / "good", tmp_path])


@pytest.fixture(scope="module")
def hostile(data, tmp_path_factory):
    """The same images under class names that a page must not run."""
    root = tmp_path_factory.mktemp("hostile")
    shutil.copytree(data / "disc", root / "<script>window.pwned=1<script>")
    shutil.copytree(data / "square", root / '"><img src=x onerror=window.pwned=1>')
    return root


def test_examine_writes_a_page_and_one_json_object(hostile, tmp_path):
    run = tmp_path / "run"
    fit(hostile, run, FitSettings(backbone=SMALL, size=64, near_duplicates=False))
    done = topwork("examine", run, hostile, "--n-images", 24, "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["n"] == 24
    assert {"gray", "swap", "blur", "low_pass", "high_pass", "shuffle", "silhouette", "edges", "no_center", "no_surround",
            "flip", "turn", "jpeg10", "quarter"} <= {effect["name"] for effect in answer["effects"]}  # fmt: skip
    assert any(effect["group"] == "normalization" for effect in answer["effects"])
    page = (run / "examination.html").read_text()
    assert page.count("<script") == 1
    assert "<img src=x" not in page
    assert page.count("data:image/jpeg") >= 4 * len(answer["effects"])


def test_examine_needs_images_of_known_classes(runs, tmp_path):
    draw_folders(tmp_path, n_each=3, shapes=("stripes",))
    done = topwork("examine", runs / "good", tmp_path)
    assert done.returncode == 2
    assert "class of the model" in done.stderr


def test_runs_are_listed_best_first_and_unfinished_ones_last(runs):
    (runs / "stopped").mkdir(exist_ok=True)
    (runs / "stopped" / "settings.json").write_text("{}")
    (runs / "whole").mkdir(exist_ok=True)
    for name in ("settings", "evaluation"):
        (runs / "whole" / f"{name}.json").write_text('{"created": ""}')
    found = list_runs(runs)
    lines = runs_lines(found)[0].splitlines()
    assert [line.split("  ")[-1].strip() for line in lines[-2:]] == ["unfinished", "no held-out images"]
    found["runs"] = [row for row in found["runs"] if row["name"] != "whole"]
    accuracies = [row["accuracy"]["value"] for row in found["runs"] if row["accuracy"]]
    assert accuracies == sorted(accuracies, reverse=True)
    assert {row["name"] for row in found["runs"]} >= {"good", "weak", "other-split"}
    assert found["runs"][-1]["name"] == "stopped"
    assert found["runs"][-1]["part"] is None
    assert found["runs"][0]["name"] in found["best"]


def test_a_folder_without_runs_is_named(tmp_path):
    with pytest.raises(UsageError, match="no runs here"):
        list_runs(tmp_path)
    with pytest.raises(UsageError, match="no such folder"):
        list_runs(tmp_path / "none")
