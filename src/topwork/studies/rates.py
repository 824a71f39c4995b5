"""Learning rates: the range test, flat against one-cycle, one rate against rates that rise with depth.

The range test raises the rate step by step on a copy and watches the loss; its suggestion is then tried, with a thirtieth
and thirty times of it, and with two schedules and two ways of spreading it over the stages.
"""

from __future__ import annotations

from topwork.blocks import Bars, Chart, Series, Table
from topwork.studies.bench import Bench
from topwork.studies.learning import Learned, learn, pretrained, task_of
from topwork.studies.study import Findings, Measured
from topwork.studies.words import compared, difference
from topwork.text import points
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
ONE_CYCLE, FLAT, RISING = "one-cycle", "flat", "rising with depth"


def run(bench: Bench) -> Findings:
    """The study."""
    side, epochs = bench.side(SIDE, QUICK_SIDE), QUICK_EPOCHS if bench.quick else EPOCHS
    task = task_of(bench, side, N_TRAIN, N_HELD_OUT)
    backbone = bench.scaled(side)
    base = TuneSettings(strategy="all", epochs=epochs, augment="none", ema=None, batch_size=16)
    network = pretrained(backbone, task.n_classes, None, bench.seed)
    recipe = plan(_at(base, 1.0), data_facts(task.train_labels, task.n_classes, 0), stage_names(network), bench.seed)
    bench.say("rates: the range test")
    test = range_test(network, recipe, task.stream(recipe), QUICK_STEPS if bench.quick else STEPS)
    best = min(0.1, test.suggestion)
    ways = {
        f"{ONE_CYCLE}, suggested rate": _at(base, best),
        f"{FLAT}, suggested rate": _at(base, best, schedule=FLAT),
        f"{ONE_CYCLE}, {RISING}": _at(base, best, lr=f"{best / SPREAD:.3g}:{best:.3g}"),
        f"{ONE_CYCLE}, a thirtieth": _at(base, best / FACTOR),
        f"{ONE_CYCLE}, thirty times": _at(base, best * FACTOR),
    }
    runs: dict[str, Learned] = {}
    for name, settings in ways.items():
        bench.say(f"rates: {name}")
        runs[name] = learn(name, pretrained(backbone, task.n_classes, None, bench.seed), settings, task)
    return Findings(
        sentences=(f"Range test: {test.reason[0].lower()}{test.reason[1:]}", *_sentences(runs, bench.seed)),
        parts=(
            Chart(
                "Range test",
                "learning rate",
                "training loss, smoothed",
                (
                    Series("loss", tuple(zip(test.rates.tolist(), test.losses.tolist(), strict=True))),
                    Series("suggestion", ((best, float(test.losses.min())), (best, float(test.losses[0]))), kind="dashed"),
                ),
                x_scale="log",
            ),
            _schedules(),
            Bars(
                "After training", "accuracy on held-out images",
                tuple((name, Measured.of(run.correct)) for name, run in runs.items()),
            ),
            Chart(
                "Accuracy by epoch", "epoch", "accuracy on held-out images",
                tuple(Series(run.name, tuple((float(e.number), float(e.correct.mean())) for e in run.epochs)) for run in runs.values()),
                y_is_share=True,
            ),
            Table(
                "All runs",
                ("run", "rate of the first stage", "rate of the head", "schedule", "accuracy", "loss on held-out images"),
                tuple(_row(name, ways[name], run) for name, run in runs.items()),
            ),
            Table(
                "What the range test reads from its curve", ("rule", "rate"),
                tuple((name, rate) for name, rate in test.rules.items()),
            ),
        ),
        values={
            "suggestion": best, "rules": test.rules, "accuracy": {name: run.accuracy for name, run in runs.items()},
        },
        facts=bench.facts(side=side, epochs=epochs, n_train=len(task.train), n_held_out=len(task.held_out)),
    )  # fmt: skip


def _at(base: TuneSettings, rate: float, schedule: str = ONE_CYCLE, lr: str | None = None) -> TuneSettings:
    from dataclasses import replace

    return replace(base, lr=lr or f"{rate:.3g}", schedule=schedule)  # type: ignore[arg-type]


def _schedules() -> Chart:
    """The factor on the rate over a phase."""
    series = []
    for name in (ONE_CYCLE, FLAT, "cosine", "step"):
        factor = rate_schedule(name)  # type: ignore[arg-type]
        series.append(Series(name, tuple((n / 60, factor(n / 60)) for n in range(61))))
    return Chart("Schedules", "share of the training done", "factor on the rate", tuple(series))


def _row(name: str, settings: TuneSettings, run: Learned) -> tuple[str, float, float, str, Measured, float]:
    low, _, high = settings.lr.partition(":")
    last = run.epochs[-1]
    return name, float(low), float(high or low), settings.schedule, Measured.of(run.correct), last.loss


def _sentences(runs: dict[str, Learned], seed: int) -> list[str]:
    cycle, flat, rising, low, high = runs.values()
    said = [
        compared("a flat rate of that size", flat.correct, "one-cycle", cycle.correct, seed),
        compared("one rate for all stages", cycle.correct, "a rate that rises with depth", rising.correct, seed),
    ]  # fmt: skip
    for words, other in (("a thirtieth of it", low), ("thirty times it", high)):
        found = difference(cycle.correct, other.correct, seed)
        facts = f"With {words} the accuracy changes by {points(found.value)} points ({points(found.low)} to {points(found.high)})"
        said.append(f"{facts}." if found.is_clear else f"{facts}: no clear difference.")
    return said
