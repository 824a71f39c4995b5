"""insights.json: what a run knows beyond its figures, from drawn images through the whole pipeline."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from PIL import Image

from drawing import draw_folders
from topwork.commands.fit import fit
from topwork.evaluation.analysis import advice_of
from topwork.export.predictor import Predictor
from topwork.settings import FitSettings

SHAPES = ("disc", "square", "cross")


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """Three classes; four images carry another class's label, one test image is a copy of a training image."""
    root = draw_folders(tmp_path_factory.mktemp("data"), n_each=40, shapes=SHAPES)
    planted = {
        "disc/disc_3.jpg": "cross",
        "square/square_7.jpg": "disc",
        "cross/cross_11.jpg": "square",
        "disc/disc_30.jpg": "square",
    }
    (root / "disc" / "disc_39.jpg").write_bytes((root / "disc" / "disc_2.jpg").read_bytes())
    with open(root / "table.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split"])
        for path in sorted(root.glob("*/*.jpg"), key=lambda p: (p.parent.name, int(p.stem.split("_")[1]))):
            name = str(path.relative_to(root))
            number = int(path.stem.split("_")[1])
            writer.writerow([name, planted.get(name, path.parent.name), "test" if number >= 28 else "train"])
    return root / "table.csv", planted


@pytest.fixture(scope="module")
def fitted(wrong, tmp_path_factory):
    # Drawn shapes are so alike that near duplicates would be found everywhere.
    return fit(wrong[0], tmp_path_factory.mktemp("runs") / "run", FitSettings(near_duplicates=False))


@pytest.fixture(scope="module")
def insights(fitted):
    return json.loads((fitted.folder / "insights.json").read_text())


def test_planted_labels_lead_the_suspects_in_train_and_test(insights, wrong):
    first = insights["suspects"][:4]
    assert {s["path"] for s in first} == set(wrong[1])
    assert {s["path"]: s["label"] for s in first} == wrong[1]
    assert all(s["suggested"] == s["path"].split("/")[0] for s in first)
    assert 3 <= insights["n_suspects"] <= 6, "confident learning counts about as many as were planted"
    assert insights["n_audited"] == 120


def test_the_leaked_image_is_counted_and_the_score_without_it_given(fitted):
    evaluation = fitted.evaluation
    assert evaluation["leaks"]["test"]["n_leaked"] == len(evaluation["leaks"]["test"]["pairs"]) == 1
    assert evaluation["test_without_leaks"]["n"] == evaluation["test"]["n"] - 1
    provenance = fitted.classifier.provenance
    assert provenance["figures"]["accuracy"] == evaluation["test_without_leaks"]["accuracy"]
    assert "without images that are also in train" in (fitted.folder / "model" / "README.md").read_text()


def test_maps_are_of_the_predicted_and_the_true_class_and_mistakes_come_first(fitted, insights):
    found = insights["explanations"]
    part = fitted.predictions["test"]
    position = {int(row): i for i, row in enumerate(part.sample_indices)}
    kinds = []
    for image in found["images"]:
        i = position[image["row"]]
        assert (image["predicted"], image["label"]) == (part.predicted[i], part.labels[i])
        assert np.shape(image["maps"]) == (2, 7, 7)
        assert image["probability"] == pytest.approx(part.confidence[i])
        assert set(image["nearest"]) <= set(fitted.split.train.tolist())
        kinds.append(bool(part.correct[i]))
    assert kinds == sorted(kinds)
    assert not kinds[0], "the planted test label is a mistake"
    if found["method"] == "activation":
        image = found["images"][0]
        head = fitted.classifier.head
        constant = head.bias - head.bias.mean()
        total = np.sum(image["maps"][0]) + constant[image["predicted"]]
        assert total == pytest.approx(image["logits"][0], abs=0.05)


def test_the_stored_outcomes_are_those_that_predict_gives(fitted, insights, wrong):
    part = insights["decisions"]["parts"]["test"]
    paths = [str(fitted.manifest.root / fitted.manifest.samples[row].path) for row in fitted.split.test]
    outcomes = [answer.outcome for answer in Predictor(fitted.folder).predict(paths)]
    for kind in ("label", "ambiguous", "unknown"):
        assert outcomes.count(kind) == part[f"n_{kind}"] == fitted.evaluation["test"]["outcomes"][kind]
    assert part["n"] == len(paths)


def test_advice_names_the_labels_and_the_leak(insights):
    found = {item.name: item for item in advice_of(insights)}
    assert {"labels", "leaks", "test"} <= set(found)
    assert found["labels"].person_minutes == pytest.approx(insights["n_suspects"] * 5 / 60)


def test_outliers_lead_with_the_odd_one(tmp_path):
    root = draw_folders(tmp_path / "data", n_each=20, shapes=("disc", "square"))
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (96, 96, 3), dtype=np.uint8)).save(root / "disc" / "noise.png")
    run = fit(root, tmp_path / "run", FitSettings(near_duplicates=False))
    found = json.loads((run.folder / "insights.json").read_text())["outliers"]
    assert run.manifest.samples[found[0]["row"]].path.endswith("noise.png")


def test_target_precision_is_stored_met_and_applied(tmp_path):
    root = draw_folders(tmp_path / "data", n_each=40, shapes=SHAPES)
    for path in sorted(root.glob("*/*.jpg")):
        pixels = np.asarray(Image.open(path)).astype(float)
        gray = pixels.mean(2, keepdims=True).repeat(3, 2)
        noise = np.random.default_rng(len(path.name) + int(path.stem.split("_")[1])).normal(0, 70, pixels.shape)
        Image.fromarray(np.clip(gray + noise, 0, 255).astype(np.uint8)).save(path, quality=60)
    run = fit(root, tmp_path / "run", FitSettings(target_precision=0.97, near_duplicates=False))
    stored = run.classifier.thresholds
    assert stored["target_precision"] == 0.97
    assert stored["set_probability"] is None
    labels = np.array(run.manifest.labels)[run.split.train][run.probe.rows]
    logits = run.probe.out_of_fold_logits / run.classifier.temperature
    stated = np.exp(logits - logits.max(1, keepdims=True))
    stated /= stated.sum(1, keepdims=True)
    kept = stated.max(1) >= stored["confidence"]
    if stored["target_precision_met"] != "no":
        assert (stated.argmax(1) == labels)[kept].mean() >= 0.97
    part = json.loads((run.folder / "insights.json").read_text())["decisions"]["parts"]["test"]
    below = run.predictions["test"].confidence < stored["confidence"]
    assert part["n_label"] <= (~below).sum()
    paths = [str(root / run.manifest.samples[row].path) for row in run.split.test]
    answers = Predictor(run.folder).predict(paths)
    assert all(a.outcome != "label" for a in answers if a.probability < stored["confidence"] - 1e-6)
