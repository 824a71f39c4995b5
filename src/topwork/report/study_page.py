"""The page of ``topwork study``: sentences, tables, plots and pictures of one study; JSON and plots as files beside it.

In: a study that was run. Out: ``NAME.html``, self-contained and without a script, in the look of the report; ``NAME.json``
with every number; each plot as ``NAME-K.svg`` and each grid of pictures as ``NAME-K.jpg``, for slides and notes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from markupsafe import Markup

from topwork import __version__
from topwork.commands.study import Studied
from topwork.data.transforms import Pixels, resize
from topwork.errors import TopworkError
from topwork.files import atomic_file
from topwork.report.examine_page import page_environment, picture, policy_of, style_of, write_page
from topwork.report.figures import figure, stand_alone
from topwork.studies.study import Bars, Grid, Part, Plot, Table
from topwork.studies.words import cell_text
from topwork.text import duration, escape

TILE, GAP = 80, 4  # of a grid as a file, in pixels
FACT_NAMES = {
    "backbone": "Backbone", "n_classes": "Classes", "n_train": "Training images", "n_held_out": "Held-out images",
    "side": "Input side in pixels", "epochs": "Epochs", "seed": "Seed", "data_digest": "Digest of the data",
}  # fmt: skip


def make_folder(folder: Path) -> None:
    """Makes the folder for pages; a study takes minutes, so what cannot be written is said before it.

    Raises:
        TopworkError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise TopworkError(f"--out {escape(str(folder))}: cannot be made: {reason}.") from None
    if not os.access(folder, os.W_OK):
        raise TopworkError(f"--out {escape(str(folder))}: cannot be written to.")


def write_study(studied: Studied, folder: Path) -> Path:
    """Writes page, numbers and plots; returns the path of the page.

    Raises:
        TopworkError: a file cannot be written.
    """
    name = studied.study.name
    page = folder / f"{name}.html"
    write_page(page, render(studied))
    write_page(folder / f"{name}.json", json.dumps(studied.as_dict(), indent=1, allow_nan=False) + "\n")
    environment = page_environment()
    for number, part in enumerate(studied.findings.parts, start=1):
        if isinstance(part, Plot | Bars):
            write_page(folder / f"{name}-{number}.svg", stand_alone(part, environment))
        elif isinstance(part, Grid):
            _write_sheet(part, folder / f"{name}-{number}.jpg")
    return page


def render(studied: Studied) -> str:
    """The page as text."""
    found, style = studied.findings, style_of("report.css", "study.css")
    return (
        page_environment()
        .get_template("study.html")
        .render(
            study=studied.study,
            version=__version__,
            policy=policy_of(style),
            style=Markup(style),
            sentences=[escape(sentence) for sentence in found.sentences],
            parts=[_part(part) for part in found.parts],
            facts=_facts(studied),
        )
    )


def _part(part: Part) -> dict[str, Any]:
    values: dict[str, Any] = {"title": part.title, "short": _short(part.title), "note": part.note}
    if isinstance(part, Table):
        rows = [[cell_text(cell) for cell in row] for row in part.rows]
        return values | {"kind": "table", "columns": part.columns, "rows": rows}
    if isinstance(part, Grid):
        rows_of_tiles = [
            {
                "name": escape(name),
                "tiles": [
                    {"picture": picture(pixels), "name": escape(part.columns[n]) if n < len(part.columns) else ""}
                    for n, pixels in enumerate(pictures)
                ],
            }
            for name, pictures in part.rows
        ]
        return values | {"kind": "grid", "rows": rows_of_tiles}
    return values | {"kind": "figure", "drawn": figure(part)}


def _short(title: str) -> str:
    text = title.partition(":")[0].partition(",")[0]
    return text if len(text) <= 24 else text[:23].rstrip() + "…"


def _facts(studied: Studied) -> list[tuple[str, str]]:
    facts = [("Images", escape(studied.path) if studied.path else "drawn shapes")]
    for name, value in studied.findings.facts.items():
        if name == "quick":
            continue
        text = FACT_NAMES.get(name) or name.replace("_", " ").removeprefix("n ").capitalize()
        facts.append((text, str(value)[:16] if name == "data_digest" else cell_text(value)))
    if studied.findings.facts.get("quick"):
        facts.append(("Quick", "yes: few images and short training, so the figures are rough"))
    return [*facts, ("Time", duration(studied.seconds))]


def _write_sheet(part: Grid, path: Path) -> None:
    """All pictures of a grid as one JPEG, a row of the grid a row of pictures."""
    n_columns = max(len(pictures) for _, pictures in part.rows)
    sheet = np.full((len(part.rows) * (TILE + GAP) + GAP, n_columns * (TILE + GAP) + GAP, 3), 245, np.uint8)
    for row, (_, pictures) in enumerate(part.rows):
        for column, pixels in enumerate(pictures):
            top, left = GAP + row * (TILE + GAP), GAP + column * (TILE + GAP)
            sheet[top : top + TILE, left : left + TILE] = _tile(pixels)
    try:
        with atomic_file(path) as partial:
            partial.write_bytes(simplejpeg.encode_jpeg(sheet, quality=70, colorspace="RGB", colorsubsampling="420"))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise TopworkError(f"{escape(str(path))}: cannot be written: {reason}.") from None


def _tile(pixels: Pixels) -> Pixels:
    return resize(np.ascontiguousarray(pixels), TILE, TILE)
