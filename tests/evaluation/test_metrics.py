import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from topwork.evaluation.metrics import LARGEST_DENSE_CONFUSION, METRICS, evaluate_part, metrics_of
from topwork.evaluation.predictions import Predictions, Task

PART_KEYS = {
    "n", "n_unknown_class", "accuracy", "balanced_accuracy", "top5_accuracy", "cross_entropy", "ece", "macro_f1",
    "per_class", "per_class_intervals", "confusion", "classes", "intervals",
}  # fmt: skip


def answers(labels, predicted, n_classes, logit=2.0):
    """Predictions that answer ``predicted`` with one logit above the others."""
    logits = np.zeros((len(labels), n_classes))
    logits[np.arange(len(labels)), predicted] = logit
    names = tuple("abcdefghij"[:n_classes]) if n_classes <= 10 else tuple(f"c{i}" for i in range(n_classes))
    return Predictions(names, np.arange(len(labels)), np.asarray(labels, dtype=int), logits)


def drawn(n, n_classes, seed=0, noise=1.0, unknown=0.0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n_classes, n)
    logits = rng.normal(size=(n, n_classes)) * noise
    logits[np.arange(n), labels] += 2
    labels[rng.random(n) < unknown] = -1
    return Predictions(tuple(f"c{i}" for i in range(n_classes)), np.arange(n), labels, logits)


