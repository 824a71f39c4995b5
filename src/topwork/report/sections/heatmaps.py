"""Heatmaps of errors and correct predictions, with the most similar training images."""

from __future__ import annotations

from typing import Any

import numpy as np

from topwork.blocks import Block, Card, Command, Gallery, Picture, Text, Tile
from topwork.data.images import decode
from topwork.data.transforms import InputSpec, Pixels
from topwork.errors import ImageError
from topwork.evaluation.explain import overlay
from topwork.report.pictures import EXAMPLE, Album, encoded, smaller
from topwork.report.run_data import Record
from topwork.settings import quote
from topwork.text import escape, percent

SIDE = 288  # pixels of the long side of a map
N_OPEN = 4
METHODS = {
    "activation": "The maps are exact: the contribution of each position of the feature maps to the class score.",
    "gradient": "The maps show how much each position increases the score of the class, based on its gradient.",
    "occlusion": "The maps show how much the score of the class drops when a region is covered.",
}


def heatmaps(record: Record, album: Album) -> list[Block]:
    """One card per image; nothing if none was explained."""
    found = record.insights.get("explanations") or {}
    if not found.get("images"):
        return []
    cards = tuple(_card(record, image, album) for image in found["images"])
    method = METHODS.get(str(found.get("method")), METHODS["occlusion"])
    return [
        Text("Bright regions are evidence for the class below the image. Check that they are on the object.", "lead"),
        Gallery(cards, "l", n_open=N_OPEN, noun="image"),
        Text(f"{method} To test what the model relies on (color, texture, shape, background):", "small"),
        Command(f"topwork examine {quote(str(record.folder))}", "Command that tests what the model relies on"),
    ]


def _card(record: Record, image: dict[str, Any], album: Album) -> Card:
    classes, row, samples = record.manifest.classes, image["row"], record.manifest.samples
    pixels, spec = _pixels(record, row), _spec(record)
    true, predicted = escape(classes[image["label"]]), escape(classes[image["predicted"]])
    is_wrong = image["label"] != image["predicted"]
    maps = [np.array(values, np.float32) for values in image["maps"][: 1 + is_wrong]]
    strongest = max(float(np.max(values)) for values in maps)
    drawn = [_overlay(pixels, values, spec, strongest) for values in maps]
    tiles = [
        Tile(album.want(row, EXAMPLE), f"image of {true}", f"true: {true}" if is_wrong else true),
        Tile(drawn[0], f"evidence for {predicted}", f"{predicted} {percent(image['probability'])}", "bad" if is_wrong else "good"),
    ]  # fmt: skip
    if is_wrong:
        tiles.append(Tile(drawn[1], f"evidence for {true}", f"for {true}"))
    near = tuple(
        Tile(album.want(other, EXAMPLE), f"training image of {escape(samples[other].label)}", escape(samples[other].label),
             "" if samples[other].label == classes[image["label"]] else "bad")
        for other in image["nearest"]
    )  # fmt: skip
    return Card(tuple(tiles), path=escape(samples[row].path), near=near, near_label="Most similar in train")


def _spec(record: Record) -> InputSpec:
    values = record.recipe.get("preprocessing") or {}
    return InputSpec.from_dict({key: values[key] for key in InputSpec.__dataclass_fields__ if key in values})


def _pixels(record: Record, row: int) -> Pixels | None:
    """The upright original, small; None if the file is gone."""
    try:
        return smaller(decode(record.manifest.read(row), min_side=SIDE).pixels, SIDE)
    except (ImageError, OSError, ValueError):
        return None


def _overlay(pixels: Pixels | None, values: Any, spec: InputSpec, strongest: float) -> Picture:
    if pixels is None:
        return Picture(None, problem="file not found")
    return encoded(np.ascontiguousarray(overlay(pixels, values, spec, strongest)), SIDE)
