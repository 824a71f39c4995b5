"""Accuracy against images per class: measured with intervals, and what more images should bring.

Heads on frozen features are fitted on ever more images of each class and judged on the same held-out images; the law
``error = floor + scale n^-exponent`` (``evaluation/learning_curve.py``) says what twice and four times as many may bring.
"""

from __future__ import annotations

import numpy as np

from topwork.blocks import Chart, Series, Table
from topwork.evaluation.learning_curve import LearningCurve, learning_curve
from topwork.features.embed import Features
from topwork.features.probe import Probe, fit_probe
from topwork.studies.bench import Bench, Bools
from topwork.studies.study import Findings, Measured
from topwork.studies.words import compared, difference, share
from topwork.text import percent, points

SIDE, QUICK_SIDE = 224, 96
STEPS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def run(bench: Bench) -> Findings:
    """The study."""
    backbone = bench.scaled(bench.side(SIDE, QUICK_SIDE))
    features = bench.features(backbone)
    n_classes = len(bench.classes)
    n_all = len(bench.train)
    half = max(1, n_all // (2 * n_classes))  # images per class
    sizes = sorted({n for n in STEPS if n * n_classes < n_all * 0.45} | {half})
    answers: dict[int, Bools] = {}
    for n in sizes:
        head = bench.probe(features, bench.train[: n * n_classes])
        answers[n * n_classes] = bench.judged(head, features)
    probe = fit_probe(features, bench.labels, n_classes, rows=bench.train, head="plain", seed=bench.seed)
    answers[n_all] = bench.judged(probe.head, features)
    curve = _law(bench, features, probe)
    shares = {n: Measured.of(right) for n, right in answers.items()}
    return Findings(
        sentences=tuple(_sentences(answers, curve, n_classes, bench.seed)),
        parts=(
            _plot(shares, curve),
            Table(
                "Measured",
                ("training images", "a class", "accuracy on held-out images", "errors"),
                tuple((n, round(n / n_classes, 1), s, int((~answers[n]).sum())) for n, s in shares.items()),
                f"On the same {len(bench.held_out)} held-out images.",
            ),
            *([_forecasts(curve)] if curve else []),
        ),
        values={
            "accuracy": {str(n): share.value for n, share in shares.items()},
            "gain_of_twice": list(curve.gain) if curve else None,
        },
        facts=bench.facts(side=backbone.spec.height),
    )


def _law(bench: Bench, features: Features, probe: Probe) -> LearningCurve | None:
    """The law of the learning curve, from the training images alone."""
    chosen = next(trial for trial in probe.trials if trial.chosen)
    columns = probe.head.transform.apply({"last": features.block("last", bench.train)})
    labels = bench.labels[bench.train][probe.rows]
    correct = probe.out_of_fold_logits.argmax(1) == labels
    return learning_curve(
        columns[probe.rows], labels, np.arange(len(labels)), len(bench.classes), chosen.penalty, correct,
        1 - 1 / chosen.n_folds, bench.seed,
    )  # fmt: skip


def _plot(shares: dict[int, Measured], curve: LearningCurve | None) -> Chart:
    measured = Series(
        "measured on held-out images", tuple((float(n), s.value) for n, s in shares.items()),
        tuple((s.low, s.high) for s in shares.values()),
    )  # fmt: skip
    series = [measured]
    if curve:
        expected = tuple((float(f.n), f.accuracy) for f in curve.forecasts)
        spans = tuple((f.low, f.high) for f in curve.forecasts)
        series.append(Series("expected, from training images alone", expected, spans, kind="dashed"))
    return Chart(
        "Accuracy against training images", "training images", "accuracy", tuple(series), x_scale="log", y_is_share=True,
        note="Whiskers are 95 % intervals.",
    )  # fmt: skip


def _forecasts(curve: LearningCurve) -> Table:
    rows = tuple((f.n, f"{percent(f.accuracy)} ({100 * f.low:.1f} to {100 * f.high:.1f})") for f in curve.forecasts)
    return Table(
        "Expected with more images", ("training images", "accuracy"), rows,
        f"The likeliest law: error = {curve.floor:.3f} + {curve.scale:.2f} n^-{curve.exponent:.2f}.",
    )  # fmt: skip


def _sentences(answers: dict[int, Bools], curve: LearningCurve | None, n_classes: int, seed: int) -> list[str]:
    sizes = list(answers)
    first, last = answers[sizes[0]], answers[sizes[-1]]
    said = [
        f"With {sizes[0] / n_classes:.0f} images a class the head is right for {share(Measured.of(first))}, with "
        f"{sizes[-1] / n_classes:.0f} for {share(Measured.of(last))}."
    ]
    if len(sizes) > 1:
        is_half = abs(2 * sizes[-2] - sizes[-1]) <= 2 * n_classes  # within one image per class
        first_name = f"half as many ({sizes[-2]})" if is_half else f"{sizes[-2]} images"
        said.append(compared(first_name, answers[sizes[-2]], f"a head from all {sizes[-1]} images", last, seed))
        enough = next(n for n in sizes if not difference(answers[n], last, seed).is_clear)
        if enough < sizes[-1]:
            said.append(
                f"From {enough} images on, no clear difference from all {sizes[-1]} is seen on these held-out images."
            )
    if curve:
        gain, low, high = curve.gain
        said.append(
            f"Twice as many images should bring {points(gain)} points ({points(low)} to {points(high)}), by the law through "
            f"cross-validated heads{'' if low > 0 else ': no clear gain'}."
        )
    return said
