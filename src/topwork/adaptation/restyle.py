"""Restyled copies of the source images that resemble the target: line drawings, grayscale, flat colors, blurred, inverted.

A network trained on photographs sees drawings as another world; copies of the photographs drawn as lines lie between the
two. Which look is tried is decided by a small sample: the restyling that brings it clearly nearest to the target. Whether
the predictions that follow are used is decided as for all others (``guards.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from topwork.adaptation.align import Rows
from topwork.data.transforms import Pixels
from topwork.evaluation.domains import energy_distance
from topwork.evaluation.perturb import blur, edges, gray

N_SAMPLE = 60
NEARER = 0.8  # of the distance to the target, below which a restyling is worth an embedding pass
LEVELS = 4  # per channel, of flat colors


def flat_colors(images: Pixels) -> Pixels:
    """A few colors without fine detail, as in cartoons and posters: (N, H, W, 3)."""
    step = 256 // LEVELS
    return np.asarray(blur(images, 0.008) // step * step + step // 2, np.uint8)


def inverted(images: Pixels) -> Pixels:
    """Negatives."""
    return np.asarray(255 - images, np.uint8)


STYLES: dict[str, Callable[[Pixels], Pixels]] = {
    "line drawings": edges,
    "gray": gray,
    "flat colors": flat_colors,
    "blurred": lambda images: blur(images, 0.015),
    "inverted": inverted,
}


def nearest_style(plain: Rows, styled: Mapping[str, Rows], target: Rows, seed: int = 0) -> str | None:
    """The restyling whose images are nearest to the target, if they are clearly nearer than the plain ones.

    Args:
        plain: (n, D) features of a sample of the source.
        styled: the same images in each look.
    """

    def distance(rows: Rows) -> float:
        return energy_distance(rows, target, seed=seed, n_permutations=1).energy

    found = {name: distance(rows) for name, rows in styled.items()}
    best = min(found, key=found.__getitem__, default=None)
    return best if best is not None and found[best] < NEARER * distance(plain) else None
