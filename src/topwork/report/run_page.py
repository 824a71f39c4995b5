"""The report of a run, from the files in its folder: ``report.html``, ``report.md`` and ``report.json``.

In: a run folder, and the images if they still exist. A new section is a function in ``sections`` that returns blocks,
and a line in ``SECTIONS``; the HTML and the Markdown report both render it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from topwork.blocks import Block, Fold, Picture, Section, Special
from topwork.report.page import markdown, render_page, write_page
from topwork.report.pictures import Album
from topwork.report.run_data import Record, read_record
from topwork.report.sections.confidence import confidence
from topwork.report.sections.data import data, label_errors
from topwork.report.sections.domains import domains
from topwork.report.sections.errors import errors, heatmaps
from topwork.report.sections.summary import next_steps, sentences, summary
from topwork.report.sections.training import repeat_command, settings, training
from topwork.text import escape

SECTIONS: tuple[tuple[str, str, Callable[[Record, Album], list[Block]]], ...] = (
    ("result", "Result", summary),
    ("domains", "Domains", domains),
    ("errors", "Errors", errors),
    ("heatmaps", "Heatmaps", heatmaps),
    ("confidence", "Confidence", confidence),
    ("labels", "Label errors", label_errors),
    ("next", "Next steps", next_steps),
    ("data", "Data", data),
    ("training", "Training", training),
    ("settings", "Settings", settings),
)

ABOUT_ANSWERS = ("errors", "heatmaps", "confidence", "labels")  # for an adapted run, these are about the source


def write_report(run: Path, format: Literal["html", "md", "json"] = "html") -> Path:
    """Writes ``report.html``, ``report.md`` or ``report.json`` into a run folder and returns its path.

    Raises:
        UsageError: no finished run there.
        TopworkError: the run is damaged, or the report cannot be written.
    """
    record = read_record(Path(run))
    if format == "html":
        text = render(record)
    elif format == "md":
        text = markdown(record.name, sections_of(record, Album()))
    else:
        text = json.dumps(as_json(record), indent=1, allow_nan=False) + "\n"
    return write_page(Path(run) / f"report.{format}", text)


def as_json(record: Record) -> dict[str, Any]:
    """Everything a run says, in one object."""
    return {
        "name": escape(record.name),
        "run": escape(str(record.folder)),
        "summary": sentences(record),
        "evaluation": record.evaluation,
        "recipe": record.recipe,
        "settings": record.settings,
        "insights": record.insights,
        "split_digest": record.split.get("digest"),
        "data_digest": record.manifest.digest,
        "command": escape(repeat_command(record)),
    }


def render(record: Record) -> str:
    """The page as text."""
    album = Album()
    sections = sections_of(record, album)
    pictures = album.make(record.manifest)
    started = escape(str(record.settings.get("started", "")))[:10]
    backbone = escape(record.backbone or str(record.settings.get("model", "")))
    return render_page(
        record.name,
        "evaluation" if record.is_evaluation else "report",
        sections,
        subtitle=f"{backbone} · {started}" if started else backbone,
        pictures=pictures,
        for_script=_for_script(record, sections, album, pictures),
    )


def sections_of(record: Record, album: Album) -> list[Section]:
    """The sections of this run that are not empty."""
    about = ", source" if record.domains is not None else ""
    found = [
        Section(name, title + about if name in ABOUT_ANSWERS else title, make(record, album))
        for name, title, make in SECTIONS
    ]
    return [section for section in found if section.blocks]


def _for_script(
    record: Record, sections: Sequence[Section], album: Album, pictures: Mapping[int, Picture]
) -> dict[str, Any]:
    """Data to show the images of a matrix cell; pictures already in the page are reused."""
    parts: dict[str, Any] = {}
    images: dict[int, list[Any]] = {}
    for values in _matrices([block for section in sections for block in section.blocks]):
        predictions = record.predictions[values["part"]]
        position = {int(row): index for index, row in enumerate(predictions.sample_indices.tolist())}
        shown = {cell: [row for row in rows if row in pictures] for cell, rows in values["gallery"].items()}
        parts[values["part"]] = shown
        for row in (row for rows in shown.values() for row in rows):
            source = None if album.uses[row] else pictures[row].source
            confidence = round(float(predictions.confidence[position[row]]), 5)
            images[row] = [escape(Path(record.manifest.samples[row].path).name), confidence, source]
    part = record.main_part
    names = [escape(name) for name in record.predictions[part].classes] if part else []
    return {"classes": names, "parts": parts, "images": images}


def _matrices(blocks: Sequence[Block]) -> list[Mapping[str, Any]]:
    found = []
    for block in blocks:
        if isinstance(block, Special) and block.template == "matrix":
            found.append(block.values)
        elif isinstance(block, Fold):
            found += _matrices(block.blocks)
    return found
