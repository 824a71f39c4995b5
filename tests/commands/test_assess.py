"""The positive class of two: its threshold is stored in the model, and every way of asking gives the same answer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from topwork.commands.assess import check_labels
from topwork.commands.evaluate import evaluate
from topwork.commands.fit import fit
from topwork.errors import UsageError
from topwork.export.package import export_model
from topwork.export.predictor import Predictor
from topwork.models.classifier import load_classifier
from topwork.settings import FitSettings

SETTINGS = FitSettings(backbone="random:test_efficientnet", size=32, positive="crack", near_duplicates=False)


@pytest.fixture(scope="module")
def cells(tmp_path_factory) -> Path:
    """Cells with a crack (one row a little darker) and without, hard to tell apart."""
    root, rng = tmp_path_factory.mktemp("cells"), np.random.default_rng(0)
    for label in ("crack", "good"):
        (root / label).mkdir()
        for number in range(60):
            pixels = rng.normal(120, 30, (32, 32, 3))
            pixels[12:18] -= 35 if label == "crack" else 0
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / label / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def run(cells, tmp_path_factory):
    return fit(cells, tmp_path_factory.mktemp("runs") / "run", replace(SETTINGS, positive_recall=0.9))


def test_a_wanted_recall_sets_the_threshold_of_the_positive_class(run) -> None:
    rule = load_classifier(run.folder).thresholds["positive"]
    assert rule["class"] == "crack"
    assert rule["by"] == "recall of at least 90.0%"
    test = run.evaluation["test"]
    assert test["positive"]["threshold"] == rule["threshold"]
    assert test["positive"]["recall"] == test["per_class"]["crack"]["recall"]
    wrong = test["confusion"][1][0] / sum(test["confusion"][1])
    assert test["positive"]["false_positive_rate"] == wrong
    assert test["outcomes"]["ambiguous"] == 0


def test_predicted_is_reported_and_exported(run, cells, tmp_path) -> None:
    part = run.predictions["test"]
    paths = [cells / run.manifest.samples[row].path for row in part.sample_indices.tolist()]
    answers = Predictor(run.folder).predict(paths)
    assert [answer.label for answer in answers] == part.answers
    threshold = run.evaluation["test"]["positive"]["threshold"]
    assert [dict(answer.top)["crack"] >= threshold for answer in answers] == [a == "crack" for a in part.answers]
    evaluated = evaluate(run.folder, cells)
    assert evaluated["positive"]["threshold"] == threshold
    package = export_model(run.folder, "onnx", tmp_path / "model.onnx", [str(path) for path in paths])
    assert package.certificate.n_same == package.certificate.n_compared == len(paths)


def test_the_report_and_the_stored_run_use_the_threshold(run) -> None:
    from topwork.report.run_page import write_report
    from topwork.run import load_run

    page = write_report(run.folder).read_text()
    assert "Thresholds for “crack”" in page
    assert "“crack” is predicted if its probability is at least" in page
    assert load_run(run.folder).predictions["test"].answers == run.predictions["test"].answers


def test_cost_sets_the_threshold(cells, tmp_path) -> None:
    made = fit(cells, tmp_path / "run", replace(SETTINGS, miss_cost=4.0))
    assert made.classifier.thresholds["positive"]["threshold"] == pytest.approx(0.2)
    assert not (made.folder / "model" / "config.json").exists(), "timm would answer with the most probable class"
    json.dumps(made.evaluation, allow_nan=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"positive": None, "miss_cost": 2.0}, "--miss-cost has no effect without --positive"),
        ({"miss_cost": 2.0, "positive_recall": 0.9}, "use one of them"),
        ({"target_precision": 0.9}, "use one of them"),
        ({"multi_label": True}, "--positive crack cannot be combined with --multi-label"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, words) -> None:
    with pytest.raises(UsageError, match=words):
        check_labels(replace(SETTINGS, **options))


def test_a_class_that_is_not_there_is_named(cells, tmp_path) -> None:
    with pytest.raises(UsageError, match="--positive dent: no such class"):
        fit(cells, tmp_path / "run", replace(SETTINGS, positive="dent"))
