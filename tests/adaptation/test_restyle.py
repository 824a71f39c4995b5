"""Restyled copies of the source: which look is tried, and that it helps where plain alignment does not reach."""

from __future__ import annotations

import numpy as np

from topwork.adaptation.align import AlignedHead, Domains
from topwork.adaptation.guards import choose
from topwork.adaptation.restyle import LEVELS, STYLES, flat_colors, inverted, nearest_style


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
