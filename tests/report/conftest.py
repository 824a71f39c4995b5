"""A finished run made in a moment: drawn images, a real scan and split, and answers set by hand. No network is run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from topwork.data.manifest import save_manifest, scan
from topwork.data.split import split, split_record
from topwork.evaluation.metrics import evaluate_part
from topwork.evaluation.predictions import Predictions
from topwork.run import save_predictions, write_json
from topwork.settings import FitSettings, as_dict

HOSTILE_CLASSES = (
    "<script>window.pwned=1<script>",
    "<img src=x onerror=window.pwned=1>",
    "\"quotes' & &amp; <!--",
    "new\nline\ttab",
    "emoji \U0001f41c {{ 7*7 }} {% raw %}",
    "line\u2028separator \u202e",
    "long " + "x" * 200,
    os.fsdecode(b"bytes \xff\xfe"),
)
HOSTILE_FILES = (
    "<script>window.pwned=1;.jpg",
    "new\nline.jpg",
    "'\"><b>.jpg",
    os.fsdecode(b"\xff.jpg"),
    "y" * 200 + ".jpg",
)

MakeRun = Callable[..., Path]


def draw_images(root: Path, classes: Sequence[str], n_each: int, names: Sequence[str] = ()) -> Path:
    """Plain colors with a little noise, as JPEG files in class folders; some with the names given."""
    rng = np.random.default_rng(0)
    for number, label in enumerate(classes):
        (root / label).mkdir(parents=True)
        for image in range(n_each):
            color = np.array([number * 37 % 256, number * 91 % 256, number * 53 % 256])
            pixels = np.clip(color + rng.normal(0, 30, (40, 60, 3)), 0, 255).astype(np.uint8)
            name = names[image] if image < len(names) else f"{image}.jpg"
            with open(root / label / name, "wb") as file:
                Image.fromarray(pixels).save(file, "JPEG")
    return root


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """``make_run(classes, n_each=..., n_wrong=..., valid=..., test=...)`` gives the folder of a finished run.

    Of each judged part, the first ``n_wrong`` images of every class are taken for the next class, with 95 % certainty.
    """

    def make(
        classes: Sequence[str] = ("ants", "bees"),
        *,
        n_each: int = 20,
        n_wrong: int = 1,
        names: Sequence[str] = (),
        rejects: Sequence[str] = (),
        valid: float = 0.2,
        test: float = 0.3,
        history: Sequence[dict[str, Any]] | None = None,
    ) -> Path:
        images, run = draw_images(tmp_path / "images", classes, n_each, names), tmp_path / "run"
        for name in rejects:
            (images / classes[0] / name).write_bytes(b"no image")
        run.mkdir()
        manifest = scan(images)
        parts = split(manifest, valid, test)
        labels = np.array(manifest.labels)
        predictions = {
            name: _answers(manifest.classes, rows, labels[rows], n_wrong) for name, rows in parts.parts().items()
        }
        judged = {name: evaluate_part(p).as_dict() for name, p in predictions.items() if name != "train"}
        settings = FitSettings(valid_fraction=valid, test_fraction=test)
        save_manifest(manifest, run / "manifest.parquet")
        save_predictions(predictions, manifest, run / "predictions.parquet")
        write_json(run / "split.json", split_record(parts, manifest))
        write_json(
            run / "settings.json", {"path": str(images), "settings": as_dict(settings), "versions": {"numpy": "2"}}
        )
        write_json(run / "recipe.json", _recipe())
        (run / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history or _trials()))
        timing = {"seconds": {"probe": 1.0, "total": 2.0}, "n_embedded": 0, "images_per_second": None}
        write_json(run / "evaluation.json", judged | {"timing": timing, "n_parameters": 1000, "n_trainable": 10})
        return run

    return make


def _answers(classes: tuple[str, ...], rows: Any, labels: Any, n_wrong: int) -> Predictions:
    n_classes = len(classes)
    answers = labels.copy()
    for label in range(n_classes):
        wrong = np.flatnonzero(labels == label)[:n_wrong]
        answers[wrong] = (label + 1) % n_classes
    # A softmax with 0.95 for the answer and the rest shared out.
    logits = np.zeros((len(rows), n_classes))
    logits[np.arange(len(rows)), answers] = np.log(0.95 / (0.05 / (n_classes - 1)))
    return Predictions(classes, rows, labels, logits)


def _recipe() -> dict[str, Any]:
    return {
        "mode": "probe",
        "backbone": "lite0",
        "architecture": "tf_efficientnet_lite0",
        "preprocessing": {"width": 224, "height": 224, "fit": "squash", "interpolation": "bilinear"},
        "head": {"kind": "plain", "candidate": "raw", "penalty": 0.1, "reason": "raw: the best."},
        "temperature": 0.9,
        "valid_used_for": "figures only; nothing was chosen on it",
        "seed": 0,
    }


def _trials() -> list[dict[str, Any]]:
    shared = {"plain": True, "standard_error": 0.01, "n_images": 20, "n_folds": 5}
    return [
        shared
        | {"candidate": name, "penalty": penalty, "accuracy": 0.9, "cross_entropy": 0.2 + penalty, "chosen": chosen}
        for name, penalty, chosen in (("raw", 0.1, True), ("raw", 0.3, False), ("z-score", 0.1, False))
    ]
