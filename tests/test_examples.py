"""The five tutorials as notebooks: public names only, and each runs on drawn images laid out as its tutorial has them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import topwork
from topwork.studies.bench import SHAPES, draw_folder

REPOSITORY = Path(__file__).parents[1]
NOTEBOOKS = sorted((REPOSITORY / "examples" / "notebooks").glob("*.ipynb"))
PARTS = {
    "guns_and_knives": {"train": slice(0, 7), "valid": slice(7, 12), "test": slice(12, 16)},
    "fruits_360": {"Training": slice(0, 10), "Test": slice(10, 16)},
}
TWO_CLASSES = {"guns_and_knives", "cats_and_dogs"}


def code_of(notebook):
    return [cell.source for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Drawn shapes in the layout of each tutorial: split folders, class folders, one flat folder."""
    drawn = draw_folder(tmp_path_factory.mktemp("drawn"), 16)
    root = tmp_path_factory.mktemp("layouts")
    for name in (path.stem for path in NOTEBOOKS):
        for shape in SHAPES[: 2 if name in TWO_CLASSES else 3]:
            files = sorted((drawn / shape).iterdir())
            for part, some in PARTS.get(name, {".": slice(0, 16)}).items():
                folder = root / name / part / ("." if name == "oxford_pets" else shape)
                folder.mkdir(parents=True, exist_ok=True)
                for number, file in enumerate(files[some], start=1):
                    target = f"big_{shape}_{number}.jpg" if name == "oxford_pets" else file.name
                    (folder / target).write_bytes(file.read_bytes())
    return root


def test_there_is_a_notebook_for_each_tutorial():
    names = {path.stem for path in NOTEBOOKS}
    assert names == {"caltech_101", "cats_and_dogs", "fruits_360", "guns_and_knives", "oxford_pets"}


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_uses_public_names_alone(notebook):
    for code in code_of(notebook):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom):
                assert (node.module, [name.name for name in node.names]) == ("topwork", ["plots"])
            if isinstance(node, ast.Import):
                assert {name.name for name in node.names} <= {"os", "topwork"}
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "topwork":
                assert node.attr in topwork.__all__
    text = "\n".join(cell.source for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "markdown")
    assert (
        text.index("What the tutorial teaches")
        < text.index("The tutorial in topwork")
        < text.index("What topwork adds")
    )


@pytest.mark.parametrize(
    "notebook",
    [pytest.param(path, marks=[] if path.stem == "cats_and_dogs" else pytest.mark.slow) for path in NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_a_notebook_runs_from_top_to_bottom(notebook, data, tmp_path, monkeypatch):
    small = {"DATA": data / notebook.stem, "BACKBONE": "random:test_efficientnet", "EPOCHS": 1, "SIZE": 32}
    for key, value in (small | {"PYTHONPATH": REPOSITORY / "src", "IPYTHONDIR": tmp_path / "ipython"}).items():
        monkeypatch.setenv(key, str(value))
    book = nbformat.read(notebook, 4)
    NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 6  # each figure once
    tables = [output.data["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    assert sum("<caption>" in table for table in tables) == 3  # manifest and two runs
    said = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert re.search(r"label|ambiguous|unknown", said.splitlines()[-1])
    assert len(list((tmp_path / "runs").iterdir())) == 2
