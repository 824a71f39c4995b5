"""The report as text: ``report.md`` for people and version control, ``report.json`` for programs.

In: the sections of the page. Out: the same sentences, figures and tables in GitHub's Markdown, without pictures. Names from
the data are escaped so that they can neither break a table nor start a tag.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from topwork.blocks import (
    Bars,
    Beside,
    Block,
    Chart,
    Command,
    Facts,
    Figures,
    Findings,
    Fold,
    Gallery,
    Heading,
    Links,
    Notes,
    Section,
    Special,
    Table,
    Text,
    as_cell,
)
from topwork.report.page import write_page
from topwork.report.pictures import Album
from topwork.report.run_data import Record, read_record
from topwork.report.run_page import sections_of
from topwork.report.sections.settings import repeat_command
from topwork.report.sections.summary import sentences
from topwork.text import escape

MAX_ROWS, MAX_CARDS = 200, 50
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|~#])")


def write_plain(run: Path, format: str) -> Path:
    """Writes ``report.md`` or ``report.json`` into a run folder and returns its path.

    Raises:
        UsageError: no finished run there.
        TopworkError: the run is damaged, or the report cannot be written.
    """
    record, final = read_record(run), Path(run) / f"report.{format}"
    text = (
        markdown(record.name, sections_of(record, Album()))
        if format == "md"
        else json.dumps(as_json(record), indent=1, allow_nan=False) + "\n"
    )
    return write_page(final, text)


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


def markdown(title: str, sections: Sequence[Section]) -> str:
    """Sections of blocks in GitHub's Markdown."""
    lines = [f"# {_text(title)}", ""]
    for section in sections:
        lines += [f"## {_text(section.title)}", "", *_blocks(section.blocks)]
    return "\n".join(lines).rstrip() + "\n"


def _blocks(blocks: Sequence[Block]) -> Iterator[str]:
    for block in blocks:
        yield from _block(block)


def _block(block: Block) -> Iterator[str]:
    match block:
        case Fold():
            yield from (f"### {_text(block.summary)}", "", *_blocks(block.blocks))
        case Beside():
            for column in block.columns:
                yield from _blocks(column)
        case Special():
            yield from _blocks(block.plain)
        case Table():
            yield from _table_of(block)
        case Chart() | Bars():
            yield from _chart(block)
        case Gallery():
            yield from _gallery(block)
        case _:
            yield from _words(block)


def _words(block: Block) -> Iterator[str]:
    match block:
        case Text():
            yield from (_text(block.text), "")
        case Heading():
            yield from (f"### {_text(block.text)}", "")
        case Notes():
            yield from (*(f"- {_text(item)}" for item in block.items), "")
        case Findings():
            yield from (*(f"- **{_text(topic)}**: {_text(text)}" for _, topic, text in block.items), "")
        case Facts():
            yield from _table(("", "", ""), block.rows)
        case Links():
            yield from (*(f"- {_text(text)}: {_text(address)}" for text, address in block.rows), "")
        case Command():
            yield from _code(block.text)
        case Figures():
            rows = [(figure.label, figure.value, figure.interval, figure.hint) for figure in block.rows]
            yield from _table(("Metric", "Value", "Interval", ""), rows)


def _table_of(block: Table) -> Iterator[str]:
    if block.heading and block.title:
        yield from (f"### {_text(block.title)}", "")
    kept = [n for n, _ in enumerate(block.columns) if not any(hasattr(as_cell(row[n]), "pieces") or hasattr(as_cell(row[n]), "share") for row in block.rows[:1])]  # fmt: skip
    rows = [tuple(_cell(row[n]) for n in kept) for row in block.rows[:MAX_ROWS]]
    yield from _table(tuple(block.columns[n] for n in kept), rows)
    if block.note:
        yield from (_text(block.note), "")


def _cell(value: Any) -> str:
    return getattr(as_cell(value), "text", "")


def _chart(block: Chart | Bars) -> Iterator[str]:
    """Bars as a table; of a chart what its note says, for its numbers are too many."""
    if block.title:
        yield from (f"### {_text(block.title)}", "")
    if isinstance(block, Bars):
        yield from _table(("", block.label), [(name, str(share)) for name, share in block.rows])
    if block.note:
        yield from (_text(block.note), "")


def _gallery(block: Gallery) -> Iterator[str]:
    """The lines of each card as a row."""
    cards = [card for card in block.cards if card.lines][:MAX_CARDS]
    if not cards:
        return
    n = max(len(card.lines) for card in cards)
    rows = []
    for card in cards:
        lines = [f"{line.label} {line.text} {line.number}".strip() for line in card.lines]
        rows.append((card.path, *lines, *[""] * (n - len(lines))))
    yield from _table(("Image", *[""] * n), rows)


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    yield "| " + " | ".join(map(_text, heads)) + " |"
    yield "|" + " --- |" * len(heads)
    for row in rows:
        yield "| " + " | ".join(map(_text, row)) + " |"
    yield ""


def _code(text: str) -> Iterator[str]:
    """A fence longer than any run of backticks inside, so that no path can end it."""
    shown = "\n".join(escape(line) for line in text.split("\n"))
    fence = "`" * (3 + max((len(ticks) for ticks in re.findall("`+", shown)), default=0))
    yield from (fence, shown, fence, "")


def _text(text: str) -> str:
    """Text escaped for Markdown."""
    return _SPECIAL.sub(r"\\\1", escape(text))
