"""What was understood is printed before anything is decoded; class names are matched by their canonical form."""

from __future__ import annotations

import importlib.util
import json
import unicodedata

import pytest

from drawing import draw_folders
from terminal import topwork
from topwork.commands.evaluate import evaluate
from topwork.commands.fit import fit
from topwork.commands.scan import understood
from topwork.data.manifest import scan
from topwork.data.samples import Rules
from topwork.settings import DataSettings, FitSettings


def test_a_dry_run_says_how_the_data_is_read_and_makes_nothing(tmp_path) -> None:
    draw_folders(tmp_path / "data" / "train", n_each=3)
    draw_folders(tmp_path / "data" / "val", n_each=2, seed=1)
    (tmp_path / "data" / "train" / "disc" / "disc_0.jpg").write_bytes(b"not looked at")
    done = topwork("fit", "data", "--dry-run", "--json", cwd=tmp_path)
    answer = json.loads(done.stdout)
    assert done.returncode == 0
    assert answer["layout"] == "parts"
    assert answer["classes"] == {"disc": 5, "square": 5}
    assert answer["parts"] == {"train": 6, "valid": 4}
    assert answer["examples"][0] == {"path": "train/disc/disc_0.jpg", "label": "disc"}
    out = topwork("fit", "data", "--dry-run", cwd=tmp_path).stdout
    assert "labels from the class folders" in out
    assert "disc_0.jpg → disc" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_texts_beside_images_are_not_counted(tmp_path) -> None:
    draw_folders(tmp_path, n_each=2)
    (tmp_path / "disc" / "boxes.txt").write_text("x")
    assert understood(tmp_path).classes == {"disc": 2, "square": 2}


@pytest.fixture(scope="module")
def two_shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("two")
    draw_folders(root / "data", n_each=2)
    draw_folders(root / "one", n_each=2, shapes=("disc",))
    (root / "run").mkdir()
    (root / "run" / "evaluation.json").write_text("{}")
    (root / "run" / "settings.json").write_text("{}")
    (root / "notes").mkdir()
    (root / "notes" / "diary.txt").write_text("x")
    return root


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("data --multi-label --balance weights", "--balance weights cannot be combined with --multi-label"),
        ("data --epochs 3", "--epochs 3 has no effect without --mode tune"),
        ("data --mode tune --lr fast", "--lr fast: use one number"),
        ("data --augment blur", "blur"),
        ("data --epochs", "--epochs needs a value"),
        ("data --positive cat", "--positive cat: no such class. The classes are disc and square."),
        ("data --positive-recall 0.9", "--positive-recall has no effect without --positive"),
        ("data --backbone resnet1o8", "resnet1o8"),
        ("data --backbone resnet18=no.safetensors", "no.safetensors"),
        ("data --split-of no", "no: no run here"),
        ("data --corrections no.csv", "--corrections no.csv: no such file"),
        ("data --class-names no.txt", "--class-names no.txt"),
        ("data --root elsewhere", "--root elsewhere has no effect"),
        ("data --out run", "run: contains a finished run"),
        ("data --out notes", "notes: contains other files"),
        ("data --bands 3,2", "--bands 3,2: must be three band numbers"),
        ("data --test-fraction 1", "must be at least 0 and below 1"),
        ("one", "only one class: disc"),
        ("nowhere", "nowhere: no such file"),
    ],
)
def test_a_dry_run_checks_what_a_fit_would(arguments, words, two_shapes) -> None:
    done = topwork("fit", *arguments.split(), "--dry-run", cwd=two_shapes)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) <= 2
    assert {path.name for path in two_shapes.iterdir()} == {"data", "one", "run", "notes"}


@pytest.mark.parametrize(
    ("arguments", "package", "install"),
    [
        ("--bands 3,2,1", "tifffile", "'topwork[tiff]'"),
        ("--ray", "ray", "'topwork[cluster]'"),
        ("--zero-shot {} --backbone google/siglip-base-patch16-224", "transformers", "transformers"),
    ],
)
def test_a_dry_run_names_packages_that_are_missing(arguments, package, install, two_shapes, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = topwork("fit", "data", *arguments.split(), "--dry-run", cwd=two_shapes)
    assert done.returncode == 2
    assert f"the package {package} is not installed (pip install {install})" in done.stderr


def test_several_labels_are_counted_each(tmp_path) -> None:
    (tmp_path / "a.csv").write_text("path,label\na.jpg,x|y\nb.jpg,y\n")
    assert understood(tmp_path / "a.csv", DataSettings(multi_label=True)).classes == {"x": 1, "y": 2}


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    """A run on the classes café and thé, and images of another dataset: those classes decomposed, and one more."""
    root = tmp_path_factory.mktemp("forms")
    for name, seed, form in (("train", 0, "NFC"), ("other", 1, "NFD")):
        folder = draw_folders(root / name, n_each=8, shapes=("disc", "square", "cross")[: 2 + seed], seed=seed)
        for shape, label in (("disc", "café"), ("square", "thé")):
            (folder / shape).rename(folder / unicodedata.normalize(form, label))
    settings = FitSettings(backbone="random:test_efficientnet", test_fraction=0.25, near_duplicates=False)
    fit(root / "train", root / "run", settings)
    return root


def test_classes_are_matched_by_their_canonical_form_and_what_is_left_out_is_said(composed) -> None:
    found = evaluate(composed / "run", composed / "other")
    assert found["n"] == 16
    assert found["accuracy"]["value"] > 0.8
    assert found["n_unused"] == 8
    assert "8 of 24 images not evaluated, because the model does not have their class (cross)." in found["notes"]


def test_more_unknown_classes_than_allowed_end_with_status_3(composed) -> None:
    command = ("evaluate", composed / "run", composed / "other", "--json")
    assert topwork(*command).returncode == 3
    assert topwork(*command, "--max-reject-fraction", "0.5").returncode == 0


def test_corrections_are_matched_by_their_canonical_form(composed) -> None:
    path = composed / "corrections.csv"
    path.write_text("path,label\ncafé/disc_0.jpg,thé\n", encoding="cp1252")
    manifest = scan(composed / "other", rules=Rules(corrections=path))
    assert len(manifest.classes) == 3
    assert manifest.counts[unicodedata.normalize("NFD", "thé")] == 9
