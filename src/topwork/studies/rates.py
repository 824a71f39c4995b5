"""Learning rates: the range test, flat vs. one-cycle schedules, one rate vs. discriminative rates.

The suggestion of the range test is compared with rates 30 times lower and higher, with a flat schedule, and with rates that
increase with depth.
"""

from __future__ import annotations

from dataclasses import replace

from topwork.blocks import Chart, Series, Table
from topwork.settings import ScheduleName
from topwork.studies.bench import Bench
from topwork.studies.learning import by_epoch, learn, pretrained, runs_table, task_of
from topwork.studies.study import Findings, accuracies, accuracy_bars, compared
from topwork.training.finetune import data_facts, stage_names
from topwork.training.lr_range import range_test
from topwork.training.optimizer import rate_schedule
from topwork.training.recipe import TuneSettings, plan

FACTOR = 30
SPREAD = 100  # from the first stage to the head
CYCLE, FLAT, RISING = "one-cycle", "flat", "discriminative rates"
LOW, HIGH = "rate 30x lower", "rate 30x higher"
SCHEDULES: tuple[ScheduleName, ...] = ("one-cycle", "flat", "cosine", "step")


def run(bench: Bench) -> Findings:
    """Runs the study."""
    backbone, epochs = bench.scaled(96, 32), bench.pick(3, 1)
    task = task_of(bench, backbone)
    base = TuneSettings(strategy="all", epochs=epochs, augment="none", ema=None, batch_size=16, schedule="one-cycle")
    network = pretrained(backbone, task.n_classes, None, bench.seed)
    facts = data_facts(task.train_labels, task.n_classes, 0)
    recipe = plan(replace(base, lr="1"), facts, stage_names(network), bench.seed)
    bench.reporter.step("rates: the range test")
    test = range_test(network, recipe, task.dataset(), bench.pick(60, 20))
    best = min(0.1, test.suggestion)
    ways = {
        CYCLE: replace(base, lr=f"{best:.3g}"),
        FLAT: replace(base, lr=f"{best:.3g}", schedule="flat"),
        RISING: replace(base, lr=f"{best / SPREAD:.3g}:{best:.3g}"),
        LOW: replace(base, lr=f"{best / FACTOR:.3g}"),
        HIGH: replace(base, lr=f"{best * FACTOR:.3g}"),
    }
    runs = []
    for name, settings in ways.items():
        bench.reporter.step(f"rates: {name}")
        runs.append(learn(name, pretrained(backbone, task.n_classes, None, bench.seed), settings, task))
    answers = {found.name: found.correct for found in runs}
    pairs = ((FLAT, CYCLE), (CYCLE, RISING), (CYCLE, LOW), (CYCLE, HIGH))
    curve = Series("loss", tuple(zip(test.rates.tolist(), test.losses.tolist(), strict=True)))
    mark = Series("suggestion", ((best, float(test.losses.min())), (best, float(test.losses[0]))), kind="dashed")
    shapes = tuple(Series(s, tuple((n / 60, rate_schedule(s)(n / 60)) for n in range(61))) for s in SCHEDULES)
    return Findings(
        sentences=(
            f"Range test: {test.reason[0].lower()}{test.reason[1:]}",
            *(compared(one, answers[one], two, answers[two], bench.seed) for one, two in pairs),
        ),
        parts=(
            Chart("Range test", "learning rate", "smoothed training loss", (curve, mark), x_scale="log"),
            Chart("Schedules", "fraction of training", "fraction of the peak rate", shapes),
            accuracy_bars("After training", answers),
            by_epoch("Accuracy by epoch", runs, "accuracy"),
            runs_table(runs, "", more=[f"lr {way.lr}" for way in ways.values()]),
            Table("Rules of the range test", ("rule", "rate"), tuple(test.rules.items())),
        ),
        values={"suggestion": best, "rules": test.rules, "accuracy": accuracies(answers)},
        facts=task.facts(bench, epochs),
    )
