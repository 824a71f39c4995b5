"""Small datasets drawn on the spot: colored shapes that a pretrained backbone tells apart easily."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLORS = {"disc": (220, 60, 40), "square": (40, 90, 220), "cross": (40, 170, 70), "stripes": (230, 180, 30)}


def draw(shape: str, seed: int, size: int = 96) -> Image.Image:
    """One picture of a shape on a noisy ground; every seed gives another."""
    rng = np.random.default_rng([seed, len(shape)])
    ground = rng.integers(90, 160, 3) + rng.normal(0, 10, (size, size, 3))
    image = Image.fromarray(np.clip(ground, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    x, y, r = (int(v) for v in (*rng.integers(size // 3, 2 * size // 3, 2), rng.integers(size // 6, size // 3)))
    color = COLORS[shape]
    if shape == "disc":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=color)
    elif shape == "square":
        pen.rectangle((x - r, y - r, x + r, y + r), fill=color)
    elif shape == "cross":
        pen.line((x - r, y, x + r, y), fill=color, width=r // 2)
        pen.line((x, y - r, x, y + r), fill=color, width=r // 2)
    else:
        for offset in range(-r, r, max(2, r // 3)):
            pen.line((x - r, y + offset, x + r, y + offset), fill=color, width=2)
    return image


def draw_folders(root: Path, n_each: int = 12, shapes: tuple[str, ...] = ("disc", "square"), seed: int = 0) -> Path:
    """A folder of class folders with JPEG files."""
    for shape in shapes:
        (root / shape).mkdir(parents=True, exist_ok=True)
        for number in range(n_each):
            draw(shape, 1000 * seed + number).save(root / shape / f"{shape}_{number}.jpg", quality=92)
    return root
