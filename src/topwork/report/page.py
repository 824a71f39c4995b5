"""Pages: one self-contained HTML file, or Markdown, from sections of blocks.

In: :class:`~topwork.blocks.Section`. Out: a page that needs no network, shows every number without JavaScript, and runs
only its own script (a strict content security policy with a hash); the templates escape all text. Or the same sentences,
figures and tables in GitHub's Markdown, without pictures, escaped so that names can neither break a table nor start a tag.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from topwork import __version__
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
    Picture,
    Section,
    Special,
    Table,
    Text,
    as_cell,
)
from topwork.files import atomic_file, writing
from topwork.report import charts
from topwork.report.pictures import encoded, problems
from topwork.text import escape

HERE = Path(__file__).parent
SCRIPT = "page.js"
STYLES = ("chart.css", "page.css")
TILE_SIDE = 144  # of a picture in a grid
MAX_ROWS, MAX_CARDS = 200, 50  # of tables and galleries in Markdown
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|~#])")


def render_page(
    title: str,
    kind: str,
    sections: Sequence[Section],
    *,
    subtitle: str = "",
    pictures: Mapping[int, Picture] | None = None,
    footer: Sequence[str] = (),
    for_script: Mapping[str, Any] | None = None,
) -> str:
    """The page as text.

    Args:
        kind: the kind of page, next to the name of the program: "report", "scan".
        pictures: by row, for tiles that refer to rows.
        for_script: data for the script of the confusion matrix.
    """
    script, style = _static(SCRIPT), "".join(_static(name) for name in STYLES)
    missing = [
        f"{n:,} {'picture is' if n == 1 else 'pictures are'} not shown: {reason}."
        for reason, n in problems(pictures or {}).items()
    ]
    return (
        environment()
        .get_template("page.html")
        .render(
            title=escape(title),
            kind_of_page=kind,
            subtitle=subtitle,
            sections=sections,
            pictures=pictures or {},
            footer=[*footer, *missing],
            version=__version__,
            policy=_policy(style, script),
            style=Markup(style),
            script=Markup(script),
            for_script=for_script,
        )
    )


def write_page(path: Path, page: str) -> Path:
    """Writes a text file atomically, and creates its folder.

    Raises:
        TopworkError: the file cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as partial:
            partial.write_text(page, encoding="utf-8", newline="\n")
    return path


def prepare() -> None:
    """Compiles the templates, which takes a third of a second; the command line does it in a thread."""
    for name in environment().list_templates():
        environment().get_template(name)


@lru_cache
def environment() -> Environment:
    """The templates of the report, with the filters that they use."""
    found = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {
        "kind": lambda value: type(value).__name__,
        "cell": as_cell,
        "draw": charts.draw,
        "legend": charts.legend,
        "key": charts.key,
        "encoded": lambda pixels: encoded(pixels, TILE_SIDE),
    }
    return found


def _static(name: str) -> str:
    return (HERE / "static" / name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """A content security policy that allows only this style, this script and inline pictures."""

    def digest(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")

    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest(style)}'; "
        f"script-src 'sha256-{digest(script)}'; base-uri 'none'; form-action 'none'"
    )


# ---- Markdown


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
