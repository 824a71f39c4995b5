"""Learning rates: the range test, flat against one-cycle, one rate against rates that rise with depth.

The range test raises the rate step by step on a copy and watches the loss. Its suggestion is then tried, with a thirtieth and
thirty times of it, and with two schedules and two ways of spreading it over the stages.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from topwork.blocks import Chart, Series, Table
from topwork.studies.bench import Bench
from topwork.studies.learning import Learned, by_epoch, learn, pretrained, task_of
from topwork.studies.study import Findings, Measured, accuracy_bars, compared, difference
from topwork.training.finetune import data_facts, stage_names
from topwork.training.lr_range import range_test
from topwork.training.recipe import TuneSettings, plan
from topwork.training.schedule import rate_schedule

SIDE, QUICK_SIDE = 96, 32
N_TRAIN, N_HELD_OUT = 240, 200
EPOCHS, QUICK_EPOCHS = 3, 1
STEPS, QUICK_STEPS = 60, 20
FACTOR = 30
SPREAD = 100  # from the first stage to the head
SCHEDULES: tuple[Any, ...] = ("one-cycle", "flat", "cosine", "step")


def run(bench: Bench) -> Findings:
    """The study."""
    side, epochs = bench.side(SIDE, QUICK_SIDE), QUICK_EPOCHS if bench.quick else EPOCHS
    task = task_of(bench, side, N_TRAIN, N_HELD_OUT)
    backbone = bench.scaled(side)
    base = TuneSettings(strategy="all", epochs=epochs, augment="none", ema=None, batch_size=16, schedule="one-cycle")
    network = pretrained(backbone, task.n_classes, None, bench.seed)
    facts = data_facts(task.train_labels, task.n_classes, 0)
    recipe = plan(replace(base, lr="1"), facts, stage_names(network), bench.seed)
    bench.say("rates: the range test")
    test = range_test(network, recipe, task.stream(recipe), QUICK_STEPS if bench.quick else STEPS)
    best = min(0.1, test.suggestion)
    ways = {
        "one-cycle, suggested rate": replace(base, lr=f"{best:.3g}"),
        "flat, suggested rate": replace(base, lr=f"{best:.3g}", schedule="flat"),
        "one-cycle, rising with depth": replace(base, lr=f"{best / SPREAD:.3g}:{best:.3g}"),
        "one-cycle, a thirtieth": replace(base, lr=f"{best / FACTOR:.3g}"),
        "one-cycle, thirty times": replace(base, lr=f"{best * FACTOR:.3g}"),
    }
    runs: dict[str, Learned] = {}
    for name, settings in ways.items():
        bench.say(f"rates: {name}")
        runs[name] = learn(name, pretrained(backbone, task.n_classes, None, bench.seed), settings, task)
    curve = Series("loss", tuple(zip(test.rates.tolist(), test.losses.tolist(), strict=True)))
    mark = Series("suggestion", ((best, float(test.losses.min())), (best, float(test.losses[0]))), kind="dashed")
    rows = tuple(
        (name, *_ends(ways[name].lr), ways[name].schedule, Measured.of(r.correct), r.epochs[-1].loss)
        for name, r in runs.items()
    )
    return Findings(
        sentences=(f"Range test: {test.reason[0].lower()}{test.reason[1:]}", *_sentences(runs, bench.seed)),
        parts=(
            Chart("Range test", "learning rate", "training loss, smoothed", (curve, mark), x_scale="log"),
            Chart(
                "Schedules",
                "fraction of training done",
                "factor on the rate",
                tuple(Series(s, tuple((n / 60, rate_schedule(s)(n / 60)) for n in range(61))) for s in SCHEDULES),
            ),
            accuracy_bars("After training", {name: found.correct for name, found in runs.items()}),
            by_epoch("Accuracy by epoch", runs.values(), "accuracy"),
            Table(
                "All runs",
                (
                    "run",
                    "rate of the first stage",
                    "rate of the head",
                    "schedule",
                    "accuracy",
                    "loss on held-out images",
                ),
                rows,
            ),
            Table("Rates that the rules of the range test suggest", ("rule", "rate"), tuple(test.rules.items())),
        ),
        values={
            "suggestion": best,
            "rules": test.rules,
            "accuracy": {name: found.accuracy for name, found in runs.items()},
        },
        facts=bench.facts(side=side, epochs=epochs, n_train=len(task.train), n_held_out=len(task.held_out)),
    )


def _ends(lr: str) -> tuple[float, float]:
    low, _, high = lr.partition(":")
    return float(low), float(high or low)


def _sentences(runs: dict[str, Learned], seed: int) -> list[str]:
    cycle, flat, rising, low, high = runs.values()
    said = [
        compared("a flat schedule", flat.correct, "one-cycle", cycle.correct, seed),
        compared("one rate for all stages", cycle.correct, "a rate that rises with depth", rising.correct, seed),
    ]
    for words, other in (("A thirtieth of the rate", low), ("Thirty times the rate", high)):
        found = difference(cycle.correct, other.correct, seed)
        said.append(f"{words} changes accuracy by {found}{'' if found.is_clear else ': no significant difference'}.")
    return said
