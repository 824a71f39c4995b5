"""The adaptation methods against their formulas in other operations, and on domains whose outcome is known by thought."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from topwork.adaptation.adapted_head import distil
from topwork.adaptation.align import (
    FLOOR,
    LEVELS,
    MCC_TEMPERATURE,
    STYLES,
    AlignedHead,
    Domains,
    clamped,
    class_confusion,
    class_means,
    flat_colors,
    information_maximization,
    inverted,
    nearest,
    nearest_style,
    neighbor_agreement,
    self_training,
    soft_prototypes,
    standardized,
    trust_in,
)
from topwork.adaptation.guards import choose


def blobs(rng, n_each, centers, spread=0.6):
    labels = np.repeat(np.arange(len(centers)), n_each)
    return (centers[labels] + rng.normal(0, spread, (len(labels), centers.shape[1]))).astype(np.float32), labels


@pytest.fixture
def domains():
    """Three classes in 40 columns; the target is moved and stretched as a whole."""
    rng = np.random.default_rng(0)
    centers = rng.normal(0, 1.2, (3, 40))
    source, labels = blobs(rng, 40, centers)
    target, truth = blobs(rng, 40, centers)
    moved = (1.7 * target + 3 * (centers[0] - centers[1])).astype(np.float32)  # everything looks like class 0
    return Domains(source, labels, moved, np.full(len(truth), -1), 3), truth


def reference_mcc(logits):
    """Jin et al. 2020, as in the authors' repository: weights of sum B, no gradient through them."""
    y = torch.softmax(logits / MCC_TEMPERATURE, 1)
    h = -(y * torch.log(y + 1e-12)).sum(1)
    w = (1 + torch.exp(-h)).detach()
    w = len(y) * w / w.sum()
    k = (y * w[:, None]).T @ y
    k = k / k.sum(1, keepdim=True)
    return (k.sum() - torch.trace(k)) / k.shape[0]


def reference_im(logits):
    p = torch.softmax(logits, 1)
    mean = p.mean(0)
    return -(p * torch.log(p + 1e-12)).sum(1).mean() + (mean * torch.log(mean + 1e-12)).sum()


@pytest.mark.parametrize(
    ("ours", "reference"), [(class_confusion, reference_mcc), (information_maximization, reference_im)]
)
def test_losses_and_gradients_follow_the_papers(ours, reference):
    logits = np.random.default_rng(1).normal(0, 2, (17, 4))
    tensor = torch.tensor(logits, requires_grad=True)
    expected = reference(tensor)
    expected.backward()
    loss, gradient = ours(logits)
    assert loss == pytest.approx(expected.item(), abs=1e-7)
    np.testing.assert_allclose(gradient, tensor.grad.numpy(), atol=1e-7)


def test_standardizing_undoes_a_shift_and_a_stretch(domains):
    found, truth = domains
    aligned = standardized(found)
    before, after = ((AlignedHead(d).probabilities().argmax(1) == truth).mean() for d in (found, aligned))
    assert after == 1.0 > before
    scale = found.source.std(0) + FLOOR * np.sqrt(found.source.var(0).mean())
    z = (found.source - found.source.mean(0)) / scale
    z *= np.sqrt(z.shape[1]) / np.linalg.norm(z, axis=1, keepdims=True)
    # the principal axes keep all cosines between images
    np.testing.assert_allclose(_cosines(aligned.source), _cosines(z), atol=1e-3)


def _cosines(rows):
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit @ unit.T


def test_self_training_prototypes_and_losses_find_the_classes_of_a_shifted_target(domains):
    found, truth = domains
    head = AlignedHead(standardized(found))
    for probabilities in (
        self_training(head),
        soft_prototypes(head.domains, head.probabilities()),
        head.fit(class_confusion),
        head.fit(information_maximization),
    ):
        assert (probabilities.argmax(1) == truth).all()
        np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-6)


def test_known_labels_of_the_target_are_learned(domains):
    found, truth = domains
    wrong = (truth + 1) % 3  # the user's labels say something else than the source: the user is right
    known = np.where(np.arange(len(truth)) % 2 == 0, wrong, -1)
    aligned = standardized(Domains(found.source, found.labels, found.target, known, 3))
    assert trust_in(15, 3) == 0.5
    assert (AlignedHead(aligned).probabilities().argmax(1) == wrong).mean() > 0.2
    assert (clamped(np.full((len(truth), 3), 1 / 3), known)[known >= 0].argmax(1) == known[known >= 0]).all()


