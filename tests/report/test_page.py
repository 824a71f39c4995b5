"""Pages of blocks: every kind is rendered and escaped, nothing is loaded, files are whole or not there."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from topwork.blocks import (
    Bar,
    Bars,
    Beside,
    Block,
    Card,
    Cell,
    Chart,
    Command,
    Facts,
    Figure,
    Figures,
    Findings,
    Fold,
    Gallery,
    Grid,
    Heading,
    Line,
    Links,
    Notes,
    Picture,
    Section,
    Series,
    Share,
    Stack,
    Table,
    Text,
    Tile,
)
from topwork.errors import TopworkError
from topwork.report.page import markdown, render_page, write_page

EVIL = "<script>alert(1)</script> \"q\" 'a' & | `x`"
VOID = ("meta", "link", "img", "br", "input")


class Page(HTMLParser):
    """Tags with attributes, checked to be closed in order, and the text outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ""
        self.raw.get(inside, self.words).append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def every_block(text: str) -> list[Block]:
    picture = Picture("data:image/jpeg;base64,AA", 4, 4)
    card = Card(
        (Tile(picture, text, text, "bad"),),
        (Line(text, text, "1%"),),
        text,
        (Tile(0, text, text),),
        text,
        text,
        {"kind": text},
    )
    pixels = np.zeros((20, 30, 3), np.uint8)
    rows = (
        (text, 1, 0.5, Share(0.5, 0.4, 0.6), Cell(text, 1.0), Bar(Share(0.5), 0.1), Stack((("train", 0.5),)), None),
    )
    return [
        Text(text, "lead"), Heading(text), Notes((text,), text), Findings((("warning", text, text),)), Facts(((text, text, text),)), Links(((text, "#one"),)),
        Command(text, text), Figures((Figure(text, text, text, text, Bar(Share(0.5, 0.4, 0.6))),)),
        Table(text, (text, "a", "b", "c", "d", "", "", "g"), rows, text, is_sortable=True, sorted_by=1, has_filter=True, name="t", chosen=(0,), keys=("0,1",)),
        Chart(text, text, text, (Series(text, ((0, 1), (1, 2))),), note=text), Bars(text, text, ((text, Share(0.9, 0.8, 1.0)),)),
        Gallery((card,) * 3, n_open=2, name="g", filters=(("kind", text, ((text, text), ("b", "b"))),)),
        Grid(text, (text,), ((text, (pixels, pixels)),), text), Fold(text, [Text(text)]), Beside(([Text(text)], [Heading(text)])),
    ]  # fmt: skip


def page_of(blocks: list[Block]) -> Page:
    pictures = {0: Picture(None, problem="file not found")}
    return Page(render_page(EVIL, "test", [Section("one", EVIL, blocks)], subtitle=EVIL, pictures=pictures, footer=[EVIL]))  # fmt: skip


def test_every_kind_of_block_is_rendered_and_escaped() -> None:
    page = page_of(every_block(EVIL))
    assert page.count("script") == 1  # its own
    assert page.count("img") == 3 + 2 + 1  # cards, grid, the enlarged one
    assert page.text.count(EVIL) > 30
    assert "1 picture is not shown: file not found." in page.text
    for _, attributes in page.tags:
        assert not [name for name in attributes if name == "style" or name.startswith("on")]


def test_a_page_runs_and_loads_nothing_but_its_own() -> None:
    page = page_of([Text("a")])
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a) or ""
    digests = [base64.b64encode(hashlib.sha256(page.raw[tag][-1].encode()).digest()).decode() for tag in ("style", "script")]  # fmt: skip
    assert policy.startswith("default-src 'none';")
    assert f"style-src 'sha256-{digests[0]}'" in policy
    assert f"script-src 'sha256-{digests[1]}'" in policy
    assert "url(" not in page.raw["style"][0]
    for _, attributes in page.tags:
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#"))


def test_markdown_has_the_same_words_and_names_break_nothing() -> None:
    text = markdown(EVIL, [Section("one", EVIL, every_block(EVIL))])
    outside = re.sub(r"(`{3,})\n.*?\n\1", "", text, flags=re.DOTALL)
    assert not re.search(r"(?<!\\)<", outside)
    for block in re.split(r"\n\n+", outside):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) <= 1
    assert "50.0% (40.0–60.0)" in text


def test_a_page_that_cannot_be_written_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "page.html").mkdir()
    (tmp_path / "page.html" / "x").touch()
    with pytest.raises(TopworkError, match=r"page\.html: cannot be written"):
        write_page(tmp_path / "page.html", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert write_page(tmp_path / "new" / "page.html", "text").read_text() == "text"  # folders are made
    (tmp_path / "file").touch()
    with pytest.raises(TopworkError, match=r"page\.html: cannot be written: not a directory"):
        write_page(tmp_path / "file" / "a" / "b" / "page.html", "text")
