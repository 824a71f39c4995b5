"""Features only, the last stages, or everything: with few images and with many, on photographs and on outlines.

The fifth tutorial's rule of thumb: with little data that resembles the pretraining data, keep the features frozen; with much
data, or images that look different, fine-tune more. Resemblance is changed here by reducing the same images to outlines.
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from topwork.blocks import Grid, Table
from topwork.data.transforms import Pixels
from topwork.evaluation.perturb import edges
from topwork.studies.bench import Bench
from topwork.studies.learning import Epoch, Learned, Task, embed_task, learn, pretrained, task_of
from topwork.studies.study import Findings, Measured, accuracy_bars, best_of, difference
from topwork.text import count
from topwork.training.recipe import TuneSettings

SIDE, QUICK_SIDE = 96, 48
N_TRAIN, N_HELD_OUT = 240, 200
EPOCHS, QUICK_EPOCHS = 3, 1
FEW = 5  # images per class
FROZEN, ALL = "features only", "everything"
_BASE = TuneSettings(augment="none", batch_size=16)
TUNED = {"last stages": replace(_BASE, strategy="last", last_stages=2), ALL: _BASE}
Runs = dict[str, Learned]


def run(bench: Bench) -> Findings:
    """The study."""
    side, epochs = bench.side(SIDE, QUICK_SIDE), QUICK_EPOCHS if bench.quick else EPOCHS
    few = FEW * len(bench.classes)
    runs: dict[tuple[str, str, int], Runs] = {}
    images: dict[str, Pixels] = {}
    for kind, change in {"photographs": None, "outlines": edges}.items():
        task = task_of(bench, side, N_TRAIN, N_HELD_OUT, change)
        images[kind] = task.train[:4]
        for size, n in {"few": min(few, len(task.train)), "many": len(task.train)}.items():
            if size == "few" or n > few:
                bench.say(f"strategies: {n} {kind}")
                runs[kind, size, n] = _strategies(bench, task.first(n), kind, side, epochs)
    answers = {
        f"{kind}, {size}": {name: found.correct for name, found in group.items()}
        for (kind, size, _), group in runs.items()
    }
    return Findings(
        sentences=(
            *(f"{name.capitalize()} images: {best_of(found, bench.seed)}" for name, found in answers.items()),
            *_gain_sentences(runs, bench.seed),
        ),
        parts=(
            *(accuracy_bars(f"{name.capitalize()} training images", found) for name, found in answers.items()),
            Table(
                "All runs",
                ("images", "how many", "training images", "what is trained", "accuracy", "trainable parameters", "seconds"),
                tuple(
                    (*key, name, Measured.of(f.correct), f.n_trainable, f.seconds)
                    for key, group in runs.items()
                    for name, f in group.items()
                ),
                f"{count(epochs, 'epoch')} at {side} px, each from the same fitted head. Seconds of training on this machine; for "
                "features only, of fitting the head once the images are embedded.",
            ),
            Grid("The images", ("",) * 4, tuple((kind, tuple(some)) for kind, some in images.items())),
        ),
        values={
            "accuracy": {f"{key}, {name}": float(right.mean()) for key, found in answers.items() for name, right in found.items()}
        },
        facts=bench.facts(side=side, epochs=epochs, n_train=len(task.train), n_held_out=len(task.held_out)),
    )  # fmt: skip


def _strategies(bench: Bench, task: Task, kind: str, side: int, epochs: int) -> Runs:
    """The three ways on one set of images, all from the head that was fitted on its frozen features."""
    backbone, n = bench.scaled(side), len(task.train)
    features = embed_task(bench, task, f"{kind} {side}", backbone)
    started = time.perf_counter()
    head = bench.probe_on(features, np.arange(n), task.train_labels)
    seconds = time.perf_counter() - started
    logits = head.logits({"last": features.block("last", np.arange(n, len(features)))})
    correct = np.asarray(logits.argmax(1) == task.held_out_labels)
    size = int(head.weight.size + head.bias.size)
    state = Epoch(0, seconds, float("nan"), float("nan"), correct)
    found = {FROZEN: Learned(FROZEN, (state,), logits.astype(np.float32), backbone.n_parameters + size, size)}
    for name, settings in TUNED.items():
        network = pretrained(backbone, task.n_classes, head)
        found[name] = learn(name, network, replace(settings, epochs=epochs), task)
    return found


def _gain_sentences(runs: dict[tuple[str, str, int], Runs], seed: int) -> list[str]:
    gains = {
        (kind, size): difference(group[FROZEN].correct, group[ALL].correct, seed)
        for (kind, size, _), group in runs.items()
    }
    said = []
    for size in ("few", "many"):
        if ("photographs", size) in gains and ("outlines", size) in gains:
            like, unlike = gains["photographs", size], gains["outlines", size]
            differ = unlike.low > like.high or like.low > unlike.high
            where = "outlines" if unlike.value > like.value else "photographs"
            said.append(
                f"With {size} images, fine-tuning everything changes accuracy by {like} on photographs and by {unlike} on outlines: "
                + (f"it pays more on {where}." if differ else "no significant difference between the two.")
            )
    return said
