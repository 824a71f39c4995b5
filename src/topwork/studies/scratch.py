"""Pretrained against from scratch: at equal epochs, and at equal time.

The lecture's six blocks of convolution, a plain deep network, a residual one, and the backbone itself with random
weights, against the same backbone with pretrained ones. Equal time means: every network from scratch trains as many
epochs as fit into the time that the pretrained one took.
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
from topwork.studies.learning import Learned, Task, learn, pretrained, seeded, task_of
from topwork.studies.study import Findings, Measured
from topwork.studies.words import difference
from topwork.text import count, join_names, percent, points
from topwork.training.recipe import TuneSettings

SIDE, QUICK_SIDE = 96, 64
N_TRAIN, N_HELD_OUT = 240, 200
EPOCHS, QUICK_EPOCHS = 4, 3
MAX_EPOCHS = 30  # at equal time
PRETRAINED = "pretrained"


def run(bench: Bench) -> Findings:
    """The study."""
    side, epochs = bench.side(SIDE, QUICK_SIDE), QUICK_EPOCHS if bench.quick else EPOCHS
    task = task_of(bench, side, N_TRAIN, N_HELD_OUT)
    settings = TuneSettings(epochs=epochs, augment="flip", batch_size=16)
    bench.say("scratch: the pretrained network")
    tuned = learn(
        PRETRAINED,
        pretrained(bench.scaled(side), task.n_classes, None, bench.seed),
        replace(settings, lr="2e-4:2e-3", strategy="all"),
        task,
    )
    equal_epochs, equal_time = {}, {}
    for name, make in _networks(bench, task.n_classes).items():
        bench.say(f"scratch: {name}")
        short = _from_scratch(name, make, settings, task, epochs)
        fitting = min(MAX_EPOCHS, int(epochs * tuned.seconds / short.seconds))
        equal_epochs[name] = short
        equal_time[name] = short if fitting <= epochs else _from_scratch(name, make, settings, task, fitting)
    return Findings(
        sentences=tuple(_sentences(tuned, equal_epochs, equal_time, task.n_classes, bench.seed)),
        parts=(
            _bars("At equal epochs", tuned, equal_epochs),
            _bars("At equal time", tuned, equal_time),
            Chart(
                "Accuracy against time of training",
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
                tuple(_row(found) for found in _distinct(tuned, equal_epochs, equal_time)),
                f"{len(task.train)} training images at {side} px, mirrored at random; one-cycle rates with AdamW. The lecture: "
                "98 % with a pretrained VGG16, 86 % from scratch with the six blocks, cats and dogs, 500 images of each.",
            ),
        ),
        values={
            "accuracy": {PRETRAINED: tuned.accuracy}
            | {f"{name}, equal epochs": found.accuracy for name, found in equal_epochs.items()}
            | {f"{name}, equal time": found.accuracy for name, found in equal_time.items()},
            "differences": {
                name: difference(found.correct, tuned.correct, bench.seed).as_dict()
                for name, found in equal_time.items()
            },
        },
        facts=bench.facts(side=side, epochs=epochs, n_train=len(task.train), n_held_out=len(task.held_out)),
    )  # fmt: skip


def _networks(bench: Bench, n_classes: int) -> dict[str, Callable[[], nn.Module]]:
    """The networks that start at random; narrow ones, so that two cores are enough."""
    made: dict[str, Callable[[], nn.Module]] = {
        "six blocks": lambda: SixBlockNetwork(n_classes, narrower=8, padding=1),
        "plain, 12 layers": lambda: DeepNetwork(n_classes, 12, 16, norm=True),
        "residual, ResNet-9": lambda: ResNet9(n_classes, width=8),
    }
    random = load_backbone(f"random:{bench.backbone.architecture}")
    made[f"{bench.backbone.name}, random"] = lambda: pretrained(random, n_classes, None, bench.seed)
    return made


def _from_scratch(name: str, make: Callable[[], nn.Module], settings: TuneSettings, task: Task, epochs: int) -> Learned:
    chosen = replace(settings, strategy="scratch", epochs=epochs)
    return learn(name, seeded(make, task.seed), chosen, task)


def _bars(title: str, tuned: Learned, others: dict[str, Learned]) -> Bars:
    rows = [
        (f"{found.name} ({len(found.epochs)} epochs)", Measured.of(found.correct))
        for found in (tuned, *others.values())
    ]
    return Bars(title, "accuracy on held-out images", tuple(rows))


def _row(found: Learned) -> tuple[str, int, int, float, Measured, float]:
    last = found.epochs[-1]
    return found.name, found.n_parameters, last.number, found.seconds, Measured.of(found.correct), last.loss


def _distinct(tuned: Learned, *groups: dict[str, Learned]) -> list[Learned]:
    found = [tuned]
    for group in groups:
        found += [learned for learned in group.values() if learned not in found]
    return found


def _sentences(
    tuned: Learned, equal_epochs: dict[str, Learned], equal_time: dict[str, Learned], n_classes: int, seed: int
) -> list[str]:
    said = []
    for words, group in (("equal epochs", equal_epochs), ("equal time", equal_time)):
        best = max(group.values(), key=lambda found: found.accuracy)
        gain = difference(best.correct, tuned.correct, seed)
        facts = (
            f"At {words}, the pretrained network is right for {percent(tuned.accuracy)} and the best from scratch, "
            f"{best.name}, for {percent(best.accuracy)}: {points(gain.value)} points ({points(gain.low)} to {points(gain.high)})"
        )
        if not gain.is_clear:
            said.append(f"{facts}. No clear difference on {gain.n} images.")
        else:
            who = "Pretraining is far ahead" if gain.value > 0 else "From scratch is ahead"
            said.append(f"{facts}. {who}, outside the noise.")
    chance = 1 / n_classes
    lost = [name for name, found in equal_epochs.items() if Measured.of(found.correct).low <= chance]
    if lost:
        said.append(
            f"After {count(len(tuned.epochs), 'epoch')}, {join_names(lost)} cannot be told from guessing ({percent(chance)})."
        )
    return said