def test_one_head_answers_for_both_domains(domains):
    found, truth = domains
    apart = np.random.default_rng(4).normal(0, 3, 40).astype(np.float32)  # what tells the domains apart
    found = replace(found, target=found.target + apart)
    head = distil(found.source, np.eye(3)[found.labels], found.target, np.eye(3)[truth], 1e-3)
    for rows, labels in ((found.source, found.labels), (found.target, truth)):
        assert ((rows @ head[:-1] + head[-1]).argmax(1) == labels).mean() > 0.95


def test_a_fit_does_not_depend_on_the_fits_before_it(domains):
    found, truth = domains
    head = AlignedHead(standardized(found))
    first = head.fit(class_confusion)
    head.fit(pseudo=(np.arange(30), truth[:30]))
    np.testing.assert_allclose(head.fit(class_confusion), first, atol=1e-6)
    np.testing.assert_allclose(head.fit(), head.probabilities(), atol=1e-2)


def test_neighbors_by_hand():
    rows = np.array([[1, 0], [1, 0.1], [0, 1], [0.1, 1]], np.float32)
    assert nearest(rows, 1).ravel().tolist() == [1, 0, 3, 2]
    assert neighbor_agreement(np.array([0, 0, 0, 1]), nearest(rows, 1)).tolist() == [1, 1, 0, 0]
    assert nearest(rows[:1]).shape == (1, 0)
    assert neighbor_agreement(np.array([0]), nearest(rows[:1])).tolist() == [0]


def test_class_means_of_absent_classes_are_the_mean_of_all():
    rows = np.array([[0.0, 0.0], [2.0, 2.0]], np.float32)
    np.testing.assert_allclose(class_means(rows, np.array([0, 0]), 2), [[1, 1], [1, 1]])


# ---- restyled copies of the source


def test_every_style_keeps_the_shape_and_changes_the_picture():
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 40, 3), dtype=np.uint8)
    for name, style in STYLES.items():
        found = style(images)
        assert (found.shape, found.dtype) == (images.shape, np.uint8), name
        assert not np.array_equal(found, images)
    assert len(np.unique(flat_colors(images))) <= LEVELS
    np.testing.assert_array_equal(inverted(inverted(images)), images)


def test_the_look_that_brings_the_source_nearest_is_chosen_and_none_if_none_is_near():
    rng = np.random.default_rng(1)
    plain, target = rng.normal(0, 1, (60, 12)).astype(np.float32), rng.normal(3, 1, (80, 12)).astype(np.float32)
    styled = {"near": (plain + 2.5).astype(np.float32), "far": (plain - 3).astype(np.float32)}
    assert nearest_style(plain, styled, target) == "near"
    assert nearest_style(plain, {"far": styled["far"]}, target) is None
    assert nearest_style(plain, {}, target) is None


def test_restyled_copies_help_if_the_target_shows_the_classes_in_other_directions():
    """The look moves each class its own way: centering cannot undo that, copies of the source in the look can."""
    rng = np.random.default_rng(2)
    n, c, d = 50, 4, 60
    centers, drawn = rng.normal(0, 1.0, (c, d)), rng.normal(0, 1.0, (c, d))
    labels = np.repeat(np.arange(c), n)

    def images(of):
        return (of[labels] + rng.normal(0, 2.0, (len(labels), d))).astype(np.float32)

    domains = Domains(images(centers), labels, images(0.25 * centers + drawn) + 2, np.full(len(labels), -1), c)
    given = AlignedHead(domains).probabilities()
    plain = choose(domains, given)
    restyled = choose(domains, given, restyled=("line drawings", images(0.25 * centers + drawn)))
    accuracy = [(choice.probabilities.argmax(1) == labels).mean() for choice in (plain, restyled)]
    assert restyled.method == "source as line drawings"
    assert accuracy[1] > accuracy[0] + 0.04
    assert accuracy[1] > 0.95