def test_four_images_known_by_thought():
    part = evaluate_part(answers([0, 0, 0, 1], [0, 0, 1, 1], 3), {"a": 7, "b": 9})
    assert part["n"] == 4
    assert part["accuracy"]["value"] == 0.75
    # Wilson for 3 of 4, R: prop.test(3, 4, correct = FALSE)
    assert part["accuracy"]["low"] == pytest.approx(0.3006418, abs=1e-6)
    assert part["accuracy"]["high"] == pytest.approx(0.9544127, abs=1e-6)
    assert part["balanced_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert part["macro_f1"] == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert part["confusion"] == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert part["classes"] == ["a", "b", "c"]
    assert part["per_class"]["a"] == {"n_train": 7, "n": 3, "precision": 1.0, "recall": 2 / 3, "f1": 0.8}
    assert part["per_class"]["b"] == {"n_train": 9, "n": 1, "precision": 0.5, "recall": 1.0, "f1": 2 / 3}
    assert part["per_class"]["c"] == {"n_train": 0, "n": 0, "precision": None, "recall": None, "f1": None}
    assert set(part["per_class_intervals"]["c"]) == set()
    recall = part["per_class_intervals"]["a"]["recall"]  # R: prop.test(2, 3, correct = FALSE)
    assert (recall["low"], recall["high"]) == pytest.approx((0.2076596, 0.9385081), abs=1e-6)
    stated = np.exp(2) / (np.exp(2) + 2)
    loss = -np.log([stated, stated, (1 - stated) / 2, stated]).mean()
    assert part["cross_entropy"] == pytest.approx(loss)
    assert part["ece"] == pytest.approx(abs(stated - 0.75))
    assert part["top5_accuracy"] == 1.0
    assert set(part) == PART_KEYS


def test_roc_auc_only_for_two_classes():
    two = evaluate_part(drawn(60, 2))
    assert set(two) == PART_KEYS | {"roc_auc", "average_precision"}
    assert set(two["intervals"]) == {
        "balanced_accuracy", "top5_accuracy", "macro_f1", "ece", "cross_entropy", "roc_auc", "average_precision",
    }  # fmt: skip
    p = drawn(60, 2)
    assert two["average_precision"] == pytest.approx(
        sk.average_precision_score(p.labels == 1, p.logits[:, 1] - p.logits[:, 0])
    )
    assert two["intervals"]["roc_auc"]["low"] < two["roc_auc"] < two["intervals"]["roc_auc"]["high"]


def test_auc_of_saturated_probabilities_still_sees_the_order():
    p = Predictions(("a", "b"), np.arange(3), np.array([0, 1, 1]), np.array([[0, 50.0], [0, 60.0], [0, 70.0]]))
    assert (p.probabilities[:, 1] == p.probabilities[2, 1]).sum() > 1  # the probabilities do tie
    assert evaluate_part(p)["roc_auc"] == 1.0


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(2, 8), st.integers(0, 10**6))
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::sklearn.exceptions.UndefinedMetricWarning")
def test_equal_to_scikit_learn(n, n_classes, seed):
    p = drawn(n, n_classes, seed)
    part = evaluate_part(p, n_resamples=0)
    present = np.unique(p.labels)
    assert part["accuracy"]["value"] == pytest.approx(sk.accuracy_score(p.labels, p.predicted))
    recall = sk.recall_score(p.labels, p.predicted, labels=present, average="macro", zero_division=0)
    assert part["balanced_accuracy"] == pytest.approx(recall)
    f1 = sk.f1_score(p.labels, p.predicted, labels=present, average="macro", zero_division=0)
    assert part["macro_f1"] == pytest.approx(f1)
    np.testing.assert_array_equal(
        part["confusion"], sk.confusion_matrix(p.labels, p.predicted, labels=np.arange(n_classes))
    )
    assert part["cross_entropy"] == pytest.approx(sk.log_loss(p.labels, p.probabilities, labels=np.arange(n_classes)))
    if n_classes > 5:
        top = sk.top_k_accuracy_score(p.labels, p.logits, k=5, labels=np.arange(n_classes))
        assert part["top5_accuracy"] == pytest.approx(top)
    if n_classes == 2 and len(present) == 2:
        assert part["roc_auc"] == pytest.approx(sk.roc_auc_score(p.labels, p.probabilities[:, 1]))
    precision, recalls, f1s, _ = sk.precision_recall_fscore_support(
        p.labels, p.predicted, labels=np.arange(n_classes), zero_division=0
    )
    for i, scores in enumerate(part["per_class"].values()):
        for key, theirs in (("precision", precision[i]), ("recall", recalls[i]), ("f1", f1s[i])):
            assert scores[key] is None or scores[key] == pytest.approx(theirs)
    if len(present) == n_classes:
        assert part["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(p.labels, p.predicted))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 40), st.integers(1, 9), st.integers(0, 10**6), st.floats(0, 1))
def test_every_part_is_valid_json_and_inside_its_intervals(n, n_classes, seed, unknown):
    p = drawn(n, n_classes, seed, unknown=unknown)
    part = evaluate_part(p, n_resamples=50)
    json.dumps(part, allow_nan=False)
    assert part["n"] + part["n_unknown_class"] == n
    assert np.sum(part["confusion"]) == part["n"]
    for name, interval in part["intervals"].items():
        value = part["roc_auc"] if name == "roc_auc" else part[name]
        assert 0 <= interval["low"] <= value <= interval["high"]
        assert name == "cross_entropy" or interval["high"] <= 1
    if part["n"]:
        assert part["accuracy"]["low"] <= part["accuracy"]["value"] <= part["accuracy"]["high"]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(2, 6), st.integers(0, 10**6), st.randoms(use_true_random=False))
def test_neither_the_order_of_images_nor_that_of_classes_matters(n, n_classes, seed, random):
    p = drawn(n, n_classes, seed)
    images, classes = random.sample(range(n), n), np.array(random.sample(range(n_classes), n_classes))
    new_label = np.argsort(classes)
    q = Predictions(
        tuple(p.classes[c] for c in classes),
        p.sample_indices[images],
        new_label[p.labels[images]],
        p.logits[images][:, classes],
    )
    a, b = evaluate_part(p, n_resamples=0), evaluate_part(q, n_resamples=0)
    for name in ("accuracy", "balanced_accuracy", "top5_accuracy", "cross_entropy", "ece", "macro_f1"):
        assert a[name] == pytest.approx(b[name])
    assert a["per_class"] == b["per_class"]
    for name, interval in a["intervals"].items():
        if name not in ("roc_auc", "average_precision"):  # they are about the second class
            assert interval == pytest.approx(b["intervals"][name])


