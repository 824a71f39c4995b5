"""insights.json: what a run knows beyond its figures, from drawn images through the whole pipeline."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict

from drawing import draw_folders
from topwork.commands.fit import fit
from topwork.evaluation.analysis import advice_of, outliers, suspected_labels
from topwork.export.predictor import Predictor
from topwork.settings import FitSettings

SHAPES = ("disc", "square", "cross")
SETTINGS = FitSettings(backbone="random:test_efficientnet", near_duplicates=False)  # drawn shapes are alike


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
    return fit(wrong[0], tmp_path_factory.mktemp("runs") / "run", SETTINGS)


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
        assert np.shape(image["maps"]) == (2, 5, 5)
        assert image["probability"] == pytest.approx(part.confidence[i])
        assert set(image["nearest"]) <= set(fitted.split.train.tolist())
        kinds.append(bool(part.correct[i]))
    assert kinds == sorted(kinds)
    assert not kinds[0], "the planted test label is a mistake"
    if found["method"] == "activation":
        image = found["images"][0]
        head = fitted.classifier.head
        constant = head.bias - head.weight / head.transform.scale @ head.transform.mean
        constant = constant - constant.mean()
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
    Image.new("RGB", (96, 96)).save(root / "disc" / "black.png")
    run = fit(root, tmp_path / "run", SETTINGS)
    found = json.loads((run.folder / "insights.json").read_text())["outliers"]
    assert run.manifest.samples[found[0]["row"]].path.endswith("black.png")


def test_target_precision_is_stored_met_and_applied(tmp_path):
    root = draw_folders(tmp_path / "data", n_each=40, shapes=SHAPES)
    for path in sorted(root.glob("*/*.jpg")):
        pixels = np.asarray(Image.open(path)).astype(float)
        gray = pixels.mean(2, keepdims=True).repeat(3, 2)
        noise = np.random.default_rng(len(path.name) + int(path.stem.split("_")[1])).normal(0, 70, pixels.shape)
        Image.fromarray(np.clip(gray + noise, 0, 255).astype(np.uint8)).save(path, quality=60)
    run = fit(root, tmp_path / "run", replace(SETTINGS, target_precision=0.97))
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


# ---- label errors and outliers, from arrays


def test_four_images_known_by_thought():
    # usual probabilities: class 0 mean(0.9, 0.8, 0.1) = 0.6, class 1 0.7
    stated = np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.3, 0.7]])
    found = suspected_labels(stated, [0, 0, 0, 1], np.eye(4), n_neighbors=0)
    assert [s.position for s in found] == [2]
    s = found[0]
    assert (s.label, s.suggested, s.is_confident) == (0, 1, True)
    assert s.score == pytest.approx((0.9 - 0.7) - (0.1 - 0.6))
    assert (s.label_probability, s.suggested_probability) == (0.1, 0.9)
    assert (s.neighbors, s.neighbor_agreement) == ((), None)
    assert [s.position for s in suspected_labels(stated, [0, 0, 0, 1], np.eye(4), least=9)] == [2, 3, 1, 0]


def test_neighbors_are_the_evidence():
    stated = np.array([[0.9, 0.1], [0.8, 0.2], [0.2, 0.8], [0.1, 0.9], [0.9, 0.1]])
    features = np.array([[1, 0], [1, 0.1], [0.1, 1], [0, 1], [1, 0.02]])
    found = suspected_labels(stated, [0, 0, 1, 1, 1], features, most=1, n_neighbors=2)[0]
    assert found.position == 4
    assert found.neighbors == (0, 1)
    assert found.neighbor_agreement == 0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_label_errors_are_found(seed):
    rng = np.random.default_rng(seed)
    n, n_classes = 600, 8
    true = np.arange(n) % n_classes
    features = rng.normal(size=(n_classes, 30))[true] + 0.9 * rng.normal(size=(n, 30))
    planted = rng.choice(n, n // 20, replace=False)
    labels = true.copy()
    labels[planted] = (true[planted] + rng.integers(1, n_classes, len(planted))) % n_classes
    stated = cross_val_predict(LogisticRegression(C=0.1), features, labels, cv=5, method="predict_proba")
    first = suspected_labels(stated, labels, features, least=round(0.07 * n), most=round(0.07 * n))
    found = {s.position for s in first} & set(planted.tolist())
    assert len(found) >= 0.8 * len(planted)
    right = [s.suggested == true[s.position] for s in first if s.position in found]
    assert np.mean(right) > 0.9
    # as many as confident learning counts: of the order of the number planted
    assert 0.4 * len(planted) < len(suspected_labels(stated, labels, features)) < 2 * len(planted)


def test_nobody_is_suspected_where_there_is_nothing_to_suspect():
    assert suspected_labels(np.empty((0, 3)), [], np.empty((0, 2))) == ()
    assert suspected_labels([[1.0], [1.0]], [0, 0], np.eye(2)) == ()
    # one class labeled only: nothing is known of the other
    assert [s.is_confident for s in suspected_labels([[0.1, 0.9], [0.2, 0.8]], [0, 0], np.eye(2), least=5)] == [
        False,
        False,
    ]


def test_outliers_known_by_thought():
    features = np.array([[1, 0, 0], [1, 0.1, 0], [1, 0, 0.1], [0.9, 0.1, 0], [0, 0, 1.0]])
    found = outliers(features, 2, n_neighbors=2)
    assert found[0].position == 4
    assert found[0].neighbors[0] == 2
    assert found[0].distance > 0.9 > 0.1 > found[1].distance


def test_outliers_of_few_or_damaged_images():
    assert outliers(np.empty((0, 3)), 5) == ()
    assert outliers(np.ones((1, 3)), 5) == ()
    assert {o.position for o in outliers([[1.0, 0], [0, 1], [np.nan, 1]], 5)} == {0, 1}


def test_outliers_of_many_images_use_a_sample():
    rng = np.random.default_rng(0)
    features = np.abs(rng.normal(1, 0.1, (6000, 16)))
    features[17] = np.eye(16)[3]
    assert outliers(features, 1)[0].position == 17
