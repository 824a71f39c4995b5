"""Features only, the last stages, or everything: with few images and with many, on photographs and on outlines.

The fifth tutorial's rule of thumb is that little data and great likeness to the pretraining data speak for frozen
features, much data or foreign images for tuning more. Likeness is changed here, all else equal, by reducing the same
images to their outlines.
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from topwork.blocks import Bars, Grid, Table
from topwork.data.transforms import Pixels
from topwork.evaluation.perturb import edges
from topwork.studies.bench import Bench, Bools
from topwork.studies.learning import Epoch, Learned, Task, learn, pretrained, task_of
from topwork.studies.study import Findings, Measured
from topwork.studies.words import best_of, difference
from topwork.text import count, points
from topwork.training.recipe import TuneSettings

SIDE, QUICK_SIDE = 96, 48
N_TRAIN, N_HELD_OUT = 240, 200
EPOCHS, QUICK_EPOCHS = 3, 1
FEW = 5  # images a class
_BASE = TuneSettings(augment="none", batch_size=16)
TUNED = {"last stages": replace(_BASE, strategy="last", last_stages=2), "everything": _BASE}


def run(bench: Bench) -> Findings:
    """The study."""
    side, epochs = bench.side(SIDE, QUICK_SIDE), QUICK_EPOCHS if bench.quick else EPOCHS
    kinds = {"photographs": None, "outlines": edges}
    few = FEW * len(bench.classes)
    answers: dict[tuple[str, str], dict[str, Bools]] = {}
    rows: list[tuple[str, str, int, str, Measured, int, float]] = []
    images: dict[str, Pixels] = {}
    for kind, change in kinds.items():
        task = task_of(bench, side, N_TRAIN, N_HELD_OUT, change)
        images[kind] = task.train[:4]
        sizes = {"few": min(few, len(task.train)), "many": len(task.train)}
        for size, n in sizes.items():
            if size == "many" and n <= few:
                continue
            bench.say(f"strategies: {n} {kind}")
            learned = _strategies(bench, task.first(n), kind, side, epochs)
            answers[kind, size] = {name: found.correct for name, found in learned.items()}
            rows += [
                (kind, size, n, name, Measured.of(f.correct), f.n_trainable, f.seconds) for name, f in learned.items()
            ]
    return Findings(
        sentences=tuple(_sentences(answers, bench.seed)),
        parts=(
            *(
                Bars(f"{kind.capitalize()}, {size} training images", "accuracy on held-out images",
                     tuple((name, Measured.of(right)) for name, right in found.items()))
                for (kind, size), found in answers.items()
            ),
            Table(
                "All runs",
                ("images", "how many", "training images", "what moves", "accuracy", "trainable parameters", "seconds"),
                tuple(rows),
                f"{count(epochs, 'epoch')} at {side} px, every way from the same fitted head. Seconds of training on this machine; "
                "features only: of fitting the head, once the images are embedded.",
            ),
            Grid("What was changed", ("",) * 4, tuple((kind, tuple(some)) for kind, some in images.items())),
        ),
        values={
            "accuracy": {f"{kind}, {size}, {name}": float(right.mean()) for (kind, size), found in answers.items() for name, right in found.items()},
        },
        facts=bench.facts(side=side, epochs=epochs, n_train=len(task.train), n_held_out=len(task.held_out)),
    )  # fmt: skip


def _strategies(bench: Bench, task: Task, kind: str, side: int, epochs: int) -> dict[str, Learned]:
    """The three ways on one set of images, all from the head that was fitted on its frozen features."""
    backbone = bench.scaled(side)
    n = len(task.train)
    rows = np.concatenate([bench.train[:n], bench.held_out[: len(task.held_out)]])
    features = bench.embedded(rows, np.concatenate([task.train, task.held_out]), f"{kind} {side}", backbone)
    started = time.perf_counter()
    head = bench.probe_on(features, np.arange(n), task.train_labels)
    seconds = time.perf_counter() - started
    logits = head.logits({"last": features.block("last", np.arange(n, len(rows)))})
    correct = np.asarray(logits.argmax(1) == task.held_out_labels)
    size = int(head.weight.size + head.bias.size)
    only = Learned(
        "features only", (Epoch(0, seconds, float("nan"), float("nan"), correct),), logits.astype(np.float32),
        backbone.n_parameters + size, size,
    )  # fmt: skip
    tuned = {
        name: learn(name, pretrained(backbone, task.n_classes, head), replace(settings, epochs=epochs), task)
        for name, settings in TUNED.items()
    }
    return {"features only": only, **tuned}


def _sentences(answers: dict[tuple[str, str], dict[str, Bools]], seed: int) -> list[str]:
    said = [
        f"{kind.capitalize()}, {size} images. {best_of(dict(found), seed)}" for (kind, size), found in answers.items()
    ]
    gains = {key: difference(found["features only"], found["everything"], seed) for key, found in answers.items()}
    for size in ("few", "many"):
        if ("photographs", size) in gains and ("outlines", size) in gains:
            like, unlike = gains["photographs", size], gains["outlines", size]
            facts = (
                f"With {size} images, tuning everything changes accuracy by {points(like.value)} points on photographs "
                f"({points(like.low)} to {points(like.high)}) and by {points(unlike.value)} on outlines "
                f"({points(unlike.low)} to {points(unlike.high)})"
            )
            apart = unlike.low > like.high or like.low > unlike.high
            which = "foreign images" if unlike.value > like.value else "familiar images"
            said.append(
                f"{facts}: it pays more on {which}." if apart else f"{facts}: no clear difference between the two."
            )
    return said
