"""Drawn shapes as class folders, for studies without images.

Colored shapes of four classes on noisy backgrounds. They are easy for a pretrained backbone and learnable for a small
network; results do not transfer to photographs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from topwork.data.transforms import Pixels
from topwork.files import atomic_file

SHAPES = ("disc", "square", "cross", "stripes")
SIDE = 128


def draw_folder(folder: Path, n_each: int, seed: int = 0) -> Path:
    """Draws ``n_each`` JPEG files of each shape in a folder for this seed, and returns it; existing files are kept."""
    root = folder / f"{n_each}-{seed}"
    for number, shape in enumerate(SHAPES):
        (root / shape).mkdir(parents=True, exist_ok=True)
        for image in range(n_each):
            path = root / shape / f"{shape}-{image}.jpg"
            if not path.exists():
                with atomic_file(path) as partial:
                    partial.write_bytes(simplejpeg.encode_jpeg(draw(number, [seed, number, image]), quality=92))
    return root


def draw(shape: int, seed: list[int]) -> Pixels:
    """One shape with random position, size and color: uint8 (SIDE, SIDE, 3)."""
    rng = np.random.default_rng(seed)
    ground = rng.integers(60, 190, 3) + rng.normal(0, 14, (SIDE, SIDE, 3))
    color = rng.integers(0, 255, 3)
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float64)
    (cy, cx), radius = rng.uniform(SIDE / 3, 2 * SIDE / 3, 2), rng.uniform(SIDE / 7, SIDE / 3)
    image = np.where(_inside(shape, (x - cx) / radius, (y - cy) / radius)[..., None], color, ground)
    return np.ascontiguousarray(np.clip(image, 0, 255).astype(np.uint8))


def _inside(shape: int, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    box = (abs(x) < 1) & (abs(y) < 1)
    return np.asarray([x**2 + y**2 < 1, box, box & ((abs(x) < 0.3) | (abs(y) < 0.3)), box & (np.sin(9 * x) > 0)][shape])
