"""Every command with ``--out``: folders that do not exist yet are made, with all that are above them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from drawing import draw_folders
from terminal import topwork
from topwork.cli import app

NETWORK = ["--backbone", "random:test_efficientnet", "--size", "64"]
COMMANDS = {
    "fit": ["DATA", *NETWORK],
    "lr-range": ["DATA", *NETWORK, "--steps", "10"],
    "evaluate": ["RUN", "DATA"],
    "examine": ["RUN", "DATA", "--n-images", "10"],
    "compare": ["RUN", "RUN"],
    "compare-domains": ["DATA", "OTHER", "--model", "RUN"],
    "predict": ["RUN", "DATA"],
    "export": ["RUN"],
    "add-class": ["RUN", "OTHER", "--name", "new"],
    "adapt": ["RUN", "OTHER"],
}
SLOW = {
    "study": ["heads", "DATA", *NETWORK, "--limit-per-class", "8"],
}
ELSEWHERE = {"demo", "pull"}  # demo ends in fit; pull needs a server (tests/export/test_hub.py)
ENDINGS = {
    "lr-range": "plot.svg",
    "examine": "page.html",
    "compare": "page.html",
    "compare-domains": "page.html",
    "predict": "answers.csv",
    "export": "model.onnx",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Images of two classes, others, and a run."""
    root = tmp_path_factory.mktemp("out")
    draw_folders(root / "DATA", n_each=10)
    draw_folders(root / "OTHER", n_each=5, shapes=("cross",))
    assert topwork("fit", root / "DATA", "--out", root / "RUN", *NETWORK).returncode == 0
    return root


def test_no_command_with_out_is_forgotten() -> None:
    found = {
        name
        for name in app
        if not name.startswith("-")
        and any("--out" in argument.names for argument in app[name].assemble_argument_collection())
    }
    assert found == set(COMMANDS) | set(SLOW) | ELSEWHERE


@pytest.mark.parametrize("name", [*COMMANDS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_folders_above_an_output_are_made(name, place, tmp_path) -> None:
    out = tmp_path / "not" / "there" / "yet é" / ENDINGS.get(name, "folder")
    words = [str(place / word) if (place / word).exists() else word for word in (COMMANDS | SLOW)[name]]
    ended = topwork(name, *words, "--out", out, "--json", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert out.exists()
    assert not out.is_dir() or any(out.iterdir())
    assert isinstance(json.loads(ended.stdout), dict)
    assert {path.name for path in tmp_path.iterdir()} == {"not"}, "nothing is written elsewhere"


@pytest.mark.parametrize("name", ["add-class", "adapt"])
def test_a_model_made_from_another_gets_a_new_folder(name, place, tmp_path) -> None:
    shutil.copytree(place / "RUN", tmp_path / "runs" / "RUN")
    words = [str(place / word) if (place / word).exists() and word != "RUN" else word for word in COMMANDS[name]]
    words[0] = "runs/RUN"
    (tmp_path / "runs" / "RUN-2").mkdir()
    ended = topwork(name, *words, "--json", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["run"] == "runs/RUN-3"
    assert (tmp_path / "runs" / "RUN-3" / "report.html").is_file()


@pytest.mark.parametrize("name", COMMANDS)
def test_an_output_below_a_file_is_named(name, place, tmp_path) -> None:
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / ENDINGS.get(name, "folder")
    words = [str(place / word) if (place / word).exists() else word for word in COMMANDS[name]]
    ended = topwork(name, *words, "--out", out, cwd=tmp_path)
    assert ended.returncode in (1, 2)
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("topwork: ")]
    assert str(tmp_path / "file") in line
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in Path(tmp_path).iterdir()] == ["file"]
