"""The README's Python and its commands run as they stand, in order; only servers are stopped and the hub is out of reach."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from drawing import draw, draw_folders
from terminal import topwork

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"<!-- this block runs as a test -->\n```python\n(.*?)```", re.DOTALL)
SERVERS = {"serve": "8000", "review": "8001"}  # by their ports
HUB = ("push", "pull")


def draw_photos(folder: Path) -> Path:
    """The folder ``photos`` of the README: ants and bees."""
    draw_folders(folder / "drawn", n_each=12, shapes=("disc", "square"))
    for shape, name in (("disc", "ants"), ("square", "bees")):
        shutil.copytree(folder / "drawn" / shape, folder / "photos" / name)
    (folder / "photos" / "ants" / "disc_0.jpg").rename(folder / "photos" / "ants" / "one.jpg")
    return folder / "photos"


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    draw_photos(tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = BLOCK.findall(README.read_text())
    assert len(blocks) == 3
    for block in blocks:
        exec(block, names)
    said = capsys.readouterr().out
    assert "'ants': 12" in said
    assert "'value':" in said


@pytest.mark.slow  # the block of index.md is part of the README's
@pytest.mark.parametrize("page", ["index.md", "how-to/notebooks.md"])
def test_the_python_of_the_docs_runs(page, tmp_path, monkeypatch):
    draw_photos(tmp_path)
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(
        r"^```python\n(.*?)^```", (README.parent / "docs" / page).read_text(), re.DOTALL | re.MULTILINE
    )
    exec(block, {})
    assert list(tmp_path.glob("runs/*/evaluation.json"))


def test_every_verb_of_the_table_exists_and_every_verb_is_in_it():
    from topwork.cli import app

    listed = set(re.findall(r"^\| `([a-z-]+)` \|", README.read_text(), re.MULTILINE))
    verbs = {name for name in app if not name.startswith("-")}
    assert listed == verbs


def commands() -> list[list[str]]:
    """Every command line of the README's blocks, as the shell would split it."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    lines = [line for kind, block in blocks if not kind for line in block.splitlines() if line.startswith("topwork ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


@pytest.fixture
def place(tmp_path):
    """A folder with what the README names: images, a table of several labels, an archive, labels for --labels."""
    photos = draw_photos(tmp_path)
    rows = [f"photos/{path.parent.name}/{path.name}" for path in sorted(photos.glob("*/*.jpg"))]
    labels = ["beach|sea" if number % 3 == 0 else "beach" if number % 3 == 1 else "sea" for number in range(len(rows))]
    table = ["path,label", *(f"{row},{label}" for row, label in zip(rows, labels, strict=True))]
    (tmp_path / "photos.csv").write_text("\n".join(table))
    shutil.copytree(photos / "ants", tmp_path / "new")
    shutil.make_archive(str(tmp_path / "photos"), "zip", photos)
    (tmp_path / "wasps").mkdir()
    for number in range(12):
        draw("cross", number).save(tmp_path / "wasps" / f"{number}.jpg")
    for name, seed in (("other-photos", 7), ("drawings", 8)):
        for shape, label in (("disc", "ants"), ("square", "bees")):
            (tmp_path / name / label).mkdir(parents=True)
            for number in range(10):
                image = draw(shape, 1000 * seed + number)
                image = image.convert("L") if name == "drawings" else image
                image.save(tmp_path / name / label / f"{number}.png")
    return tmp_path


@pytest.mark.slow
def test_the_commands_of_the_readme_run_in_order(place):
    failed, verbs = [], set()
    for words in commands():
        verb = words[0]
        verbs.add(verb)
        if verb in SERVERS:
            status, said = stopped(words, place)
        else:
            done = topwork(*words, cwd=place)
            status, said = done.returncode, done.stderr
        refused = "hub cannot be reached" if verb in HUB else "nothing to resume" if "--resume" in words else None
        if refused not in said if refused else status != 0:
            failed.append(f"topwork {shlex.join(words)}: {status}: {said[-300:]}")
        if verb == "review":
            (place / "runs/insects/corrections.csv").write_text("path,label\nants/one.jpg,bees\n")
    assert not failed, "\n".join(failed)
    assert verbs >= {"scan", "fit", "predict", "evaluate", "export", "serve", "add-class", "adapt", "study", "push"}


def stopped(words: list[str], place: Path) -> tuple[int, str]:
    """Starts a server, waits until it says where it is, and ends it as Ctrl+C does."""
    port = SERVERS[words[0]]
    with socket.socket() as probe:
        is_busy = probe.connect_ex(("127.0.0.1", int(port))) == 0
    if is_busy:
        words = [*(word for word in words if word not in ("--port", port)), "--port", "0"]
    command = [sys.executable, "-m", "topwork.cli", *words]
    with subprocess.Popen(command, cwd=place, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = ""
        while "Ctrl+C" not in said:
            line = process.stderr.readline()
            if not line:
                break
            said += line
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=60)[1]
    status = process.returncode
    return 0 if "Ctrl+C" in said and status in (0, 130) else status or 1, said + rest
