"""Restyled copies of the source images that resemble the target: line drawings, grayscale, flat colors, blurred, inverted.

To a network trained on photographs, drawings look very different; line drawings made from the photographs lie in
between. A small sample decides which style is tried: the one that brings it clearly nearest to the target.
``guards.py`` decides whether the resulting predictions are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from topwork.adaptation.align import Rows
from topwork.data.transforms import Pixels
from topwork.evaluation.domains import energy_distance
from topwork.evaluation.perturb import blur, edges, gray

N_SAMPLE = 60
NEARER = 0.8  # relative distance to the target below which a style is worth embedding all images
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
        styled: the same images in each style.
    """

    def distance(rows: Rows) -> float:
        return energy_distance(rows, target, seed=seed, n_permutations=1).energy

    found = {name: distance(rows) for name, rows in styled.items()}
    best = min(found, key=found.__getitem__, default=None)
    return best if best is not None and found[best] < NEARER * distance(plain) else None
