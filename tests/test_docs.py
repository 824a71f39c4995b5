"""The documentation says what the program does: its commands parse, its Python names exist, its pages are complete."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

import topwork
from topwork.cli import app, plain_tokens

ROOT = Path(__file__).parents[1]
FOLDERS = (ROOT / "docs", ROOT / "docs" / "how-to", ROOT / "docs" / "learn")
PAGES = [ROOT / "README.md", *(page for folder in FOLDERS for page in sorted(folder.glob("*.md")))]
FENCE = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)


def blocks(language: str) -> list[tuple[str, str]]:
    return [(page.name, text) for page in PAGES for kind, text in FENCE.findall(page.read_text()) if kind == language]


def commands() -> list[tuple[str, str]]:
    lines = [(page, line) for kind in ("bash", "") for page, text in blocks(kind) for line in text.splitlines()]
    return [(page, line) for page, line in lines if line.startswith("topwork ")]


def test_there_are_commands_to_look_at():
    assert len(commands()) > 20


@pytest.mark.parametrize(("page", "line"), commands())
def test_a_command_of_the_docs_is_one_that_the_program_takes(page, line):
    tokens = shlex.split(line, comments=True)[1:]
    app.parse_args(plain_tokens(tokens), exit_on_error=False, print_error=False)


def test_the_python_of_the_docs_uses_names_that_exist():
    for page, text in blocks("python"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "topwork":
                assert hasattr(topwork, node.attr), f"{page}: topwork.{node.attr}"


def test_every_decision_has_a_number_of_its_own():
    names = [path.name for path in (ROOT / "docs" / "decisions").glob("*.md") if path.name != "README.md"]
    numbers = [name[:4] for name in names]
    assert all(number.isdigit() for number in numbers), names
    assert len(set(numbers)) == len(numbers), sorted(names)


STRANGE = re.compile(
    r"\b(judge[ds]?|set aside|told apart|learnt by heart|folder a class|images? a second|is right for|left as it (is|was)|flatters?|"
    r"data sets?)\b|\d %",
    re.IGNORECASE,
)  # phrases of an earlier dialect: help, messages, pages and docs are written as a native practitioner would


def test_texts_are_in_the_terms_of_the_field():
    folders = (
        (ROOT / "src", ("*.py", "*.html", "*.js")),
        (ROOT / "docs", ("*.md",)),
        (ROOT / "examples", ("*.py", "*.ipynb")),
    )
    files = [path for folder, kinds in folders for kind in kinds for path in folder.rglob(kind)]
    files = [path for path in files if path.name != "lab-log.md" and path.parent.name != "decisions"]
    found = [
        f"{path.name}: {text}"
        for path in [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *files]
        for text in (_strings(path) if path.suffix == ".py" else path.read_text().splitlines())
        if STRANGE.search(text) and "%}" not in text
    ]
    assert not found


def _strings(path: Path) -> list[str]:
    """The texts in a program, docstrings included."""
    return [
        node.value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
