"""Fills the reference pages of the site from the program itself, so that they cannot be out of date."""

from __future__ import annotations

from pathlib import Path
from typing import Any

DECISIONS = Path(__file__).parent / "decisions"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replaces the markers of the generated pages."""
    for marker, made in (
        ("<!-- commands -->", _commands),
        ("<!-- python -->", _python),
        ("<!-- decisions -->", _decisions),
    ):
        if marker in markdown:
            markdown = markdown.replace(marker, made())
    return markdown


def _commands() -> str:
    from topwork.cli import app

    text = app.generate_docs(output_format="markdown", recursive=True, include_hidden=False)
    return text.partition("\n")[2]  # the page has a title of its own


def _python() -> str:
    import topwork

    return "\n".join(f"::: {topwork._HOMES[name]}.{name}" for name in sorted(topwork._HOMES))


def _decisions() -> str:
    rows = []
    for path in sorted(DECISIONS.glob("[0-9]*.md")):
        title = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        rows.append(f"- [{title}]({path.name})")
    return "\n".join(rows)
