"""Accuracy by number of images per class, and the gain to expect from more images.

Heads on frozen features are fitted on more and more images per class and evaluated on the same held-out images. The power law
``error = floor + scale n^-exponent`` (``evaluation/learning_curve.py``) extrapolates to twice and four times as many.
"""

from __future__ import annotations

import numpy as np

from topwork.blocks import Chart, Series, Share, Table
from topwork.evaluation.intervals import wilson
from topwork.evaluation.learning_curve import LearningCurve, learning_curve
from topwork.features.embed import Features
from topwork.features.probe import Probe
from topwork.studies.bench import Bench, Bools
from topwork.studies.study import Findings, accuracies, compared, difference, measured, stated
from topwork.text import points

STEPS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def run(bench: Bench) -> Findings:
    """Runs the study."""
    backbone = bench.scaled(224, 96)
    features, n_classes, n_all = bench.features(backbone), len(bench.classes), len(bench.train)
    sizes = sorted({n * n_classes for n in STEPS if n * n_classes < n_all * 0.45} | {max(n_classes, n_all // 2)})
    probes = {n: bench.probe(features, bench.train[:n]) for n in sizes}
    probes[n_all] = bench.probe(features)
    answers = {n: bench.correct(probe, features) for n, probe in probes.items()}
    curve = _law(bench, features, probes[n_all])
    return Findings(
        sentences=tuple(_sentences(answers, curve, n_classes, bench.seed)),
        parts=(
            _chart(answers, curve),
            Table(
                "Measured",
                ("training images", "per class", "accuracy", "errors"),
                tuple((n, round(n / n_classes, 1), measured(a), int((~a).sum())) for n, a in answers.items()),
                f"On the same {len(bench.held_out)} held-out images.",
            ),
            *([_forecasts(curve)] if curve else []),
        ),
        values={
            "accuracy": accuracies({str(n): right for n, right in answers.items()}),
            "gain_of_twice": list(curve.gain) if curve else None,
        },
        facts=bench.facts(side=backbone.spec.height),
    )


def _law(bench: Bench, features: Features, probe: Probe) -> LearningCurve | None:
    """The learning curve's power law, from the training images alone."""
    chosen = next(trial for trial in probe.trials if trial.chosen)
    columns = probe.head.transform.apply({"last": features.block("last", bench.train)})
    labels = bench.labels[bench.train][probe.rows]
    correct = probe.out_of_fold_logits.argmax(1) == labels
    return learning_curve(
        columns[probe.rows], labels, np.arange(len(labels)), len(bench.classes), chosen.penalty, correct,
        1 - 1 / chosen.n_folds, bench.seed,
    )  # fmt: skip


def _chart(answers: dict[int, Bools], curve: LearningCurve | None) -> Chart:
    accuracy = {n: float(right.mean()) for n, right in answers.items()}
    intervals = [wilson(accuracy[n], len(right)) for n, right in answers.items()]
    spans = tuple((found.low, found.high) for found in intervals)
    series = [Series("measured on held-out images", tuple((float(n), v) for n, v in accuracy.items()), spans)]
    if curve:
        expected = tuple((float(f.n), f.accuracy) for f in curve.forecasts)
        spans = tuple((f.low, f.high) for f in curve.forecasts)
        series.append(Series("extrapolated from train only", expected, spans, kind="dashed"))
    return Chart(
        "Accuracy by number of training images", "training images", "accuracy", tuple(series), x_scale="log", y_is_share=True,
        note="Whiskers: 95% CI.",
    )  # fmt: skip


def _forecasts(curve: LearningCurve) -> Table:
    rows = tuple((f.n, Share(f.accuracy, f.low, f.high)) for f in curve.forecasts)
    note = f"Best fit: error = {curve.floor:.3f} + {curve.scale:.2f} n^-{curve.exponent:.2f}."
    return Table("Expected accuracy with more images", ("training images", "accuracy"), rows, note)


def _sentences(answers: dict[int, Bools], curve: LearningCurve | None, n_classes: int, seed: int) -> list[str]:
    sizes = list(answers)
    last = answers[sizes[-1]]
    said = [
        f"{n / n_classes:.0f} training images per class: {stated(answers[n])} accuracy."
        for n in dict.fromkeys((sizes[0], sizes[-1]))
    ]
    if len(sizes) > 1:
        said.append(compared(f"{sizes[-2]} images", answers[sizes[-2]], f"all {sizes[-1]} images", last, seed))
        enough = next(n for n in sizes if not difference(answers[n], last, seed).is_clear)
        if enough < sizes[-1]:
            said.append(f"From {enough} images on, the difference to all {sizes[-1]} images is not significant.")
    if curve:
        gain, low, high = map(points, curve.gain)
        said.append(
            f"Expected gain from twice as many images: {gain} points (95% CI {low} to {high}), extrapolated from the learning "
            f"curve{'' if curve.gain[1] > 0 else '; not a clear gain'}."
        )
    return said
