"""The page of ``topwork examine``: what the model learned, in sentences, numbers and pictures.

In: an examination and its images. Out: one self-contained file without a script, in the look of the report. Numbers and
sentences come from ``evaluation/examine.py``; here they get positions and pictures. Every text that comes from the data
goes through ``shown``; the template escapes it.
"""

from __future__ import annotations

import base64
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from topwork import __version__
from topwork.commands.examine import Examined
from topwork.data.images import decode
from topwork.data.transforms import InputSpec, Pixels, fit_to_input, resize
from topwork.errors import ImageError, TopworkError
from topwork.evaluation.findings import Effect
from topwork.evaluation.fixed_regions import FixedPlace
from topwork.evaluation.perturb import PERTURBATIONS
from topwork.evaluation.preprocessing import USUAL, renormalized
from topwork.files import atomic_file
from topwork.models.classifier import find_model
from topwork.report.pictures import Picture
from topwork.text import count, escape, percent

HERE = Path(__file__).parent
SIDE = 144
QUALITY = 72
N_TILES = 6  # of a fixed place
GROUPS = {
    "color": "Color",
    "detail": "Detail",
    "shape": "Shape and texture",
    "place": "Object and background",
    "view": "View",
    "quality": "Quality",
    "preprocessing": "Preprocessing",
    "normalization": "Normalization",
}


@dataclass(frozen=True)
class Row:
    """One effect as the template shows it."""

    title: str
    sentence: str
    accuracy: str
    low: str
    high: str
    confidence: str
    difference: str
    bar: dict[str, float]
    is_clear: bool
    examples: list[dict[str, Any]]


def default_page(model: str | os.PathLike[str]) -> Path:
    """``examination.html`` in the run folder, or beside a model folder."""
    return find_model(model).parent / "examination.html"


def write_examine_page(examined: Examined, path: Path) -> None:
    """Writes the page.

    Raises:
        TopworkError: the file cannot be written.
    """
    write_page(path, render(examined))


def write_page(path: Path, page: str) -> None:
    """Writes a page, whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as partial:
            partial.write_text(page, encoding="utf-8", newline="\n")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise TopworkError(f"{escape(str(path))}: cannot be written: {reason}.") from None


def render(examined: Examined) -> str:
    """The page as text."""
    found, spec = examined.examination, examined.classifier.backbone.spec
    style = style_of("report.css", "insights.css", "examine.css")
    images = _inputs(examined, found.example_rows, spec)
    names = [escape(examined.manifest.samples[int(examined.rows[row])].label) for row in found.example_rows]

    def row(effect: Effect) -> Row:
        return _row(effect, _changed(effect, examined, images))

    groups = [
        {"name": title, "rows": [row(effect) for effect in found.effects if effect.group == name]}
        for name, title in GROUPS.items()
    ]
    return (
        page_environment()
        .get_template("examine.html")
        .render(
            title=escape(examined.model.resolve().name),
            data=escape(examined.path),
            version=__version__,
            policy=policy_of(style),
            style=Markup(style),
            n=count(found.n, "image"),
            guess=percent(found.guess),
            findings=[{"kind": f.kind, "topic": f.topic, "text": escape(f.text)} for f in found.findings],
            unchanged=row(found.unchanged),
            names=names,
            groups=[group for group in groups if group["rows"]],
            places=[_place(place, examined) for place in found.places],
            fits=[
                {"name": fit.normalization.name, "misfit": f"{fit.misfit:.3g}", "is_declared": fit.is_declared}
                for fit in found.fits
            ],
            randomized=[(step.part, f"{step.agreement:+.2f}") for step in found.randomized],
            border=[percent(value) for value in found.border] if found.border else None,
            baseline=round(100 * found.unchanged.accuracy, 2),
        )
    )


def style_of(*names: str) -> str:
    """The style sheets of a page, joined."""
    return "".join((HERE / "static" / name).read_text(encoding="utf-8") for name in names)


def policy_of(style: str) -> str:
    """Allows this style and pictures inside the page; no script at all."""
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode("ascii")
    return f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def page_environment() -> Environment:
    """Templates that escape everything."""
    return Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _row(effect: Effect, changed: Pixels | None) -> Row:
    examples = []
    for number, (answer, probability) in enumerate(effect.examples):
        source = picture(changed[number]) if changed is not None else None
        examples.append({"answer": escape(answer), "probability": percent(probability), "picture": source})
    return Row(
        title=effect.title,
        sentence=effect.sentence,
        accuracy=percent(effect.accuracy),
        low=percent(effect.low),
        high=percent(effect.high),
        confidence=percent(effect.confidence),
        difference=f"{100 * effect.difference:+.1f}".replace("-", "−") if effect.name != "unchanged" else "",
        bar={
            name: round(100 * getattr(effect, key), 2)
            for name, key in (("value", "accuracy"), ("low", "low"), ("high", "high"))
        },
        is_clear=effect.is_clear,
        examples=examples,
    )


def _changed(effect: Effect, examined: Examined, images: Pixels | None) -> Pixels | None:
    """What the network was shown; for a wrong normalization what it takes the image for, cut to what can be shown."""
    if images is None or effect.name == "unchanged":
        return images
    spec = examined.classifier.backbone.spec
    for some in PERTURBATIONS:
        if some.name == effect.name:
            return some.make(images)
    for other in USUAL:
        if other.name == effect.title:
            return np.clip(renormalized(images, spec, other), 0, 255).astype(np.uint8)
    fit = effect.name.removeprefix("fit_")
    return _inputs(examined, examined.examination.example_rows, InputSpec.from_dict(spec.as_dict() | {"fit": fit}))


def _inputs(examined: Examined, positions: tuple[int, ...], spec: InputSpec) -> Pixels | None:
    """The example images as the network sees them; None where a file is gone."""
    try:
        return np.stack([_input(examined, position, spec) for position in positions])  # all of one size
    except (ImageError, OSError, ValueError):
        return None


def _input(examined: Examined, position: int, spec: InputSpec) -> Pixels:
    data = examined.manifest.read(int(examined.rows[position]))
    return fit_to_input(decode(data, min_side=spec.min_side).pixels, spec)


def _place(place: FixedPlace, examined: Examined) -> dict[str, Any]:
    """The place marked on some images of the class."""
    spec = examined.classifier.backbone.spec
    tiles = []
    for position in place.rows[:N_TILES]:
        try:
            tiles.append(picture(_marked(_input(examined, position, spec), place.box)))
        except (ImageError, OSError, ValueError):
            tiles.append(Picture(None, problem="the file is gone"))
    return {"label": escape(place.label), "where": place.where, "tiles": tiles}


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


def picture(pixels: Pixels) -> Picture:
    """A small JPEG inside the page."""
    scale = min(1.0, SIDE / max(pixels.shape[:2]))
    small = resize(np.ascontiguousarray(pixels), *(max(1, round(n * scale)) for n in pixels.shape[:2]))
    jpeg = simplejpeg.encode_jpeg(
        np.ascontiguousarray(small), quality=QUALITY, colorspace="RGB", colorsubsampling="420"
    )
    source = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode("ascii")
    return Picture(source, small.shape[1], small.shape[0])
