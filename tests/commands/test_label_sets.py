"""Several labels an image, end to end on drawn images: what is predicted is what was reported, and what cannot be is named."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from drawing import draw
from topwork.commands.compare import compare_runs
from topwork.commands.evaluate import evaluate
from topwork.commands.examine import examine_model
from topwork.commands.fit import fit
from topwork.errors import ModelError, UsageError
from topwork.export.package import export_model
from topwork.export.predictor import Predictor
from topwork.models.classifier import FACTS, facts_digest, load_classifier
from topwork.report.run_page import write_report
from topwork.settings import DataSettings, FitSettings
from topwork.training.selection import select_model

SHAPES = ("disc", "square", "cross")
SETTINGS = FitSettings(backbone="random:test_efficientnet", multi_label=True, near_duplicates=False)


def draw_several(root: Path, n: int) -> list[tuple[str, list[str], str]]:
    """Pictures with none to two of the shapes side by side: (path, labels, part)."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(n):
        chosen = sorted(rng.choice(SHAPES, rng.integers(0, 3), replace=False).tolist())
        canvas = Image.new("RGB", (128, 64), tuple(rng.integers(100, 150, 3).tolist()))
        for place, shape in enumerate(chosen):
            canvas.paste(draw(shape, number, 64), (64 * place, 0))
        canvas.save(root / f"{number}.png")
        rows.append((f"{number}.png", chosen, ("train", "train", "valid", "test")[number % 4]))
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A CSV with labels joined by | , and beside it the same with rows of their own, and the test part alone."""
    root = tmp_path_factory.mktemp("several")
    rows = draw_several(root, 160)
    for name, table in {
        "joined.csv": [(path, "|".join(labels), part) for path, labels, part in rows],
        "rows.csv": [(path, label, part) for path, labels, part in rows for label in labels or [""]],
        "test.csv": [(path, "|".join(labels), part) for path, labels, part in rows if part == "test"],
    }.items():
        with open(root / name, "w", newline="") as file:
            csv.writer(file).writerows([("path", "label", "split"), *table])
    return root


@pytest.fixture(scope="module")
def fitted(data, tmp_path_factory):
    return fit(data / "joined.csv", tmp_path_factory.mktemp("runs") / "run", SETTINGS)


def test_it_learns_something_and_is_not_perfect(fitted) -> None:
    test = fitted.evaluation["test"]
    assert test["n"] == 40
    assert 0.6 < test["mean_average_precision"] <= 1
    assert 0 < test["accuracy"]["value"] < 1
    assert test["accuracy"]["low"] < test["accuracy"]["value"] < test["accuracy"]["high"]
    assert set(test["per_class"]) == set(SHAPES)
    assert all(0 < scores["threshold"] < 1 for scores in test["per_class"].values())


def test_rows_of_their_own_are_the_same_data_and_the_same_run(fitted, data, tmp_path) -> None:
    again = fit(data / "rows.csv", tmp_path / "run", SETTINGS)
    assert again.manifest.digest == fitted.manifest.digest
    assert again.evaluation["test"] == fitted.evaluation["test"]


def test_what_is_predicted_and_evaluated_is_what_was_reported(fitted, data) -> None:
    test = fitted.evaluation["test"]
    with open(data / "test.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    answers = Predictor(fitted.folder).predict([data / row["path"] for row in rows])
    right = [answer.label == row["label"] for answer, row in zip(answers, rows, strict=True)]
    assert np.mean(right) == test["accuracy"]["value"]
    assert {answer.outcome for answer in answers} <= {"label", "unknown"}  # none of the labels is an answer here
    assert all(len(answer.top) == 3 for answer in answers)
    judged = evaluate(fitted.folder, data / "test.csv", DataSettings())
    assert {key: judged[key] for key in test} == test
    table = pq.read_table(fitted.folder / "predictions.parquet").to_pylist()
    of_test = {row["path"]: row for row in table if row["part"] == "test"}
    assert [of_test[row["path"]]["predicted"] for row in rows] == [answer.label for answer in answers]
    assert sum(row["correct"] for row in of_test.values()) == sum(right)


def test_labels_the_model_does_not_know_and_labels_without_images_are_said(fitted, data, tmp_path) -> None:
    (tmp_path / "few.csv").write_text("path,label\n0.png,disc|kite\n1.png,disc\n2.png,\n")
    judged = evaluate(fitted.folder, tmp_path / "few.csv", DataSettings(root=str(data)))
    assert judged["n"] == 3
    assert judged["per_class"]["cross"]["f1"] is None
    notes = " ".join(judged["notes"])
    assert "does not have" in notes
    assert "kite" in notes
    assert "without images here" in notes


def test_the_reports_name_every_label_and_load_nothing(fitted) -> None:
    page = write_report(fitted.folder).read_text()
    assert "Exact match" in page
    assert all(page.count(f">{shape}<") >= 3 for shape in SHAPES)
    assert "Confusion matrix" not in page
    text = write_report(fitted.folder, "md").read_text()
    assert "Mean average precision" in text
    assert json.loads(write_report(fitted.folder, "json").read_text())["evaluation"]["test"]["multi_label"] is True


@pytest.mark.parametrize(
    ("to", "name"),
    [("onnx", "model.onnx"), ("openvino", "model.xml"), pytest.param("pt2", "model.pt2", marks=pytest.mark.slow)],
)
def test_an_export_gives_the_same_sets(to, name, fitted, data, tmp_path) -> None:
    package = export_model(fitted.folder, to, tmp_path / name, [str(data / f"{n}.png") for n in range(24)])
    assert (package.certificate.n_compared, package.certificate.n_same) == (24, 24)
    assert package.certificate.graph_difference < 1e-4
    assert '"thresholds"' in package.script.read_text().replace('\\"', '"')


def test_a_copy_of_a_training_image_in_test_is_named_with_the_clean_figures(data, tmp_path) -> None:
    lines = (data / "joined.csv").read_text().splitlines()
    picture = (data / "0.png").read_bytes()
    (tmp_path / "copy.png").write_bytes(picture)
    label = lines[1].split(",")[1]
    table = [line if n == 0 else f"{data}/{line}" for n, line in enumerate(lines)]
    (tmp_path / "leak.csv").write_text("\n".join([*table, f"{tmp_path}/copy.png,{label},test"]) + "\n")
    evaluation = fit(tmp_path / "leak.csv", tmp_path / "run", SETTINGS).evaluation
    n_leaked = evaluation["leaks"]["test"]["n_leaked"]
    assert n_leaked >= 1
    assert evaluation["test_without_leaks"]["n"] == evaluation["test"]["n"] - n_leaked


@pytest.mark.parametrize("mode", ["tune", pytest.param("auto", marks=pytest.mark.slow)])
def test_a_tuned_network_answers_as_it_was_judged(mode, data, tmp_path) -> None:
    settings = replace(SETTINGS, mode=mode, size=64, epochs=2, batch_size=8, lr="1e-3", strategy="last")
    tuned = fit(data / "joined.csv", tmp_path / "run", settings)
    assert tuned.evaluation["n_parameters"] > tuned.evaluation["n_trainable"] > 0
    assert "validation images, exact match of the probe and the tuned network is" in " ".join(tuned.recipe["words"])
    assert tuned.recipe["multi_label"]
    if tuned.recipe["mode"] == "tune":
        assert tuned.recipe["tuning"]["outputs"] == "multilabel"
        assert tuned.recipe["temperature_fitted_on"] == "valid"
        history = map(json.loads, (tmp_path / "run" / "history.jsonl").read_text().splitlines())
        assert [record["epoch"] for record in history if "epoch" in record] == [1, 2]
    rows = [row for row in pq.read_table(tmp_path / "run" / "predictions.parquet").to_pylist() if row["part"] == "test"]
    answers = Predictor(tmp_path / "run").predict([data / row["path"] for row in rows])
    assert [answer.label for answer in answers] == [row["predicted"] for row in rows]
    assert (
        evaluate(tmp_path / "run", data / "test.csv", DataSettings())["accuracy"]
        == tuned.evaluation["test"]["accuracy"]
    )


def test_the_verdict_counts_every_label() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random((60, 3)) < 0.4
    good = np.where(truth, 3.0, -3.0) + rng.standard_normal(truth.shape)
    poor = np.where(truth, 0.5, -0.5) + rng.standard_normal(truth.shape)
    for before, after, asked_for, keeps in [
        (poor, good, False, True),
        (good, poor, False, False),
        (good, poor, True, False),
    ]:
        assert select_model(before, after, truth, asked_for=asked_for).keeps_tuned == keeps
    assert (
        "exact match of the probe and the tuned network is" in select_model(poor, good, truth, asked_for=True).message
    )


@pytest.mark.parametrize("options", [{"balance": "weights"}, {"target_precision": 0.9}])
def test_settings_for_one_label_are_refused_by_name(options, data, tmp_path) -> None:
    option = next(iter(options)).replace("_", "-")
    with pytest.raises(UsageError, match=f"--{option} .*cannot be combined with --multi-label"):
        fit(data / "joined.csv", tmp_path / "run", replace(SETTINGS, **options))
    assert not (tmp_path / "run").exists()


def test_data_with_nothing_to_learn_are_named(data, tmp_path) -> None:
    (tmp_path / "same.csv").write_text("path,label\n0.png,a|b\n1.png,b|a\n2.png,a|b\n3.png,a|b\n")
    with pytest.raises(UsageError, match="every training image has the same labels"):
        fit(tmp_path / "same.csv", tmp_path / "run", replace(SETTINGS, root=str(data)))
    (tmp_path / "none.csv").write_text("path,label\n0.png,\n1.png,\n")
    with pytest.raises(UsageError, match="none of 2 images has a label"):
        fit(tmp_path / "none.csv", tmp_path / "run", replace(SETTINGS, root=str(data)))


def test_verbs_that_need_one_label_say_so(fitted, data) -> None:
    with pytest.raises(UsageError, match="several labels"):
        examine_model(fitted.folder, data / "test.csv")
    with pytest.raises(UsageError, match="several labels"):
        load_classifier(fitted.folder)


def test_runs_with_several_labels_are_compared_image_by_image(fitted, data, tmp_path) -> None:
    other = fit(data / "joined.csv", tmp_path / "other", replace(SETTINGS, seed=1, size=32))
    part, (found,) = compare_runs([fitted.folder, other.folder])
    assert part == "test"
    assert found.comparison.accuracy_first == fitted.evaluation["test"]["accuracy"]["value"]
    assert found.comparison.accuracy_second == other.evaluation["test"]["accuracy"]["value"]
    assert set(found.comparison.per_class) == set(SHAPES)
    answers = fitted.predictions["test"].answers, other.predictions["test"].answers
    assert len(found.disagreements()) == sum(a != b for a, b in zip(*answers, strict=True))
    json.dumps(found.as_dict(), allow_nan=False)


@pytest.mark.parametrize("limits", [None, [0.5], [0.5, 0.5, "x"], [0.5, 0.5, 7.0]])
def test_thresholds_that_do_not_fit_are_refused(limits, fitted, tmp_path) -> None:
    import shutil

    folder = shutil.copytree(fitted.folder / "model", tmp_path / "model")
    facts = json.loads((folder / FACTS).read_text())
    facts["thresholds"]["labels"] = limits
    facts["digest"] = facts_digest(facts)
    (folder / FACTS).write_text(json.dumps(facts))
    with pytest.raises(ModelError, match=r"thresholds\.labels|labels do not match their thresholds"):
        Predictor(folder)
