"""add-class: new rows, old ones untouched, old images not read again."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from drawing import draw_folders
from terminal import topwork
from topwork.commands.add_class import _NewRows, add_class, grow_head
from topwork.commands.fit import fit
from topwork.errors import UsageError
from topwork.export.predictor import Predictor
from topwork.models.classifier import load_classifier
from topwork.models.head import FeatureTransform, LinearHead
from topwork.settings import FitSettings

SETTINGS = FitSettings(backbone="random:test_efficientnet", near_duplicates=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("growing")
    data = draw_folders(root / "data", n_each=20, shapes=("disc", "square"))
    draw_folders(root / "more", n_each=20, shapes=("cross", "stripes"), seed=31)  # no other test draws these
    return fit(data, root / "run", SETTINGS).folder


# ---- the head


def test_new_rows_minimize_the_cross_entropy_over_all_classes():
    """Against another optimizer, on the loss as it is defined."""
    from scipy.optimize import minimize

    rng = np.random.default_rng(1)
    x, old_logits, labels = rng.normal(size=(60, 3)).astype(np.float32), rng.normal(size=(60, 2)), np.arange(60) % 4
    x = np.float32(x + np.eye(4, 3)[labels]) - x.mean(0)
    x -= x.mean(0)
    problem = _NewRows(
        x, np.maximum(labels - 1, 0), np.logaddexp.reduce(old_logits, 1).astype(np.float32), 2, np.ones((1, 60))
    )
    problem.solve(0.01, 1e-9)
    weights, biases = problem.solution()

    def full(flat):
        rows = flat.reshape(2, 4)
        logits = np.concatenate([old_logits, x @ rows[:, :-1].T + rows[:, -1]], 1)
        cross_entropy = (np.log(np.exp(logits).sum(1)) - logits[np.arange(60), labels]).mean()
        return cross_entropy + 0.005 * (rows[:, :-1] ** 2).sum()

    found = np.concatenate([weights[0, 1:], biases[0, 1:, None]], axis=1)
    assert full(found.ravel()) == pytest.approx(minimize(full, np.zeros(8)).fun, abs=1e-5)


def test_a_new_class_is_learned_and_old_rows_stay():
    rng = np.random.default_rng(2)
    centers = np.eye(3, 6) * 6
    labels = np.repeat([0, 1, 2], 40)
    columns = (centers[labels] + rng.normal(size=(120, 6))).astype(np.float32)
    transform = FeatureTransform(("last",), "none", np.zeros(6, np.float32), np.ones(6, np.float32))
    head = LinearHead(transform, centers[:2].astype(np.float32), np.zeros(2, np.float32))
    grown = grow_head(head, columns, labels, 1)
    np.testing.assert_array_equal(grown.head.weight[:2], head.weight)
    np.testing.assert_array_equal(grown.head.bias[:2], head.bias)
    assert (grown.head.logits({"last": columns}).argmax(1) == labels).mean() > 0.98
    assert grown.penalty in grown.cross_entropy


# ---- the run


def test_old_rows_and_parts_stay_and_nothing_old_is_embedded(run, tmp_path):
    grown = add_class(run, run.parent / "more", tmp_path / "grown")
    old, new = load_classifier(run), load_classifier(grown.folder)
    assert set(grown.added) == {"cross", "stripes"}
    assert new.classes == ("cross", "disc", "square", "stripes"), "natural order"
    for name in old.classes:
        before, after = old.classes.index(name), new.classes.index(name)
        np.testing.assert_array_equal(old.head.weight[before], new.head.weight[after])
        assert old.head.bias[before] == new.head.bias[after]
    assert grown.evaluation["timing"]["n_embedded"] == 40, "the new images only"
    parts = [json.loads((folder / "split.json").read_text())["parts"] for folder in (run, grown.folder)]
    for name, items in parts[0].items():
        kept = {item["content_hash"] for item in parts[1][name]}
        assert {item["content_hash"] for item in items} <= kept
    assert grown.before is not None
    assert grown.after is not None
    assert grown.evaluation["old_classes"]["accuracy_before"] == grown.before


def test_what_is_reported_is_what_the_grown_model_answers(run, tmp_path):
    grown = add_class(run, run.parent / "more", tmp_path / "grown")
    items = json.loads((grown.folder / "split.json").read_text())["parts"]["test"]
    answers = Predictor(grown.folder).predict([run.parent / item["path"] for item in items])
    right = np.mean([answer.label == item["path"].split("/")[-2] for answer, item in zip(answers, items, strict=True)])
    assert right == grown.evaluation["test"]["accuracy"]["value"]


def test_a_folder_of_images_is_one_class_and_the_command_prints_before_and_after(run, tmp_path):
    new, out = run.parent / "more" / "cross", tmp_path / "a"
    done = topwork("add-class", run, new, "--out", out, "--name", "plus sign")
    assert done.returncode == 0, done.stderr
    assert "Added plus sign." in done.stdout
    assert "before" in done.stdout
    assert "after" in done.stdout
    assert (tmp_path / "a" / "report.html").exists()
    again = add_class(tmp_path / "a", run.parent / "more" / "stripes", tmp_path / "b")
    assert load_classifier(again.folder).classes == ("disc", "plus sign", "square", "stripes")


def test_classes_that_are_known_are_refused(run, tmp_path):
    with pytest.raises(UsageError, match="already has the class disc"):
        add_class(run, run.parent / "data", tmp_path / "grown")
    assert not (tmp_path / "grown" / "model").exists()


def test_an_image_under_another_class_is_refused(run, tmp_path):
    (tmp_path / "ring").mkdir()
    shutil.copy(next((run.parent / "data" / "disc").iterdir()), tmp_path / "ring" / "x.jpg")
    with pytest.raises(UsageError, match=r"x\.jpg: this image is in the run already"):
        add_class(run, tmp_path / "ring", tmp_path / "grown")


def test_a_model_folder_alone_is_not_enough(run, tmp_path):
    shutil.copytree(run / "model", tmp_path / "model")
    with pytest.raises(UsageError, match="needs a run directory"):
        add_class(tmp_path / "model", run.parent / "more", tmp_path / "grown")


def test_images_that_were_moved_after_training_are_named(run, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(run.parent / "data", moved)
    old = fit(moved, tmp_path / "run", SETTINGS).folder
    moved.rename(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="moved: the images of the run are no longer there"):
        add_class(old, run.parent / "more", tmp_path / "out")


def test_a_class_under_another_unicode_form_is_known(run, tmp_path):
    data, more = tmp_path / "data", tmp_path / "more"
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    shutil.copytree(run.parent / "data" / "disc", data / composed)
    shutil.copytree(run.parent / "data" / "square", data / "square")
    shutil.copytree(run.parent / "more" / "cross", more / decomposed)
    old = fit(data, tmp_path / "run", SETTINGS).folder
    with pytest.raises(UsageError, match="already has the class"):
        add_class(old, more, tmp_path / "out")
