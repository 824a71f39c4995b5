"""Pretrained vs. from scratch: at equal epochs, and at equal time.

The lecture's six convolution blocks, a plain deep network, a residual one, and the backbone with random weights, against the
same backbone with pretrained ones. At equal time, every network from scratch trains as many epochs as fit into the time
that the pretrained one took.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace

from torch import nn

from topwork.blocks import Chart, Series
from topwork.evaluation.intervals import wilson
from topwork.models.backbone import load_backbone
from topwork.models.modules import SixBlockNetwork
from topwork.models.small_networks import DeepNetwork, ResNet9
from topwork.studies.bench import Bench
from topwork.studies.learning import Learned, learn, pretrained, runs_table, seeded, task_of
from topwork.studies.study import Findings, accuracies, accuracy_bars, compared, difference
from topwork.text import join_names, percent
from topwork.training.recipe import TuneSettings

MAX_EPOCHS = 30  # at equal time
PRETRAINED = "pretrained"
Runs = dict[str, Learned]


def run(bench: Bench) -> Findings:
    """Runs the study."""
    backbone, epochs = bench.scaled(96, 64), bench.pick(4, 3)
    task = task_of(bench, backbone)
    settings = TuneSettings(epochs=epochs, augment="flip", batch_size=16)
    bench.reporter.step("scratch: the pretrained network")
    network = pretrained(backbone, task.n_classes, None, bench.seed)
    tuned = learn(PRETRAINED, network, replace(settings, lr="2e-4:2e-3", strategy="all"), task)

    def from_scratch(name: str, make: Callable[[], nn.Module], n_epochs: int) -> Learned:
        return learn(name, seeded(make, task.seed), replace(settings, strategy="scratch", epochs=n_epochs), task)

    equal_epochs, equal_time = {}, {}
    for name, make in _networks(bench, task.n_classes).items():
        bench.reporter.step(f"scratch: {name}")
        short = equal_epochs[name] = from_scratch(name, make, epochs)
        fitting = min(MAX_EPOCHS, int(epochs * tuned.last.seconds / short.last.seconds))
        equal_time[name] = short if fitting <= epochs else from_scratch(name, make, fitting)
    groups = {"equal epochs": equal_epochs, "equal time": equal_time}
    answers = {
        what: {f"{r.name} ({len(r.epochs)} epochs)": r.correct for r in (tuned, *group.values())}
        for what, group in groups.items()
    }
    curves = tuple(
        Series(found.name, tuple((epoch.seconds, float(epoch.correct.mean())) for epoch in found.epochs))
        for found in (tuned, *equal_time.values())
    )
    return Findings(
        sentences=tuple(_sentences(tuned, groups, task.n_classes, bench.seed)),
        parts=(
            *(accuracy_bars(f"At {what}", found) for what, found in answers.items()),
            Chart("Accuracy by training time", "seconds", "accuracy on held-out images", curves, y_is_share=True),
            runs_table(
                dict.fromkeys((tuned, *equal_epochs.values(), *equal_time.values())),
                f"{len(task.train)} training images with random flips; AdamW, one-cycle. In the lecture: 98% with a "
                "pretrained VGG16, 86% with six blocks from scratch (cats and dogs, 500 images per class).",
            ),
        ),
        values={
            "accuracy": accuracies(
                {PRETRAINED: tuned.correct}
                | {f"{name}, {what}": found.correct for what, group in groups.items() for name, found in group.items()}
            ),
            "differences": {
                name: asdict(difference(r.correct, tuned.correct, bench.seed)) for name, r in equal_time.items()
            },
        },
        facts=task.facts(bench, epochs),
    )


def _networks(bench: Bench, n_classes: int) -> dict[str, Callable[[], nn.Module]]:
    """Randomly initialized networks, narrow enough for two cores."""
    random = load_backbone(f"random:{bench.backbone.architecture}")
    return {
        "six blocks": lambda: SixBlockNetwork(n_classes, narrower=8, padding=1),
        "plain, 12 layers": lambda: DeepNetwork(n_classes, 12, 16, norm=True),
        "residual, ResNet-9": lambda: ResNet9(n_classes, width=8),
        f"{bench.backbone.name}, random": lambda: pretrained(random, n_classes, None, bench.seed),
    }


def _sentences(tuned: Learned, groups: dict[str, Runs], n_classes: int, seed: int) -> list[str]:
    said = []
    for what, group in groups.items():
        best = max(group.values(), key=lambda found: float(found.correct.mean()))
        text = compared(f"{best.name}, the best from scratch", best.correct, PRETRAINED, tuned.correct, seed)
        said.append(f"At {what}: {text}")
    short, guess = groups["equal epochs"].values(), 1 / n_classes
    lost = [r.name for r in short if wilson(float(r.correct.mean()), len(r.correct)).low <= guess]
    if lost:
        said.append(f"At equal epochs, no better than guessing ({percent(guess)}): {join_names(lost)}.")
    return said
