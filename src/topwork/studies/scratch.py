"""Pretrained against from scratch: at equal epochs, and at equal time.

The lecture's six convolution blocks, a plain deep network, a residual one, and the backbone with random weights, against the
same backbone with pretrained ones. At equal time, every network from scratch trains as many epochs as fit into the time
that the pretrained one took.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from topwork.blocks import Bars, Chart, Series, Table
from topwork.models.backbone import load_backbone
from topwork.models.modules import SixBlockNetwork
from topwork.models.small_networks import DeepNetwork, ResNet9
from topwork.studies.bench import Bench
from topwork.studies.learning import Learned, learn, pretrained, seeded, task_of
from topwork.studies.study import Findings, Measured, accuracy_bars, difference
from topwork.text import count, join_names, percent
from topwork.training.recipe import TuneSettings

SIDE, QUICK_SIDE = 96, 64
N_TRAIN, N_HELD_OUT = 240, 200
EPOCHS, QUICK_EPOCHS = 4, 3
MAX_EPOCHS = 30  # at equal time
PRETRAINED = "pretrained"
Runs = dict[str, Learned]


def run(bench: Bench) -> Findings:
    """The study."""
    side, epochs = bench.side(SIDE, QUICK_SIDE), QUICK_EPOCHS if bench.quick else EPOCHS
    task = task_of(bench, side, N_TRAIN, N_HELD_OUT)
    settings = TuneSettings(epochs=epochs, augment="flip", batch_size=16)
    bench.say("scratch: the pretrained network")
    network = pretrained(bench.scaled(side), task.n_classes, None, bench.seed)
    tuned = learn(PRETRAINED, network, replace(settings, lr="2e-4:2e-3", strategy="all"), task)

    def from_scratch(name: str, make: Callable[[], nn.Module], n_epochs: int) -> Learned:
        return learn(name, seeded(make, task.seed), replace(settings, strategy="scratch", epochs=n_epochs), task)

    equal_epochs, equal_time = {}, {}
    for name, make in _networks(bench, task.n_classes).items():
        bench.say(f"scratch: {name}")
        short = equal_epochs[name] = from_scratch(name, make, epochs)
        fitting = min(MAX_EPOCHS, int(epochs * tuned.seconds / short.seconds))
        equal_time[name] = short if fitting <= epochs else from_scratch(name, make, fitting)
    every = list(dict.fromkeys((tuned, *equal_epochs.values(), *equal_time.values())))
    return Findings(
        sentences=tuple(_sentences(tuned, equal_epochs, equal_time, task.n_classes, bench.seed)),
        parts=(
            _bars("At equal epochs", tuned, equal_epochs),
            _bars("At equal time", tuned, equal_time),
            Chart(
                "Accuracy against training time",
                "seconds",
                "accuracy on held-out images",
                tuple(
                    Series(found.name, tuple((epoch.seconds, float(epoch.correct.mean())) for epoch in found.epochs))
                    for found in (tuned, *equal_time.values())
                ),
                y_is_share=True,
            ),
            Table(
                "All runs",
                ("network", "parameters", "epochs", "seconds", "accuracy", "loss on held-out images"),
                tuple(
                    (r.name, r.n_parameters, len(r.epochs), r.seconds, Measured.of(r.correct), r.epochs[-1].loss) for r in every
                ),
                f"{len(task.train)} training images at {side} px with random flips; AdamW, one-cycle. In the lecture: 98% with a "
                "pretrained VGG16, 86% from scratch with the six blocks (cats and dogs, 500 images per class).",
            ),
        ),
        values={
            "accuracy": {PRETRAINED: tuned.accuracy}
            | {f"{name}, equal epochs": found.accuracy for name, found in equal_epochs.items()}
            | {f"{name}, equal time": found.accuracy for name, found in equal_time.items()},
            "differences": {
                name: difference(r.correct, tuned.correct, bench.seed).as_dict() for name, r in equal_time.items()
            },
        },
        facts=bench.facts(side=side, epochs=epochs, n_train=len(task.train), n_held_out=len(task.held_out)),
    )  # fmt: skip


def _networks(bench: Bench, n_classes: int) -> dict[str, Callable[[], nn.Module]]:
    """The networks that start at random; narrow ones, so that two cores are enough."""
    random = load_backbone(f"random:{bench.backbone.architecture}")
    return {
        "six blocks": lambda: SixBlockNetwork(n_classes, narrower=8, padding=1),
        "plain, 12 layers": lambda: DeepNetwork(n_classes, 12, 16, norm=True),
        "residual, ResNet-9": lambda: ResNet9(n_classes, width=8),
        f"{bench.backbone.name}, random": lambda: pretrained(random, n_classes, None, bench.seed),
    }


def _bars(title: str, tuned: Learned, others: Runs) -> Bars:
    return accuracy_bars(title, {f"{r.name} ({len(r.epochs)} epochs)": r.correct for r in (tuned, *others.values())})


def _sentences(tuned: Learned, equal_epochs: Runs, equal_time: Runs, n_classes: int, seed: int) -> list[str]:
    said = []
    for words, group in (("equal epochs", equal_epochs), ("equal time", equal_time)):
        best = max(group.values(), key=lambda found: found.accuracy)
        gain = difference(best.correct, tuned.correct, seed)
        facts = (
            f"At {words}: pretrained {percent(tuned.accuracy)}, best from scratch ({best.name}) {percent(best.accuracy)}; "
            f"difference {gain}"
        )
        verdict = "No significant difference" if not gain.is_clear else (
            "Pretraining is significantly better" if gain.value > 0 else "From scratch is significantly better"
        )  # fmt: skip
        said.append(f"{facts}. {verdict} on {gain.n} images.")
    chance = 1 / n_classes
    lost = [name for name, found in equal_epochs.items() if Measured.of(found.correct).low <= chance]
    if lost:
        after = count(len(tuned.epochs), "epoch")
        said.append(f"After {after}, {join_names(lost)} are no better than guessing ({percent(chance)}).")
    return said
