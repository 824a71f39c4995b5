"""Pages: one self-contained HTML file from sections of blocks, with a common layout, style and script.

In: :class:`~topwork.blocks.Section`. Out: a page that needs no network, shows every number without JavaScript, and runs
only its own script (a strict content security policy with a hash). The templates escape all text.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from topwork import __version__
from topwork.blocks import Picture, Section, as_cell
from topwork.files import atomic_file, writing
from topwork.report import charts
from topwork.report.pictures import encoded, problems
from topwork.text import escape

HERE = Path(__file__).parent
SCRIPT = "page.js"
STYLES = ("chart.css", "page.css")
TILE_SIDE = 144  # of a picture in a grid


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
