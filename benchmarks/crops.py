"""A larger dataset from small ones, to time things: every image enlarged to 500 pixels, and crops of some of them.

    python benchmarks/crops.py OUT.csv 3500 FOLDER [FOLDER ...]

The folder of an image is its class. A crop keeps three quarters of both sides; an image and its crop are one group, so they are
always in the same part. Writes the images beside the table.
"""

from __future__ import annotations

import argparse
import csv
import random
from pathlib import Path

from PIL import Image

LONG_SIDE, KEPT = 500, 0.75


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("n_images", type=int)
    parser.add_argument("folders", nargs="+", type=Path)
    asked = parser.parse_args()
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    sources = [
        path
        for folder in asked.folders
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in (".jpg", ".jpeg", ".png")
    ]
    rows = [save(path, asked.out, number, None) for number, path in enumerate(sources)]
    for number in rng.sample(range(len(sources)), asked.n_images - len(sources)):
        rows.append(save(sources[number], asked.out, number, rng))
    with open(asked.out, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "group"])
        writer.writerows(rows)


def save(path: Path, out: Path, number: int, rng: random.Random | None) -> tuple[str, str, int]:
    """Writes an image, or a crop of it, and returns its row."""
    image = Image.open(path).convert("RGB")
    if rng is not None:
        width, height = (int(KEPT * side) for side in image.size)
        left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
        image = image.crop((left, top, left + width, top + height))
    scale = LONG_SIDE / max(image.size)
    width, height = (max(1, round(scale * side)) for side in image.size)
    name = f"{number:05d}{'' if rng is None else '-crop'}.jpg"
    image.resize((width, height), Image.Resampling.BICUBIC).save(out.with_name(name), quality=90)
    return name, path.parent.name, number


if __name__ == "__main__":
    main()
