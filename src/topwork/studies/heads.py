"""The tutorials' heads side by side on the same frozen features, and two losses for two classes.

Each head is trained by the plain loop with AdamW on stored features; the fitted head of a probe is compared with them. For two
classes, softmax over two logits with cross-entropy is compared with one logit and binary cross-entropy.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import nn

from topwork.blocks import Table
from topwork.features.embed import Features
from topwork.models.head import HeadSpec, parse_head
from topwork.models.modules import make_head
from topwork.studies.bench import Bench, Bools, Ints
from topwork.studies.learning import FeatureTask, Learned, by_epoch, learn, seeded
from topwork.studies.study import Findings, Measured, accuracies, accuracy_bars, best_of, compared, upper
from topwork.text import count
from topwork.training.recipe import TuneSettings

SIDE, QUICK_SIDE = 224, 64
EPOCHS, QUICK_EPOCHS = 40, 5
FITTED = "linear, fitted (probe)"
# (name, head, the tutorial's own network and the parameters of its head)
HEADS = (
    ("linear", "linear", "ResNet-18 with 131 classes: 67,203"),
    ("256-relu-0.4", "256:0.4", "VGG16 with 100 classes: 1,074,532"),
    ("128-relu-0.2", "128:0.2", "VGG16, pooled, one logit: 65,793"),
    ("drop 0.25, 512-relu-0.5", "drop:0.25,512:0.5", "fastai's head, without its batch norms"),
    ("cosine", "cosine", "none; directions only"),
)


class Head(nn.Module):
    """A head by itself, so that the training loop can train it: (B, D) features to (B, n_outputs) logits."""

    def __init__(self, spec: HeadSpec, n_features: int, n_outputs: int) -> None:
        super().__init__()
        self.classifier = make_head(spec, n_features, n_outputs)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits."""
        logits: torch.Tensor = self.classifier(features)
        return logits


def run(bench: Bench) -> Findings:
    """The study."""
    side, epochs = bench.side(SIDE, QUICK_SIDE), QUICK_EPOCHS if bench.quick else EPOCHS
    features = bench.features(bench.scaled(side))
    task = _task(bench, features, bench.train, bench.held_out, len(bench.classes))
    started = time.perf_counter()
    fitted = bench.probe(features)
    seconds = time.perf_counter() - started
    runs = {}
    for name, text, _ in HEADS:
        bench.say(f"heads: {name}")
        runs[name] = _learn(name, parse_head(text), task, epochs)
    answers: dict[str, Bools] = {FITTED: bench.correct(fitted, features)} | {n: r.correct for n, r in runs.items()}
    pair, two = _two_classes(bench, features, epochs)
    n_fitted = int(fitted.weight.size + fitted.bias.size)
    return Findings(
        sentences=(best_of(answers, bench.seed), _loss_sentence(pair, two, bench.seed), _size_sentence(runs)),
        parts=(
            accuracy_bars("Heads on the same features", answers),
            Table(
                "Heads",
                ("head", "parameters here", "seconds", "accuracy", "loss on held-out images", "in its tutorial"),
                (
                    (FITTED, n_fitted, seconds, Measured.of(answers[FITTED]), None, "none"),
                    *(
                        (name, run.n_trainable, run.seconds, Measured.of(run.correct), run.epochs[-1].loss, where)
                        for (name, _, where), run in zip(HEADS, runs.values(), strict=True)
                    ),
                ),
                f"{task.train.shape[1]} features; {count(epochs, 'epoch')} of AdamW with a one-cycle schedule. The fitted head is "
                "solved to the minimum, its penalty chosen by cross-validation.",
            ),
            by_epoch("Loss by epoch", runs.values(), "loss"),
            Table(
                f"Two classes: {pair[0]} and {pair[1]}",
                ("output and loss", "parameters", "accuracy", "loss"),
                tuple((run.name, run.n_trainable, Measured.of(run.correct), run.epochs[-1].loss) for run in two),
            ),
        ),
        values={
            "accuracy": accuracies(answers),
            "n_parameters": {name: run.n_trainable for name, run in runs.items()},
            "two_classes": {run.name: run.accuracy for run in two},
        },
        facts=bench.facts(side=side, epochs=epochs),
    )


def _task(bench: Bench, features: Features, train: Ints, held_out: Ints, n_classes: int) -> FeatureTask:
    """Stored features, each one standardized by the training images."""
    first, second = (features.block("last", rows).astype(np.float32) for rows in (train, held_out))
    mean, std = first.mean(0), first.std(0) + 1e-3
    labels = bench.labels
    return FeatureTask(
        (first - mean) / std, labels[train], (second - mean) / std, labels[held_out], bench.backbone.spec, n_classes, bench.seed
    )  # fmt: skip


def _learn(
    name: str, spec: HeadSpec, task: FeatureTask, epochs: int, outputs: Literal["softmax", "binary"] = "softmax"
) -> Learned:
    head = seeded(lambda: Head(spec, task.train.shape[1], 1 if outputs == "binary" else task.n_classes), task.seed)
    settings = TuneSettings(strategy="head", epochs=epochs, augment="none", lr="1e-3", batch_size=32, outputs=outputs)
    return learn(name, head, settings, task)


def _two_classes(bench: Bench, features: Features, epochs: int) -> tuple[tuple[str, str], tuple[Learned, Learned]]:
    """The two classes with most images: two logits and cross-entropy, one logit and binary cross-entropy."""
    counts = np.bincount(bench.labels[bench.held_out], minlength=len(bench.classes))
    pair = np.sort(np.argsort(-counts, kind="stable")[:2])
    train, held_out = (rows[np.isin(bench.labels[rows], pair)] for rows in (bench.train, bench.held_out))
    task = _task(bench, features, train, held_out, 2)
    labels = [np.searchsorted(pair, own) for own in (task.train_labels, task.held_out_labels)]
    task = replace(task, train_labels=labels[0], held_out_labels=labels[1])
    runs = (
        _learn("two logits, cross-entropy", HeadSpec(), task, epochs),
        _learn("one logit, binary cross-entropy", HeadSpec(), task, epochs, "binary"),
    )
    return (bench.classes[pair[0]], bench.classes[pair[1]]), runs


def _loss_sentence(pair: tuple[str, str], two: tuple[Learned, Learned], seed: int) -> str:
    names = f"{pair[0]} and {pair[1]}"
    if (two[0].correct == two[1].correct).all():
        return (
            f"For two classes ({names}), two logits with cross-entropy and one logit with binary cross-entropy get exactly the "
            f"same images right, {Measured.of(two[0].correct)}; the second has half the parameters."
        )
    return f"For two classes ({names}): " + compared(*two[0].answer, *two[1].answer, seed)


def _size_sentence(runs: dict[str, Learned]) -> str:
    small, large = (choose(runs.values(), key=lambda run: run.n_trainable) for choose in (min, max))
    times = large.n_trainable / small.n_trainable
    return f"{upper(large.name)} has {times:.0f} times the parameters of {small.name}. " + compared(
        *small.answer, *large.answer
    )