def test_no_image_at_all():
    part = evaluate_part(answers([], np.empty(0, int), 3))
    json.dumps(part, allow_nan=False)
    assert part["n"] == 0
    assert part["accuracy"] == {"value": None, "low": None, "high": None}
    assert part["balanced_accuracy"] is None
    assert part["ece"] is None
    assert part["intervals"] == {}


def test_images_of_unknown_class_are_counted_and_left_out():
    with_unknown = evaluate_part(answers([0, 1, -1, -1], [0, 0, 1, 0], 2))
    without = evaluate_part(answers([0, 1], [0, 0], 2))
    assert with_unknown == without | {"n_unknown_class": 2}


def test_one_image():
    part = evaluate_part(answers([1], [1], 2))
    assert [part[key] for key in ("balanced_accuracy", "macro_f1", "roc_auc")] == [1.0, 1.0, None]
    assert part["accuracy"]["value"] == 1.0
    assert part["intervals"]["balanced_accuracy"]["low"] < 0.5
    assert not {"cross_entropy", "ece"} & set(part["intervals"])


def test_one_class_present():
    part = evaluate_part(answers([2, 2, 2, 2], [2, 2, 0, 2], 4))
    assert part["accuracy"]["value"] == part["balanced_accuracy"] == 0.75
    assert part["per_class"]["a"]["precision"] == 0.0
    assert part["per_class"]["a"]["recall"] is None


def test_a_perfect_part_is_not_known_to_be_perfect():
    part = evaluate_part(answers(np.tile(np.arange(5), 20), np.tile(np.arange(5), 20), 5))
    for name in ("balanced_accuracy", "macro_f1"):
        interval = part["intervals"][name]
        assert 0.94 < interval["low"] < 0.98
        assert interval["high"] == 1.0


def test_a_thousand_classes():
    p = drawn(10_000, 1_000)
    part = evaluate_part(p)
    assert np.shape(part["confusion"]) == (1000, 1000)
    assert part["accuracy"]["value"] == p.correct.mean()
    interval = part["intervals"]["balanced_accuracy"]
    assert interval["low"] < part["balanced_accuracy"] < interval["high"]
    json.dumps(part, allow_nan=False)


def test_very_many_classes_keep_the_cells_only():
    n_classes = LARGEST_DENSE_CONFUSION + 1
    part = evaluate_part(answers([0, 0, 7, 7], [0, 5, 7, 7], n_classes))
    assert part["confusion"] is None
    assert part["confusion_cells"] == [[0, 0, 1], [0, 5, 1], [7, 7, 2]]


def test_metrics_shown_follow_from_the_table():
    assert [m.key for m in metrics_of(evaluate_part(drawn(60, 2)))] == [
        "accuracy", "balanced_accuracy", "macro_f1", "roc_auc", "average_precision", "ece", "cross_entropy",
    ]  # fmt: skip
    assert "top5_accuracy" in [m.key for m in metrics_of(evaluate_part(drawn(60, 6)))]
    assert len({(m.key, m.title) for m in METRICS}) == len(METRICS)


def test_metrics_read_well():
    part = evaluate_part(drawn(60, 2, seed=1))
    texts = {m.key: m.text_ci(part) for m in metrics_of(part)}
    assert texts["accuracy"] == "95.0% (95% CI 86.3–98.3)"
    assert texts["roc_auc"].startswith("0.9")
    assert "(95% CI 0." in texts["roc_auc"]


# ---- several labels per image


def several(labels, probabilities, classes=None, thresholds=None):
    stated = np.clip(np.asarray(probabilities, float), 1e-9, 1 - 1e-9)
    classes = classes or tuple(f"c{i}" for i in range(stated.shape[1]))
    limits = np.full(stated.shape[1], 0.5) if thresholds is None else np.asarray(thresholds)
    logits = np.log(stated / (1 - stated))
    return Predictions(classes, np.arange(len(stated)), labels, logits, Task("sigmoid", limits))


