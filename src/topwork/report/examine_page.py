"""The page of ``topwork examine``: the verdict, then effects with example images.

In: an examination and its images. Out: one page. Numbers and sentences come from ``evaluation/examine.py``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from topwork.blocks import (
    Bars,
    Block,
    Card,
    Findings,
    Fold,
    Gallery,
    Heading,
    Notes,
    Picture,
    Section,
    Share,
    Table,
    Text,
    Tile,
)
from topwork.commands.examine import Examined
from topwork.data.images import decode
from topwork.data.transforms import InputSpec, Pixels, fit_to_input
from topwork.errors import ImageError
from topwork.evaluation.examine import Effect, FixedPlace, all_changes
from topwork.report.page import render_page
from topwork.report.pictures import GONE, encoded
from topwork.text import count, escape, percent, points

SIDE = 160
N_TILES = 6  # of a fixed region
GROUPS = {
    "color": "Color",
    "detail": "Detail",
    "shape": "Shape and texture",
    "place": "Object and background",
    "view": "Rotation and crop",
    "quality": "Image quality",
    "preprocessing": "Resize mode",
    "normalization": "Normalization",
}


def examine_page(examined: Examined) -> str:
    """The page as text."""
    found = examined.examination
    pictures = _pictures(examined)
    sections = [Section("verdict", "Verdict", _verdict(examined)), Section("effects", "Effects", [_chart(examined)])]
    if found.places:
        sections.append(
            Section("regions", "Fixed regions", [block for p in found.places for block in _place(p, examined)])
        )
    others: list[Block] = []
    for name, title in GROUPS.items():
        clear, rest = (
            [effect for effect in found.effects if effect.group == name and effect.is_clear == way]
            for way in (True, False)
        )
        if clear:
            sections.append(Section(f"group-{name}", title, _effects(clear, examined, pictures)))
        if rest:
            names = ", ".join(effect.title for effect in rest)
            others.append(Fold(f"{title}: {names}", _effects(rest, examined, pictures)))
    if others:
        sections.append(Section("others", "No significant effect", others))
    sections.append(Section("checks", "Checks", _checks(examined)))
    note = "95% confidence intervals. Significance: McNemar's exact test, corrected for the number of comparisons."
    subtitle = f"{count(found.n, 'image')} of {escape(examined.path)}"
    return render_page(examined.model.resolve().name, "examine", sections, subtitle=subtitle, footer=[note])


Pictures = Callable[[str], list[Picture]]


def _effects(effects: list[Effect], examined: Examined, pictures: Pictures) -> list[Block]:
    return [block for effect in effects for block in _effect(effect, examined, pictures)]


def verdict(examined: Examined) -> str:
    """The most important finding in one sentence."""
    found = examined.examination
    warnings = [finding for finding in found.findings if finding.kind == "warning"]
    if warnings:
        topics = list(dict.fromkeys(finding.topic for finding in warnings))
        return f"{count(len(warnings), 'warning')}: {', '.join(topics)}. The model may rely on something other than the objects."
    about_images = [effect for effect in found.effects if effect.group not in ("preprocessing", "normalization")]
    significant = [effect for effect in about_images if effect.is_clear and effect.difference < 0]
    if not significant:
        return f"No warnings: on {count(found.n, 'image')}, no change lowers the accuracy significantly."
    worst = min(significant, key=lambda effect: effect.difference)
    return f"No warnings. The largest effect: {worst.title.lower()} ({points(worst.difference)} points)."


def _verdict(examined: Examined) -> list[Block]:
    found = examined.examination
    unchanged = found.unchanged
    share = Share(unchanged.accuracy, unchanged.low, unchanged.high, found.n)
    return [
        Notes((verdict(examined),), kind="plain"),
        Text(f"Accuracy on the unchanged images: {percent(share.value)}{share.interval(' (95% CI {})')}. Always predicting the most frequent class: {percent(found.guess)}."),
        Findings(tuple((f.kind, f.topic, escape(f.text)) for f in found.findings if f.topic != "accuracy")),
    ]  # fmt: skip


def _chart(examined: Examined) -> Bars:
    found = examined.examination
    rows = tuple(
        (_title(effect), Share(effect.difference, effect.difference_low, effect.difference_high))
        for effect in sorted(found.effects, key=lambda effect: effect.difference)
    )
    return Bars("Change in accuracy", "points", rows, "Against the unchanged images, with 95% CI.", is_difference=True)


def _title(effect: Effect) -> str:
    return effect.title[:1].upper() + effect.title[1:]


def _effect(effect: Effect, examined: Examined, pictures: Pictures) -> list[Block]:
    said = effect.sentence
    if effect.is_clear:
        interval = f"{points(effect.difference_low)} to {points(effect.difference_high)}"
        said += f" Change: {points(effect.difference)} points (95% CI {interval})."
    names = [examined.manifest.samples[int(examined.rows[row])].label for row in examined.examination.example_rows]
    cards = []
    for picture, name, (answer, probability) in zip(pictures(effect.name), names, effect.examples, strict=True):
        caption, style = f"{escape(answer)} {percent(probability)}", "" if answer == name else "bad"
        cards.append(Card((Tile(picture, f"{effect.title}: {escape(name)}", caption, style),)))
    return [Heading(_title(effect)), Text(said), Gallery(tuple(cards), "s")]


def _pictures(examined: Examined) -> Pictures:
    """The example images after a change, as network input, clipped to 0..255."""
    spec, positions = examined.classifier.backbone.spec, examined.examination.example_rows

    def load(some: InputSpec) -> Pixels:
        return np.stack([_input(examined, position, some) for position in positions])  # all of one size

    changes = all_changes(spec, load)

    def make(name: str) -> list[Picture]:
        try:
            changed = np.asarray(np.clip(changes[name].make(load(spec)), 0, 255), np.uint8)
        except (ImageError, OSError, ValueError):
            return [GONE] * len(positions)
        return [encoded(image, SIDE) for image in changed]

    return make


def _input(examined: Examined, position: int, spec: InputSpec) -> Pixels:
    data = examined.manifest.read(int(examined.rows[position]))
    return fit_to_input(decode(data, min_side=spec.min_side).pixels, spec)


def _place(place: FixedPlace, examined: Examined) -> list[Block]:
    """The region marked on some images of the class."""
    spec, cards = examined.classifier.backbone.spec, []
    for position in place.rows[:N_TILES]:
        try:
            picture = encoded(_marked(_input(examined, position, spec), place.box), SIDE)
        except (ImageError, OSError, ValueError):
            picture = GONE
        cards.append(Card((Tile(picture, f"image of {escape(place.label)} with the region marked"),)))
    return [Heading(f"{escape(place.label)}: {place.where}"), Gallery(tuple(cards), "s")]


def _marked(image: Pixels, box: tuple[int, int, int, int]) -> Pixels:
    """The image with all but the box darkened, and the box framed."""
    top, bottom, left, right = box
    marked = (image * 0.45).astype(np.uint8)
    marked[top:bottom, left:right] = image[top:bottom, left:right]
    height, width = image.shape[:2]
    for row in (top, min(bottom, height) - 1):
        marked[max(0, row - 1) : row + 1, left:right] = (250, 160, 35)
    for column in (left, min(right, width) - 1):
        marked[top:bottom, max(0, column - 1) : column + 1] = (250, 160, 35)
    return marked


def _checks(examined: Examined) -> list[Block]:
    found = examined.examination
    if not found.fits:
        return [Text("The network has no batch norm, so the normalization cannot be checked.", "muted")]
    rows = tuple((fit.normalization.name, f"{fit.misfit:.3g}") for fit in found.fits)
    declared = tuple(n for n, fit in enumerate(found.fits) if fit.is_declared)
    note = "Distance between the batch-norm statistics of the first layer in pretraining and now; 0 is perfect. Bold: the stored normalization."  # fmt: skip
    return [Table("Normalization", ("Normalization", "Misfit"), rows, note, chosen=declared)]
