"""The tutorials' heads side by side on the same frozen features, and two losses for two classes.

Each head is trained by the plain loop with AdamW on stored features, so an epoch takes a moment; the fitted head of a probe
stands beside them. For two classes a softmax over two logits with cross-entropy and one logit with binary cross-entropy are
compared image by image.
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from topwork.blocks import Bars, Chart, Series, Table
from topwork.features.embed import Features
from topwork.models.head import HeadSpec, parse_head
from topwork.models.modules import make_head
from topwork.studies.bench import Bench, Bools, Ints
from topwork.studies.learning import FeatureTask, Learned, learn, seeded
from topwork.studies.study import Findings, Measured
from topwork.studies.words import best_of, compared, share, upper
from topwork.text import count
from topwork.training.recipe import TuneSettings

SIDE, QUICK_SIDE = 224, 64
EPOCHS, QUICK_EPOCHS = 40, 5
FITTED = "linear, fitted (probe)"
# (name, head, the tutorial's own network and what its head holds there)
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
    answers: dict[str, Bools] = {FITTED: bench.judged(fitted, features)}
    runs: dict[str, Learned] = {}
    for name, text, _ in HEADS:
        bench.say(f"heads: {name}")
        runs[name] = _learn(name, parse_head(text), task, epochs)
        answers[name] = runs[name].correct
    pair, two = _two_classes(bench, features, epochs)
    return Findings(
        sentences=(
            best_of(dict(answers), bench.seed),
            _loss_sentence(pair, two, bench.seed),
            _size_sentence(runs),
        ),
        parts=(
            Bars("Heads on the same features", "accuracy on held-out images",
                 tuple((name, Measured.of(right)) for name, right in answers.items())),
            Table(
                "Heads", ("head", "parameters here", "seconds", "accuracy", "loss on held-out images", "in its tutorial"),
                (
                    (FITTED, int(fitted.weight.size + fitted.bias.size), seconds, Measured.of(answers[FITTED]), None, "none"),
                    *(
                        (name, run.n_trainable, run.seconds, Measured.of(run.correct), run.epochs[-1].loss, where)
                        for (name, _, where), run in zip(HEADS, runs.values(), strict=True)
                    ),
                ),
                f"{task.train.shape[1]} features; {count(epochs, 'epoch')} of AdamW with one-cycle rates; the fitted head is solved, "
                "its penalty chosen by cross-validation.",
            ),
            Chart(
                "Loss by epoch", "epoch", "cross-entropy on held-out images",
                tuple(Series(run.name, tuple((float(e.number), e.loss) for e in run.epochs)) for run in runs.values()),
            ),
            Table(
                f"Two classes: {pair[0]} and {pair[1]}", ("output and loss", "parameters", "accuracy", "loss"),
                tuple((run.name, run.n_trainable, Measured.of(run.correct), run.epochs[-1].loss) for run in two),
            ),
        ),
        values={
            "accuracy": {name: float(right.mean()) for name, right in answers.items()},
            "n_parameters": {name: run.n_trainable for name, run in runs.items()},
            "two_classes": {run.name: run.accuracy for run in two},
        },
        facts=bench.facts(side=side, epochs=epochs),
    )  # fmt: skip


def _task(bench: Bench, features: Features, train: Ints, held_out: Ints, n_classes: int) -> FeatureTask:
    """Stored features, each column brought to mean 0 and deviation 1 by the training images."""
    columns = features.block("last", train).astype(np.float32), features.block("last", held_out).astype(np.float32)
    mean, std = columns[0].mean(0), columns[0].std(0) + 1e-3
    first, second = ((values - mean) / std for values in columns)
    return FeatureTask(
        first, bench.labels[train], second, bench.labels[held_out], bench.backbone.spec, n_classes, bench.seed
    )


def _learn(name: str, spec: HeadSpec, task: FeatureTask, epochs: int, outputs: str = "softmax") -> Learned:
    n_outputs = 1 if outputs == "binary" else task.n_classes
    head = seeded(lambda: Head(spec, task.train.shape[1], n_outputs), task.seed)
    settings = TuneSettings(strategy="head", epochs=epochs, augment="none", lr="1e-3", batch_size=32, outputs=outputs)  # type: ignore[arg-type]
    return learn(name, head, settings, task)


def _two_classes(bench: Bench, features: Features, epochs: int) -> tuple[tuple[str, str], tuple[Learned, Learned]]:
    """The two classes of most images: two logits and cross-entropy, one logit and binary cross-entropy."""
    counts = np.bincount(bench.labels[bench.held_out], minlength=len(bench.classes))
    pair = np.sort(np.argsort(-counts, kind="stable")[:2])
    train, held_out = (rows[np.isin(bench.labels[rows], pair)] for rows in (bench.train, bench.held_out))
    task = _task(bench, features, train, held_out, 2)
    task = replace(
        task, train_labels=np.searchsorted(pair, task.train_labels),
        held_out_labels=np.searchsorted(pair, task.held_out_labels),
    )  # fmt: skip
    runs = (
        _learn("two logits, cross-entropy", HeadSpec(), task, epochs),
        _learn("one logit, binary cross-entropy", HeadSpec(), task, epochs, "binary"),
    )
    return (bench.classes[pair[0]], bench.classes[pair[1]]), runs


def _loss_sentence(pair: tuple[str, str], two: tuple[Learned, Learned], seed: int) -> str:
    same = bool((two[0].correct == two[1].correct).all())
    names = f"{pair[0]} and {pair[1]}"
    if same:
        return (
            f"For two classes ({names}) two logits with cross-entropy and one logit with binary cross-entropy are right on "
            f"exactly the same images, {share(Measured.of(two[0].correct))}; the second has half the parameters."
        )
    return f"For two classes ({names}): " + compared(
        "two logits with cross-entropy",
        two[0].correct,
        "one logit with binary cross-entropy",
        two[1].correct,
        seed,
    )


def _size_sentence(runs: dict[str, Learned]) -> str:
    small = min(runs.values(), key=lambda run: run.n_trainable)
    large = max(runs.values(), key=lambda run: run.n_trainable)
    times = large.n_trainable / small.n_trainable
    return f"{upper(large.name)} has {times:.0f} times the parameters of {small.name}. " + compared(
        small.name, small.correct, large.name, large.correct
    )