def test_three_images_with_several_labels_known_by_thought():
    part = evaluate_part(several([[1, 0], [1, 1], [0, 0]], [[0.9, 0.6], [0.4, 0.7], [0.51, 0.1]], ("a", "b")), {"a": 5})
    # a: given to images 0 and 2; ranked 0, 2, 1 -> AP = (1 + 2/3) / 2; b: given to 0 and 1; ranked 1, 0 -> AP = 1
    assert part["per_class"]["a"] == {
        "n_train": 5, "n": 2, "average_precision": pytest.approx(5 / 6), "precision": 0.5, "recall": 0.5, "f1": 0.5,
        "threshold": 0.5,
    }  # fmt: skip
    assert part["per_class"]["b"]["average_precision"] == 1
    assert part["mean_average_precision"] == pytest.approx(11 / 12)
    assert part["macro_f1"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert part["micro_f1"] == pytest.approx(2 * 2 / (3 + 4))
    assert part["accuracy"]["value"] == 0
    assert part["hamming_loss"] == pytest.approx(3 / 6)
    assert (part["n_labels_per_image"], part["n_labels_given_per_image"]) == (1.0, 1.333)
    assert part["multi_label"] is True
    assert [m.title for m in metrics_of(part)][:2] == ["Exact match", "Mean average precision"]
    json.dumps(part, allow_nan=False)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.integers(1, 6), st.integers(0, 10**6), st.booleans())
def test_several_labels_equal_to_scikit_learn(n, n_classes, seed, ties):
    rng = np.random.default_rng(seed)
    labels = rng.random((n, n_classes)) < 0.4
    scores = np.clip(labels * 0.2 + rng.random((n, n_classes)) * 0.8, 0.01, 0.99)
    p = several(labels, scores.round(1).clip(0.1, 0.9) if ties else scores, None, rng.uniform(0.3, 0.7, n_classes))
    part = evaluate_part(p, n_resamples=3)
    scores, present = p.probabilities, labels.any(axis=0)
    given_labels = scores >= p.task.thresholds
    for i, found in enumerate(part["per_class"].values()):
        precision = found["average_precision"]
        if present[i]:
            assert precision == pytest.approx(sk.average_precision_score(labels[:, i], scores[:, i]))
            assert found["f1"] == pytest.approx(sk.f1_score(labels[:, i], given_labels[:, i], zero_division=0))
        else:
            assert precision is None
    if labels.any() or given_labels.any():
        counted = (labels & given_labels).sum(), labels.sum() + given_labels.sum()
        assert part["micro_f1"] == pytest.approx(2 * counted[0] / counted[1])
    assert part["accuracy"]["value"] == pytest.approx((labels == given_labels).all(axis=1).mean())
    assert part["hamming_loss"] == pytest.approx(sk.hamming_loss(labels, given_labels))
    for name, interval in part["intervals"].items():
        assert 0 <= interval["low"] <= part[name] <= interval["high"] <= 1
    json.dumps(part, allow_nan=False)


def test_nothing_to_measure_with_several_labels():
    part = evaluate_part(several(np.empty((0, 2)), np.empty((0, 2))))
    assert part["n"] == 0
    assert {part[metric.key] for metric in METRICS if metric.task != "softmax" and metric.key != "accuracy"} == {None}
    assert set(part["accuracy"].values()) == {None}
    assert part["intervals"] == {}
    part = evaluate_part(several(np.zeros((3, 2)), np.zeros((3, 2))))
    assert [part[key] for key in ("mean_average_precision", "micro_f1", "macro_f1")] == [None, None, None]
    assert part["accuracy"]["value"] == 1


def test_intervals_of_several_labels_cover():
    rng = np.random.default_rng(0)

    def draw(n):
        labels = rng.random((n, 3)) < [0.5, 0.3, 0.15]
        return several(labels, 1 / (1 + np.exp(-(2.5 * labels + rng.normal(size=(n, 3)) - 1.2))))

    names = ("mean_average_precision", "micro_f1", "macro_f1")
    truth, hits = evaluate_part(draw(100_000), n_resamples=0), np.zeros(3)
    for _ in range(120):
        intervals = evaluate_part(draw(150), n_resamples=40)["intervals"]
        hits += [intervals[k]["low"] <= truth[k] <= intervals[k]["high"] for k in names]
    assert (hits / 120 > 0.90).all(), hits / 120
