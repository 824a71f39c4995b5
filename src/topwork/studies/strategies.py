"""Frozen features, the last stages or full fine-tuning: with few images and with many, on photographs and on outlines.

The fifth tutorial's rule of thumb: with little data that resembles the pretraining data, keep the features frozen; with more
data, or images that look different, fine-tune more layers. To change the resemblance only, the same images are reduced to
outlines.
"""

from __future__ import annotations

from dataclasses import replace

from topwork.blocks import Grid
from topwork.evaluation.perturb import edges
from topwork.models.backbone import Backbone
from topwork.studies.bench import Bench
from topwork.studies.learning import Learned, Task, fitted, learn, pretrained, runs_table, task_of
from topwork.studies.study import Findings, accuracies, accuracy_bars, best_of, compared
from topwork.training.recipe import TuneSettings

FEW = 5  # images per class
FROZEN, ALL = "frozen features", "full fine-tuning"
_BASE = TuneSettings(augment="none", batch_size=16)
TUNED = {"last stages": replace(_BASE, strategy="last", last_stages=2), ALL: _BASE}


def run(bench: Bench) -> Findings:
    """Runs the study."""
    backbone, epochs, few = bench.scaled(96, 48), bench.pick(3, 1), FEW * len(bench.classes)
    tasks = {"photographs": task_of(bench, backbone), "outlines": task_of(bench, backbone, edges)}
    runs: dict[str, list[Learned]] = {}
    for kind, task in tasks.items():
        for n in sorted({min(few, len(task.train)), len(task.train)}):
            bench.reporter.step(f"strategies: {n} {kind}")
            runs[f"{n} {kind}"] = _strategies(bench, task.first(n), kind, backbone, epochs)
    answers = {images: {found.name: found.correct for found in group} for images, group in runs.items()}
    return Findings(
        sentences=(
            *(f"{images}: {best_of(found, bench.seed)}" for images, found in answers.items()),
            *(
                f"{images}: {compared(FROZEN, found[FROZEN], ALL, found[ALL], bench.seed)}"
                for images, found in answers.items()
            ),
        ),
        parts=(
            *(accuracy_bars(f"Trained on {images}", found) for images, found in answers.items()),
            *(
                runs_table(
                    group,
                    "All start from the same fitted head. Frozen features: time for fitting the head on stored features.",
                    f"Runs on {images}",
                )
                for images, group in runs.items()
            ),
            Grid("The images", ("",) * 4, tuple((kind, tuple(task.train[:4])) for kind, task in tasks.items())),
        ),
        values={"accuracy": {images: accuracies(found) for images, found in answers.items()}},
        facts=tasks["photographs"].facts(bench, epochs),
    )


def _strategies(bench: Bench, task: Task, kind: str, backbone: Backbone, epochs: int) -> list[Learned]:
    """The three strategies on one set of images, starting from the head fitted on its frozen features."""
    head, frozen = fitted(bench, task, kind, backbone, FROZEN)
    return [frozen] + [
        learn(name, pretrained(backbone, task.n_classes, head), replace(settings, epochs=epochs), task)
        for name, settings in TUNED.items()
    ]
