"""Writes a golden model folder: ``python tests/golden/make.py tests/golden/format-N``, once for each format version.

Every later version of topwork must load it and answer as ``answers.json`` says. It is never written again: a change that
makes this folder unreadable is a change of format, and needs a number and a folder of its own. The backbone is the
smallest that timm has, with random weights; precision f32, so that other processors answer the same.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from drawing import draw, draw_folders
from topwork.commands.fit import fit
from topwork.export.predictor import Predictor
from topwork.settings import FitSettings

# What makes a model folder one of that format.
SETTINGS = {"format-1": {}, "format-2": {"pooling": "max"}}  # 2: a network that differs from timm's


def main(folder: Path) -> None:
    """Trains on drawn shapes, keeps the model, three images and the answers for them."""
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as place:
        data = draw_folders(Path(place) / "data", n_each=20, shapes=("disc", "square", "cross"))
        run = Path(place) / "run"
        settings = FitSettings(backbone="random:test_efficientnet", precision="f32", head="plain")
        fit(data, run, replace(settings, **SETTINGS[folder.name]))
        shutil.copytree(run / "model", folder / "model")
    for shape in ("disc", "square", "stripes"):
        draw(shape, 7).save(folder / f"{shape}.jpg", quality=90)
    names = ["disc.jpg", "square.jpg", "stripes.jpg"]
    answers = [asdict(p) for p in Predictor(folder / "model").predict([folder / name for name in names])]
    rows = [answer | {"path": name} for name, answer in zip(names, answers, strict=True)]
    (folder / "answers.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
