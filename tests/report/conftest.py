"""A finished run made in a moment: drawn images, a real scan and split, and answers set by hand. No network is run.

And a browser that opens pages and complains about whatever they log or load.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from topwork.data.manifest import save_manifest, scan
from topwork.data.split import split, split_record
from topwork.evaluation.metrics import evaluate_part
from topwork.evaluation.predictions import Predictions
from topwork.report.run_data import read_record
from topwork.run import save_predictions, write_json
from topwork.settings import FitSettings

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


def build_run(
    folder: Path,
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
    """The folder of a finished run.

    Of each judged part, the first ``n_wrong`` images of every class are taken for the next class, with 95 % certainty.
    """
    images, run = draw_images(folder / "images", classes, n_each, names), folder / "run"
    for name in rejects:
        (images / classes[0] / name).write_bytes(b"no image")
    run.mkdir()
    manifest = scan(images)
    parts = split(manifest, valid, test)
    labels = np.array(manifest.labels)
    predictions = {
        name: _answers(manifest.classes, rows, labels[rows], n_wrong) for name, rows in parts.parts().items()
    }
    judged = {name: evaluate_part(p) for name, p in predictions.items() if name != "train"}
    settings = FitSettings(valid_fraction=valid, test_fraction=test)
    save_manifest(manifest, run / "manifest.parquet")
    save_predictions(predictions, manifest, run / "predictions.parquet")
    write_json(run / "split.json", split_record(parts, manifest))
    write_json(run / "settings.json", {"path": str(images), "settings": asdict(settings), "versions": {"numpy": "2"}})
    write_json(run / "recipe.json", _recipe())
    (run / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history or _trials()))
    timing = {"seconds": {"probe": 1.0, "total": 2.0}, "n_embedded": 0, "images_per_second": None}
    write_json(run / "evaluation.json", judged | {"timing": timing, "n_parameters": 1000, "n_trainable": 10})
    return run


@pytest.fixture(scope="session")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What :func:`build_run` makes by default; not to be changed."""
    return build_run(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def make_run(tmp_path: Path, plain_run: Path) -> MakeRun:
    """``make_run(classes, n_each=..., n_wrong=..., valid=..., test=...)`` gives the folder of a finished run."""

    def make(*classes: Sequence[str], **sizes: Any) -> Path:
        if classes or sizes:
            return build_run(tmp_path, *classes, **sizes)
        return Path(shutil.copytree(plain_run, tmp_path / "run"))

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
        "valid_used_for": "evaluation only, so its scores are unbiased",
        "seed": 0,
    }


def _trials() -> list[dict[str, Any]]:
    shared = {"plain": True, "standard_error": 0.01, "n_images": 20, "n_folds": 5}
    return [
        shared
        | {"candidate": name, "penalty": penalty, "accuracy": 0.9, "cross_entropy": 0.2 + penalty, "chosen": chosen}
        for name, penalty, chosen in (("raw", 0.1, True), ("raw", 0.3, False), ("z-score", 0.1, False))
    ]


def add_insights(run: Path, n_suspects: int = 3) -> Path:
    """An insights.json as a fit writes it, with values that can be told apart."""
    record = read_record(run)
    part = record.predictions["test"]
    rows = part.sample_indices.tolist()
    train = np.flatnonzero(record.part_of == "train").tolist()
    right = np.zeros((7, 7))
    right[1, 1] = 2.0
    images = [
        {"row": rows[i], "predicted": int(part.predicted[i]), "label": int(part.labels[i]), "probability": 0.9,
         "maps": [right.tolist(), (-right).tolist()], "logits": [2.0, -2.0], "nearest": train[:4], "similarity": [0.9] * 4}
        for i in (0, len(rows) - 1)
    ]  # fmt: skip
    suspects = [
        {"row": row, "path": "p", "label": "l", "suggested": record.manifest.classes[0], "score": 0.9, "is_confident": True,
         "label_probability": 0.04, "suggested_probability": 0.96, "neighbors": train[:3], "neighbor_agreement": 0.0}
        for row in rows[:n_suspects]
    ]  # fmt: skip
    outcome = {"n": 12, "n_label": 9, "n_ambiguous": 2, "n_unknown": 1, "accuracy": 0.75, "wrong_left_open": 2, "n_wrong": 3,
               "accuracy_of_labels": {"value": 8 / 9, "low": 0.56, "high": 0.98}}  # fmt: skip
    points = [
        {"n": n, "accuracy": a, "low": a - 0.03, "high": a + 0.02} for n, a in ((25, 0.8), (50, 0.85), (100, 0.9))
    ]
    insights = {
        "suspects": suspects,
        "n_suspects": n_suspects,
        "n_audited": len(record.manifest.samples),
        "outliers": [{"row": rows[0], "distance": 0.7, "neighbors": train[:2]}],
        "duplicates": {"test": {"n_repeated": 2, "n_without": 10, "accuracy": 0.75,
                                "accuracy_without": {"value": 0.7, "low": 0.4, "high": 0.9}}},
        "decisions": {"thresholds": {"unknown": 0.5, "unknown_false_alarm_rate": 0.01, "set_probability": 0.2,
                                     "set_coverage": 0.975, "confidence": None}, "parts": {"test": outcome}},
        "explanations": {"method": "activation", "part": "test", "images": images},
        "learning_curve": {"points": points, "forecasts": [{"n": n, "accuracy": a, "low": a - 0.02, "high": a + 0.02}
                           for n, a in ((125, 0.91), (250, 0.93), (500, 0.94))], "gain": [0.02, 0.005, 0.04],
                           "floor": 0.02, "scale": 1.0, "exponent": 0.5, "line": [[25, 0.8], [125, 0.91], [500, 0.94]]},
        "advice": [{"name": "images", "title": "More images", "text": "Twice the images bring +2.0 points.",
                    "gain": [0.02, 0.005, 0.04], "basis": "curve", "minutes": 0.0, "person_minutes": 21.0, "command": None}],
    }  # fmt: skip
    write_json(run / "insights.json", insights)
    return run


# ---- a browser


@pytest.fixture
def open_page(browser: Any) -> Iterator[Any]:
    """``open_page(path, width=..., scheme=...)``; the test fails if the page logs anything or loads anything."""
    complaints: list[str] = []
    contexts = []

    def open_one(path: Path, width: int = 1280, scheme: str = "light", script: bool = True) -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=script
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.append(request.url) if request.url.startswith("http") else None)
        page.goto(path.as_uri())
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert complaints == []
