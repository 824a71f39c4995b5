"""The five tutorials as scripts and as notebooks: end to end on drawn images laid out as each tutorial has them."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from topwork.studies.drawn import SHAPES, draw_folder

EXAMPLES = Path(__file__).parents[1] / "examples"
PUBLISHED = {
    "guns_and_knives": ("44,549,160", "60,192,808"),
    "fruits_360": ("11,243,715", "67,203"),
    "cats_and_dogs": ("14,780,481", "65,793", "9,742,209"),
    "caltech_101": ("135,335,076", "1,074,532"),
    "oxford_pets": (),
}
PARTS = {
    "guns_and_knives": {"train": slice(0, 8), "valid": slice(8, 12)},
    "fruits_360": {"Training": slice(0, 6), "Test": slice(6, 12)},
    "cats_and_dogs": {"training_set": slice(0, 8), "test_set": slice(8, 12)},
}
TWO_CLASSES = {"guns_and_knives", "cats_and_dogs"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On tiny networks further threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Drawn shapes in the layout of each tutorial: split folders, class folders, one flat folder."""
    drawn = draw_folder(tmp_path_factory.mktemp("drawn"), 12)
    root = tmp_path_factory.mktemp("layouts")
    for name in PUBLISHED:
        for shape in SHAPES[: 2 if name in TWO_CLASSES else 4]:
            files = sorted((drawn / shape).iterdir())
            parts = PARTS.get(name, {".": slice(0, 12)})
            for part, some in parts.items():
                folder = root / name / part / ("." if name == "oxford_pets" else shape)
                folder.mkdir(parents=True, exist_ok=True)
                for number, file in enumerate(files[some], start=1):
                    target = f"big_{shape}_{number}.jpg" if name == "oxford_pets" else file.name
                    (folder / target).write_bytes(file.read_bytes())
    return root


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_script_runs_and_counts_as_published(name, data, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    small = ["--backbone", "random:test_efficientnet", "--epochs", "1", "--size", "32"]
    more = ["--more-epochs", "1"] if name == "oxford_pets" else []
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--data", str(data / name), *small, *more])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out
    for count in PUBLISHED[name]:
        assert count in said
    for line in ("Published:", "the tutorial's way here", "topwork's default"):
        assert line in said
    n_test = int(re.search(r"([\d,]+) test images", said)[1].replace(",", ""))
    assert n_test == {"guns_and_knives": 8, "fruits_360": 12, "cats_and_dogs": 8}.get(name, n_test)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_script_is_short(name):
    assert 30 <= len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 80


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_notebook_runs_from_top_to_bottom(name, data, monkeypatch, capsys):
    import matplotlib
    import matplotlib.pyplot as plt

    matplotlib.use("agg")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for key, value in {
        "DATA": data / name, "BACKBONE": "random:test_efficientnet", "EPOCHS": 1, "SIZE": 32, "EXAMPLES": EXAMPLES,
    }.items():  # fmt: skip
        monkeypatch.setenv(key, str(value))
    path = EXAMPLES / "notebooks" / f"{name}.py"
    text = path.read_text()
    assert text.startswith("# ---\n# jupyter:")
    assert text.count("# %%") >= 15
    names = runpy.run_path(str(path))
    assert names["theirs"].history[0]["train_loss"] > 0
    assert "topwork's default" in capsys.readouterr().out
    assert len(plt.get_fignums()) >= 6
    plt.close("all")


def test_without_data_the_script_that_cannot_fetch_says_so(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", ["guns_and_knives.py"])
    with pytest.raises(SystemExit, match="--data"):
        runpy.run_path(str(EXAMPLES / "guns_and_knives.py"), run_name="__main__")
