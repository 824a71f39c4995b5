"""``RUN/report.html``: one self-contained file about a run, from what its folder holds.

In: a run folder, and the images where they still are. Out: a page that needs no network, shows every number without its
script, and runs nothing but its own script (by hash, under a strict content policy). A new section is a function in
``sections``, a template of the same name, and a line in ``SECTIONS``.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from topwork import __version__
from topwork.errors import TopworkError
from topwork.files import atomic_file
from topwork.report import analysis_sections, domains_section, label_sets, results, sections
from topwork.report.pictures import Album, Picture, problems
from topwork.report.run_data import Record, read_record
from topwork.text import escape

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Section:
    """One section of the report; ``name`` is also its anchor and its template."""

    name: str
    title: str
    values: Callable[[Record, Album], dict[str, Any]]


SECTIONS = (
    Section("summary", "Summary", sections.summary),
    Section("data", "Data", sections.data),
    Section("training", "Training", sections.training),
    Section("domains", "Domains", domains_section.domains),
    Section("results", "Results", results.results),
    Section("mistakes", "Mistakes", results.mistakes),
    Section("looks", "What it looks at", analysis_sections.looks),
    Section("knows", "What it knows", analysis_sections.knows),
    Section("labels", "Labels to check", analysis_sections.labels),
    Section("advice", "Advice", analysis_sections.advice),
    Section("reproduce", "Reproduce", sections.reproduce),
)
SECTIONS_OF_SEVERAL_LABELS = (
    Section("summary", "Summary", label_sets.summary),
    Section("data", "Data", sections.data),
    Section("training", "Training", sections.training),
    Section("label_results", "Results", label_sets.results),
    Section("label_mistakes", "Mistakes", label_sets.mistakes),
    Section("reproduce", "Reproduce", sections.reproduce),
)


def write_report(run: Path) -> Path:
    """Writes ``report.html`` into a run folder and returns its path.

    Raises:
        UsageError: no finished run there.
        TopworkError: the run is damaged, or the report cannot be written.
    """
    run = Path(run)
    page = render(read_record(run))
    final = run / "report.html"
    try:
        with atomic_file(final) as partial:
            partial.write_text(page, encoding="utf-8", newline="\n")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise TopworkError(f"{escape(str(final))}: cannot be written: {reason}.") from None
    return final


def render(record: Record) -> str:
    """The page as text."""
    album = Album()
    sections_of_kind: tuple[Section, ...] = SECTIONS_OF_SEVERAL_LABELS if record.manifest.multi_label else SECTIONS
    chosen = tuple(s for s in sections_of_kind if s.name != "domains" or domains_section.is_adapted(record))
    values = {section.name: section.values(record, album) for section in chosen}
    pictures = album.make(record.manifest)
    style, script = _static("report.css") + _static("insights.css") + _static("domains.css"), _static("report.js")
    return (
        _environment()
        .get_template("report.html")
        .render(
            pictures={row: asdict(picture) for row, picture in pictures.items()},
            title=escape(record.name),
            started=escape(str(record.settings.get("started", "")))[:10],
            backbone=escape(str(record.recipe.get("architecture", ""))),
            version=__version__,
            policy=_policy(style, script),
            style=Markup(style),
            script=Markup(script),
            sections=chosen,
            values=values,
            missing=problems(pictures),
            for_script=_for_script(record, values, album, pictures),
        )
    )


def prepare() -> None:
    """Compiles the templates, a third of a second; the command line does it on a thread while the network runs."""
    for name in ("macros.html", "report.html", *(f"sections/{section.name}.html" for section in SECTIONS)):
        _environment().get_template(name)


@lru_cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _static(name: str) -> str:
    return (HERE / "static" / name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """Allows this style, this script and pictures inside the page; nothing else, from nowhere."""

    def digest(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")

    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest(style)}'; "
        f"script-src 'sha256-{digest(script)}'; base-uri 'none'; form-action 'none'"
    )


def _for_script(
    record: Record, values: dict[str, dict[str, Any]], album: Album, pictures: dict[int, Picture]
) -> dict[str, Any]:
    """What the matrix needs to show the images of a cell; pictures that are in the page already are found there."""
    parts: dict[str, Any] = {}
    images: dict[int, list[Any]] = {}
    for part in values["results"]["parts"] if "results" in values else ():
        predictions = record.predictions[part["name"]]
        position = {int(row): index for index, row in enumerate(predictions.sample_indices.tolist())}
        shown_rows = {cell: [row for row in rows if row in pictures] for cell, rows in part["gallery"].items()}
        parts[part["name"]] = shown_rows
        for rows in shown_rows.values():
            for row in rows:
                source = None if row in album.in_page else pictures[row].source
                confidence = round(float(predictions.confidence[position[row]]), 5)
                images[row] = [escape(Path(record.manifest.samples[row].path).name), confidence, source]
    main = record.main_part
    names = [escape(name) for name in record.predictions[main].classes] if main else []
    return {"classes": names, "parts": parts, "images": images}
