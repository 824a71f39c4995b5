"""Training and testing with and without normalization, and with other statistics.

A head on frozen features is trained on images normalized one way and tested on images normalized another. Normalization can
be forgotten in two ways: pixels stay between 0 and 1, or even between 0 and 255, as decoded.
"""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np

from topwork.blocks import Grid, Table
from topwork.data.transforms import Pixels
from topwork.evaluation.perturb import (
    BYTES,
    UNIT,
    Normalization,
    alternatives,
    declared,
    misfit_sentence,
    statistics_fit,
)
from topwork.studies.bench import Bench
from topwork.studies.study import Findings, accuracy_bars, best_of, compared, difference, measured

WITH = "normalized"
# No normalization, and no division by 255 either.
FORGOTTEN = {"pixels 0 to 1": UNIT, "pixels 0 to 255": BYTES}


def run(bench: Bench) -> Findings:
    """Runs the study."""
    backbone = bench.scaled(160, 96)
    images = bench.pixels(bench.train[:64], backbone)
    own, fits = declared(backbone.spec), statistics_fit(backbone, images)
    others = {way.name: way for way in alternatives(backbone.spec) if way not in (UNIT, BYTES)}
    ways = {WITH: own, **FORGOTTEN, **others}
    features, probes = {}, {}
    for name, way in ways.items():
        bench.reporter.step(f"normalization: {name}")
        features[name] = bench.features(replace(backbone, spec=replace(backbone.spec, mean=way.mean, std=way.std)))
        probes[name] = bench.probe(features[name])
    main = (WITH, *FORGOTTEN)
    answers = {(a, b): bench.correct(probes[a], features[b]) for a in main for b in main}
    tested = {name: bench.correct(probes[WITH], features[name]) for name in ways}
    both = {name: bench.correct(probes[name], features[name]) for name in ways}
    misfit = {fit.normalization: fit.misfit for fit in fits}
    said = misfit_sentence(fits)
    return Findings(
        sentences=(
            *(compared("normalized in training and test", answers[WITH, WITH], f"normalized in training only (test: {name})", answers[WITH, name], bench.seed) for name in FORGOTTEN),
            *(compared("normalized in training and test", answers[WITH, WITH], f"{name} in training and test", answers[name, name], bench.seed) for name in FORGOTTEN),
            f"Other statistics in the test only. {best_of(tested, bench.seed)}",
            *([said[1]] if said else []),
        ),
        parts=(
            Table(
                "Accuracy with and without normalization",
                ("trained on", *(f"tested on {name}" for name in main)),
                tuple((a, *(measured(answers[a, b]) for b in main)) for a in main),
                "In the tutorial (guns and knives, ResNet): trained with normalization, 99.1% when tested with it and 53.5% without; "
                "trained without, 97.2% and 99.1%.",
            ),
            _pictures(images[:3], own),
            _channels(images, own),
            accuracy_bars("The same head, tested with other statistics", tested),
            Table(
                "How well other statistics fit the weights",
                ("statistics", "in the test only", "in training and test", "misfit"),
                tuple((name, measured(tested[name]), measured(both[name]), misfit.get(way)) for name, way in ways.items()),
                "Misfit: distance between the statistics of the first batch norm in pretraining and now; 0 is perfect.",
            ),
        ),
        values={
            "accuracy": {f"trained on {a}, tested on {b}": float(right.mean()) for (a, b), right in answers.items()},
            "drops": {name: asdict(difference(answers[WITH, WITH], answers[WITH, name], bench.seed)) for name in FORGOTTEN},
            "mean": list(own.mean), "std": list(own.std),
        },
        facts=bench.facts(side=backbone.spec.height),
    )  # fmt: skip


def _channels(images: Pixels, own: Normalization) -> Table:
    values = images.reshape(-1, 3) / 255.0
    after = (values - np.array(own.mean)) / np.array(own.std)
    columns = [values.mean(0), values.std(0), after.mean(0), after.std(0)]
    return Table(
        "Channel statistics",
        ("channel", "mean before", "std before", "mean after", "std after"),
        tuple((name, *(float(column[c]) for column in columns)) for c, name in enumerate(("red", "green", "blue"))),
        f"On {len(images)} training images. Before: pixels from 0 to 1. After: normalized with {own.name}.",
    )


def _pictures(images: Pixels, own: Normalization) -> Grid:
    """Before, after (clipped to 0..1, as plotting libraries do), and after, rescaled to be visible."""
    rows = []
    for number, image in enumerate(images, start=1):
        after = (image / 255.0 - np.array(own.mean)) / np.array(own.std)
        stretched = (after - after.min()) / max(after.max() - after.min(), 1e-9)
        shown = (np.asarray(np.clip(255 * values, 0, 255), np.uint8) for values in (after, stretched))
        rows.append((f"image {number}", (image, *shown)))
    columns = ("as decoded", "normalized, clipped to 0..1", "normalized, stretched")
    note = "Middle: how a plot of the network input usually looks. Half of the values are below 0 and turn black."
    return Grid("Before and after", columns, tuple(rows), note)
