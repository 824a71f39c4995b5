"""The README's Python runs as it stands, and its commands are commands."""

from __future__ import annotations

import re
from pathlib import Path

from drawing import draw_folders

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"<!-- this block runs as a test -->\n```python\n(.*?)```", re.DOTALL)


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    draw_folders(tmp_path / "photos", n_each=12, shapes=("disc", "square"))
    (tmp_path / "photos" / "disc").rename(tmp_path / "photos" / "ants")
    (tmp_path / "photos" / "square").rename(tmp_path / "photos" / "bees")
    (tmp_path / "photos" / "ants" / "disc_0.jpg").rename(tmp_path / "photos" / "ants" / "one.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = BLOCK.findall(README.read_text())
    assert len(blocks) == 3
    for block in blocks:
        exec(block, names)
    said = capsys.readouterr().out
    assert "'ants': 12" in said
    assert "'value':" in said


def test_every_verb_of_the_table_exists_and_every_verb_is_in_it():
    from topwork.cli import app

    listed = set(re.findall(r"^\| `([a-z-]+)` \|", README.read_text(), re.MULTILINE))
    verbs = {name for name in app if not name.startswith("-")}
    assert listed == verbs
