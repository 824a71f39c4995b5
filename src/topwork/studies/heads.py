"""The tutorials' heads on the same frozen features, and two losses for two classes.

Each head is trained by the plain loop with AdamW on stored features; the fitted head of a probe is compared with them. For two
classes, softmax over two logits with cross-entropy is compared with one logit and binary cross-entropy.
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from topwork.features.embed import Features
from topwork.models.head import parse_head
from topwork.models.modules import make_head
from topwork.settings import Outputs
from topwork.studies.bench import Bench, Ints
from topwork.studies.learning import Epoch, Learned, Task, by_epoch, learn, runs_table, seeded
from topwork.studies.study import Findings, accuracies, accuracy_bars, best_of, compared
from topwork.training.recipe import TuneSettings

FITTED = "probe"
# name: (head, the tutorial's network and the parameters of its head)
HEADS = {
    "linear": ("linear", "ResNet-18 with 131 classes: 67,203"),
    "256-relu-0.4": ("256:0.4", "VGG16 with 100 classes: 1,074,532"),
    "128-relu-0.2": ("128:0.2", "VGG16, pooled, one logit: 65,793"),
    "drop 0.25, 512-relu-0.5": ("drop:0.25,512:0.5", "fastai's head, without its batch norms"),
    "cosine": ("cosine", "none"),
}


class Head(nn.Module):
    """A head as a network for the training loop: (B, D) features to (B, n_outputs) logits."""

    def __init__(self, text: str, n_features: int, n_outputs: int) -> None:
        super().__init__()
        self.classifier = make_head(parse_head(text), n_features, n_outputs)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits."""
        logits: torch.Tensor = self.classifier(features)
        return logits


def run(bench: Bench) -> Findings:
    """Runs the study."""
    backbone, epochs = bench.scaled(224, 64), bench.pick(40, 5)
    features = bench.features(backbone)
    task = _task(bench, features, bench.train, bench.held_out, len(bench.classes))
    started = time.perf_counter()
    probe = bench.probe(features)
    epoch = Epoch(0, time.perf_counter() - started, None, bench.correct(probe, features))
    size = int(probe.head.weight.size + probe.head.bias.size)
    runs = [Learned(FITTED, (epoch,), size, size)]
    for name, (text, _) in HEADS.items():
        bench.reporter.step(f"heads: {name}")
        runs.append(_learn(name, text, task, epochs, "softmax"))
    answers = {found.name: found.correct for found in runs}
    pair, pair_task = _two_classes(bench, features)
    two = [
        _learn("two logits, cross-entropy", "linear", pair_task, epochs, "softmax"),
        _learn("one logit, binary cross-entropy", "linear", pair_task, epochs, "binary"),
    ]
    softmax, binary = two
    small, large = (find(runs, key=lambda found: found.n_trainable) for find in (min, max))
    times = f"{large.name} has {large.n_trainable / small.n_trainable:.0f} times the parameters of {small.name}"
    return Findings(
        sentences=(
            best_of(answers, bench.seed),
            f"{pair}: {compared(softmax.name, softmax.correct, binary.name, binary.correct, bench.seed)}",
            f"{times}. {compared(small.name, small.correct, large.name, large.correct, bench.seed)}",
        ),
        parts=(
            accuracy_bars("Accuracy of each head", answers),
            runs_table(
                runs,
                f"{task.train.shape[1]} features; AdamW with a one-cycle schedule. The probe is fitted "
                "to convergence, with regularization chosen by cross-validation. Details: the tutorial's network and the size of its head.",
                "Heads",
                ("none", *(source for _, source in HEADS.values())),
            ),
            by_epoch("Validation loss by epoch", runs[1:], "loss"),
            runs_table(two, title=f"Two classes: {pair}"),
        ),
        values={
            "accuracy": accuracies(answers),
            "n_parameters": {found.name: found.n_trainable for found in runs[1:]},
            "two_classes": accuracies({found.name: found.correct for found in two}),
        },
        facts=bench.facts(side=backbone.spec.height, epochs=epochs),
    )


def _task(bench: Bench, features: Features, train: Ints, held_out: Ints, n_classes: int) -> Task:
    """Stored features, standardized with the training images."""
    first, second = (features.block("last", rows).astype(np.float32) for rows in (train, held_out))
    mean, std = first.mean(0), first.std(0) + 1e-3
    labels = bench.labels
    return Task(
        (first - mean) / std, labels[train], (second - mean) / std, labels[held_out], None, n_classes, bench.seed
    )


def _learn(name: str, text: str, task: Task, epochs: int, outputs: Outputs) -> Learned:
    n_outputs = 1 if outputs == "binary" else task.n_classes
    head = seeded(lambda: Head(text, task.train.shape[1], n_outputs), task.seed)
    settings = TuneSettings(strategy="head", epochs=epochs, augment="none", lr="1e-3", batch_size=32, outputs=outputs)
    return learn(name, head, settings, task)


def _two_classes(bench: Bench, features: Features) -> tuple[str, Task]:
    """The two classes with the most held-out images."""
    counts = np.bincount(bench.labels[bench.held_out], minlength=len(bench.classes))
    pair = np.sort(np.argsort(-counts, kind="stable")[:2])
    train, held_out = (rows[np.isin(bench.labels[rows], pair)] for rows in (bench.train, bench.held_out))
    task = _task(bench, features, train, held_out, 2)
    labels = [np.searchsorted(pair, own) for own in (task.train_labels, task.held_out_labels)]
    names = " and ".join(bench.classes[label] for label in pair)
    return names, replace(task, train_labels=labels[0], held_out_labels=labels[1])
