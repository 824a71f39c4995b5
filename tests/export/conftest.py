"""Two small trained models, plain and extended, and the images they were trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from drawing import draw_folders
from topwork.commands.fit import fit
from topwork.export.package import Package, export_model
from topwork.export.targets import TARGETS
from topwork.settings import FitSettings


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of gray, noisy shapes: hard enough that some answers are close."""
    root = draw_folders(tmp_path_factory.mktemp("shipping") / "data", n_each=16, shapes=("disc", "square", "cross"))
    rng = np.random.default_rng(0)
    for path in sorted(root.glob("*/*.jpg")):
        pixels = np.asarray(Image.open(path)).astype(float)
        gray = pixels.mean(2, keepdims=True).repeat(3, 2) + rng.normal(0, 30, pixels.shape)
        Image.fromarray(np.clip(gray, 0, 255).astype(np.uint8)).save(path, quality=80)
    return root


@pytest.fixture(scope="session")
def runs(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders by kind of head."""
    root = tmp_path_factory.mktemp("shipping-runs")
    for head in ("plain", "extended"):
        fit(drawn, root / head, FitSettings(backbone="random:test_efficientnet", head=head, near_duplicates=False))
    return {head: root / head for head in ("plain", "extended")}


@pytest.fixture(scope="session")
def exports(runs: dict[str, Path], images: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Package]:
    """The plain model in every format, side by side in a folder that holds a ``predict.py`` of the user's."""
    root = tmp_path_factory.mktemp("exports")
    (root / "predict.py").write_text("mine")
    return {
        to: export_model(runs["plain"], to, root / f"model{target.endings[0]}", images)
        for to, target in TARGETS.items()
    }


@pytest.fixture(scope="session")
def images(drawn: Path) -> list[str]:
    """All drawn images, in a fixed order."""
    return sorted(str(path) for path in drawn.glob("*/*.jpg"))
