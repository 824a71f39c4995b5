"""What examine says: sentences follow from numbers, and planted faults are named."""

from dataclasses import replace

import numpy as np
import pytest

from drawing import draw
from topwork.evaluation.examine import Effect, effect_sentence, examine, fixed_places, place_sentence
from topwork.evaluation.explain import find_evidence
from topwork.features.engine import load_engine
from topwork.models.backbone import load_backbone
from topwork.models.classifier import Classifier
from topwork.models.head import FeatureTransform, LinearHead


def effect(accuracy, n=200, *, difference=None, p=0.001, confidence=None, low=None):
    difference = accuracy - 0.95 if difference is None else difference
    low = max(0.0, accuracy - 0.05) if low is None else low
    return Effect(
        "gray", "color", "Gray", n, accuracy, low, accuracy + 0.04, confidence or accuracy, difference,
        difference - 0.03, difference + 0.03, p, 0.9, "", (),
    )  # fmt: skip


def said(some):
    return effect_sentence(some, "Without color", "color", 0.95, 0.3)


def test_sentences_follow_from_the_numbers():
    unclear = "Without color, accuracy is 94.0%: no significant difference (−4.0 to +2.0 points)."
    assert said(effect(0.94, p=0.6)) == unclear
    assert "the model relies slightly on color" in said(effect(0.90))
    assert "the model relies on color" in said(effect(0.80))
    assert "the model relies heavily on color" in said(effect(0.55))
    assert "no better than guessing (30.0%): the model depends on color" in said(effect(0.33))
    assert "overconfident on these images: mean confidence 90.0%" in said(effect(0.55, confidence=0.9))
    assert "should not help" in said(effect(0.99))
    unsure = said(effect(0.90, p=0.08))
    assert "not significant after correcting" in unsure
    assert "not significant" in unsure


# ---- a classifier that hangs on a mark


SIDE = 160  # pixels: half the work of 224


def small_lite0():
    return load_backbone("lite0").with_spec(height=SIDE, width=SIDE)


def drawn(shape, number):
    return np.asarray(draw(shape, number, SIDE))


def with_mark(image):
    marked = image.copy()
    marked[133:154, 121:154] = (250, 240, 40)
    marked[140:147, 126:150] = (20, 20, 120)
    return marked


@pytest.fixture(scope="module")
def marked_images():
    """Discs for both classes; the second class has a mark in the bottom right corner, and nothing else to tell it by."""
    discs = [drawn("disc", n) for n in range(32)]
    labels = np.arange(32) % 2
    return np.stack([with_mark(d) if label else d for d, label in zip(discs, labels, strict=True)]), labels


def fitted(images, labels, backbone):
    """A ridge head; what a probe would find, in four lines."""
    features = load_engine(backbone, precision="f32").run(images)["last"].astype(np.float64)
    mean = features.mean(0)
    x, y = features - mean, np.where(labels == 1, 1.0, -1.0)
    w = x.T @ np.linalg.solve(x @ x.T + 20 * np.eye(len(x)), y) * 3
    transform = FeatureTransform(("last",), "none", mean.astype(np.float32), np.ones(len(mean), np.float32))
    head = LinearHead(transform, np.stack([-w, w]).astype(np.float32), np.zeros(2, np.float32))
    return Classifier(backbone, head, ("plain", "marked"), 1.0, "f32")


@pytest.fixture(scope="module")
def marked(marked_images):
    return fitted(*marked_images, small_lite0())


def test_a_watermark_is_found_and_hidden(marked, marked_images):
    images, labels = marked_images
    engine = load_engine(marked.backbone, precision="f32")
    maps = find_evidence(marked, images, labels[:, None]).maps[:, 0]
    place = next(p for p in fixed_places(marked, engine, images, labels, maps) if p.label == "marked")
    assert place.where == "the bottom right corner"
    top, bottom, left, right = place.box
    assert (top <= 143 <= bottom, left <= 137 <= right) == (True, True)
    assert place.lost > 0.5
    assert place.lost_elsewhere < 0.3
    text = place_sentence(place)
    assert "watermark" in text
    assert "bottom right corner" in text


def test_objects_that_move_are_no_fixed_places():
    """Discs against squares at random places: nothing is said."""
    images, labels = np.stack([drawn(s, n) for n in range(20) for s in ("disc", "square")]), np.arange(40) % 2
    classifier = fitted(images, labels, small_lite0())
    engine = load_engine(classifier.backbone, precision="f32")
    maps = find_evidence(classifier, images, labels[:, None]).maps[:, 0]
    assert fixed_places(classifier, engine, images, labels, maps) == ()


def test_an_examination_unmasks_the_mark_in_words(marked, marked_images):
    images, labels = marked_images

    def load(spec):
        return images if spec.fit == "squash" else images[:, 20:140, 20:140].repeat(2, 1).repeat(2, 2)[:, :SIDE, :SIDE]

    steps = []
    found = examine(
        marked,
        load_engine(marked.backbone, precision="f32"),
        load,
        labels,
        on_progress=lambda *step: steps.append(step),
    )
    assert found.unchanged.accuracy == 1
    warnings = [f.text for f in found.findings if f.kind == "warning"]
    assert any("watermark" in text and "“marked”" in text for text in warnings)
    by_name = {e.name: e for e in found.effects}
    assert by_name["no_surround"].is_clear, "the mark lies in the surround"
    assert by_name["no_surround"].accuracy < 0.7
    assert "no better than guessing" in by_name["no_surround"].sentence
    assert not by_name["flip"].is_clear or by_name["flip"].accuracy < 1
    assert any("no significant difference" in e.sentence for e in found.effects)
    assert all(e.low <= e.accuracy <= e.high and len(e.examples) == 4 for e in found.effects)
    assert steps[-1][0] == steps[-1][1]
    assert found.as_dict()["effects"][0]["is_clear"] in (True, False)


@pytest.mark.slow
def test_a_model_folder_with_the_wrong_values_is_named(marked_images):
    """Trained with the right normalization, shipped with another: the right one does clearly better."""
    images, labels = marked_images
    hard = np.clip(images.astype(int) // 6 + 90, 0, 255).astype(np.uint8)  # so little contrast that values matter
    right = small_lite0()
    classifier = fitted(hard, labels, right)
    shipped = replace(classifier, backbone=right.with_spec(mean=(0.0, 0.0, 0.0), std=(0.2, 0.2, 0.2)))
    engine = load_engine(shipped.backbone, precision="f32")
    found = examine(shipped, engine, lambda spec: hard, labels)
    text = " ".join(f.text for f in found.findings if f.topic == "normalization" and f.kind == "warning")
    assert "not the one the model was trained with" in text
    assert "mean 0.5, std 0.5" in text or "ImageNet" in text, "either does far better than the declared values"
