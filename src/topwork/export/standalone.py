#!/usr/bin/env python3
"""Classifies images with an exported model. Needs numpy, Pillow and the runtime of the export, nothing else.

    python predict.py photo.jpg more.png        the most probable classes of each image
    python predict.py --json - < names.txt      one JSON object per line, with the probabilities of all classes

Written by ``topwork export`` next to the model. An image is rotated upright, converted to RGB and resized; the model
runs on the uint8 pixels and contains everything else.
"""
# Inside topwork this file is a module like any other, imported for its functions; SETTINGS is filled in on export.
# ruff: noqa: T201

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

SETTINGS: dict[str, Any] = {}


# ---- reference decoder: match this, and the model does the rest


def decode(path: str | Path, min_side: int) -> Image.Image:
    """An upright RGB image: first frame, 16 bits scaled to 8, transparent pixels over white.

    Large images are shrunk by 2, 4, 8 ... while the short side has at least ``min_side`` pixels, JPEGs during decoding.
    """
    with Image.open(path, formats=("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")) as file:
        is_jpeg, factor = file.format in ("JPEG", "MPO"), 1
        while -(-min(file.size) // (2 * factor)) >= max(min_side, 32) and not (is_jpeg and factor == 8):
            factor *= 2
        if is_jpeg and factor > 1:
            file.draft("", (file.width // factor, file.height // factor))
        file.load()
        is_white_zero = getattr(file, "tag_v2", {}).get(262) == 0
        image = rgb(ImageOps.exif_transpose(file), is_white_zero)
    return image if is_jpeg else image.reduce(factor)


def rgb(image: Image.Image, is_white_zero: bool) -> Image.Image:
    """Converts any mode to RGB; ``is_white_zero`` for 16-bit grayscale TIFFs in which zero is white."""
    if image.mode in ("I", "F"):
        raise ValueError("signed, floating-point or more than 16 bits per sample: no standard mapping to brightness")
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        # Cameras store 8, 10 or 12 bits in 16 without scaling: the range then ends at 255, 511, 1023 ...
        top = 65535 if values.max() >= 8192 else max(255, (1 << int(values.max()).bit_length()) - 1)
        gray = np.minimum((values * 255 + top // 2) // top, 255).astype(np.uint8)
        return Image.fromarray(255 - gray if is_white_zero else gray).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def fit(image: Image.Image, spec: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """uint8 (height, width, 3), resized as in training."""
    size, chosen = (spec["width"], spec["height"]), getattr(Image.Resampling, spec["interpolation"].upper())
    if spec["fit"] == "squash":
        return np.asarray(image.resize(size, chosen))
    if spec["fit"] == "crop":
        scale = min(image.width / size[0], image.height / size[1]) * spec["crop_fraction"]
        width, height = min(image.width, size[0] * scale), min(image.height, size[1] * scale)
        left, top = (image.width - width) / 2, (image.height - height) / 2
        return np.asarray(image.resize(size, chosen, box=(left, top, left + width, top + height)))
    scale = min(size[0] / image.width, size[1] / image.height)
    inner = tuple(min(side, max(1, round(n * scale))) for side, n in zip(size, image.size, strict=True))
    canvas = Image.new("RGB", size, tuple(spec["background"]))
    canvas.paste(image.resize(inner, chosen), ((size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2))
    return np.asarray(canvas)


def prepare(path: str | Path, spec: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The model input of a file: uint8 (height, width, 3)."""
    return fit(decode(path, min_side=2 * max(spec["height"], spec["width"])), spec)


# ---- the model


def open_model(path: Path) -> Callable[[Any], Any]:
    """A function from uint8 (B, H, W, 3) to probabilities (B, C)."""
    raise NotImplementedError(path)  # replaced by the code of the export


def named(probabilities: Any, order: Any) -> str:
    """The most probable class, relative to its threshold if there is one; with several labels, all above theirs."""
    classes = SETTINGS["classes"]
    if "thresholds" not in SETTINGS:
        return str(classes[order[0]])
    limits = SETTINGS["thresholds"]
    if not SETTINGS["multi_label"]:
        return str(max(zip(classes, probabilities, limits, strict=True), key=lambda item: item[1] / item[2])[0])
    return "|".join(name for name, p, least in zip(classes, probabilities, limits, strict=True) if p >= least)


def check_files(folder: Path) -> None:
    """Exits if a file of the export was changed."""
    for name, digest in SETTINGS.get("sha256", {}).items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
            sys.exit(f"{name}: damaged or altered; export the model again.")


def main() -> int:
    """Reads the arguments and prints the predictions; status 1 if any image could not be read."""
    parser = argparse.ArgumentParser(description=f"Classifies images into {len(SETTINGS['classes'])} classes.")
    parser.add_argument("images", nargs="+", help="image files, or - to read a list from stdin")
    parser.add_argument("--top", type=int, default=5, help="number of classes to print per image")
    parser.add_argument("--json", action="store_true", help="one JSON object per line, with all probabilities")
    asked = parser.parse_args()
    check_files(Path(__file__).parent)
    run = open_model(Path(__file__).with_name(SETTINGS["model"]))
    names = sys.stdin.read().splitlines() if asked.images == ["-"] else asked.images
    n_bad = 0
    for name in names:
        try:
            pixels = prepare(name, SETTINGS["preprocessing"])
        except Exception as error:  # noqa: BLE001 - Pillow fails in many ways on files that are no images
            n_bad += 1
            print(json.dumps({"path": name, "error": str(error)}) if asked.json else f"{name}: {error}", flush=True)
            continue
        probabilities = run(pixels[None])[0]
        order = np.argsort(-probabilities, kind="stable")[: asked.top]
        label = named(probabilities, order)
        if asked.json:
            print(json.dumps({"path": name, "label": label, "probabilities": probabilities.tolist()}), flush=True)
        else:
            print(
                name if not SETTINGS.get("multi_label") else f"{name}: {label or '(none)'}",
                *[f"  {probabilities[i]:.3f}  {SETTINGS['classes'][i]}" for i in order],
                sep="\n",
            )
    return 1 if n_bad else 0


if __name__ == "__main__":
    sys.exit(main())
