"""Train with and without normalization, test with and without: the tutorial's table, and what other statistics cost.

A head on frozen features is trained on images prepared one way and tested on images prepared another. Normalization can be
forgotten in two ways: pixels stay between 0 and 1, or even between 0 and 255, as the decoder gives them.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from topwork.blocks import Grid, Table
from topwork.data.transforms import Pixels
from topwork.evaluation.preprocessing import (
    BYTES,
    UNIT,
    USUAL,
    Normalization,
    alternatives,
    misfit_sentence,
    statistics_fit,
)
from topwork.models.backbone import Backbone
from topwork.studies.bench import Bench, Bools
from topwork.studies.study import Findings, Measured, accuracy_bars, difference
from topwork.text import percent

SIDE, QUICK_SIDE = 160, 96
N_STATISTICS, N_SHOWN = 64, 3
WITH = "normalized"
# Left out altogether, and with the division by 255 left out as well.
FORGOTTEN = {"pixels 0 to 1": UNIT, "pixels 0 to 255": BYTES}


def run(bench: Bench) -> Findings:
    """The study."""
    backbone = bench.scaled(bench.side(SIDE, QUICK_SIDE))
    own = _declared(backbone)
    others = {way.name: way for way in alternatives(backbone.spec) if way not in (UNIT, BYTES)}
    ways = {WITH: own, **FORGOTTEN, **others}
    features, heads = {}, {}
    for name, way in ways.items():
        bench.say(f"normalization: {name}")
        prepared = replace(backbone, spec=replace(backbone.spec, mean=way.mean, std=way.std))
        features[name] = bench.features(prepared)
        heads[name] = bench.probe(features[name])
    main = (WITH, *FORGOTTEN)
    answers = {(a, b): bench.correct(heads[a], features[b]) for a in main for b in main}
    tested = {name: bench.correct(heads[WITH], features[name]) for name in ways}
    both = {name: bench.correct(heads[name], features[name]) for name in ways}
    images = bench.pixels(bench.train[:N_STATISTICS], backbone.spec.height)
    fits = statistics_fit(backbone, images)
    misfit = {fit.normalization.name: fit.misfit for fit in fits}
    said = misfit_sentence(fits)
    return Findings(
        sentences=(*_sentences(answers), _others_sentence(tested), *([said[1]] if said else [])),
        parts=(
            Table(
                "Trained and tested, with and without",
                ("trained on", *(f"tested on {name}" for name in main)),
                tuple((a, *(Measured.of(answers[a, b]) for b in main)) for a in main),
                "The first tutorial's table (guns and knives, ResNet): trained with normalization, 99.1% tested with it and 53.5% "
                "without; trained without, 97.2% and 99.1%.",
            ),
            _pictures(images[:N_SHOWN], own),
            _channels(images, own),
            accuracy_bars("The same head, tested with other statistics", tested),
            Table(
                "Other statistics, and how well they fit the weights",
                ("statistics", "used in the test only", "used in training and test", "misfit"),
                tuple(
                    (name, Measured.of(tested[name]), Measured.of(both[name]), misfit.get(way.name))
                    for name, way in ways.items()
                ),
                "Misfit: distance between what the first batch norm saw in pretraining and what it sees now; 0 is perfect.",
            ),
        ),
        values={
            "accuracy": {f"trained on {a}, tested on {b}": float(right.mean()) for (a, b), right in answers.items()},
            "drops": {
                name: difference(answers[WITH, WITH], answers[WITH, name], bench.seed).as_dict() for name in FORGOTTEN
            },
            "mean": list(own.mean),
            "std": list(own.std),
        },
        facts=bench.facts(side=backbone.spec.height),
    )


def _declared(backbone: Backbone) -> Normalization:
    spec = backbone.spec
    known = [way for way in USUAL if way.is_that_of(spec)]
    return known[0] if known else Normalization("the backbone's own values", spec.mean, spec.std)


def _sentences(answers: dict[tuple[str, str], Bools]) -> list[str]:
    said, right = [], answers[WITH, WITH]
    for name in FORGOTTEN:
        change = difference(right, answers[WITH, name])
        costs = change.is_clear and change.value < 0
        verdict = "forgetting normalization in the test costs accuracy" if costs else "no significant difference"
        said.append(
            f"Trained on normalized images, accuracy is {percent(float(right.mean()))}; tested on {name}, "
            f"{percent(float(answers[WITH, name].mean()))} ({change}): {verdict}."
        )
    name = next(iter(FORGOTTEN))
    agreed = answers[name, name]
    change = difference(right, agreed)
    facts = f"Trained and tested on {name}, accuracy is {percent(float(agreed.mean()))} ({change} against normalization in both)"
    if change.is_clear:
        said.append(f"{facts}: the head adjusts to unusual features, but they are not those of pretraining.")
    else:
        said.append(f"{facts}: no significant difference. What matters is that training and test agree.")
    return said


def _others_sentence(tested: dict[str, Bools]) -> str:
    changes = {name: difference(tested[WITH], right) for name, right in tested.items() if name != WITH}
    costly = [name for name, change in changes.items() if change.is_clear and change.value < 0]
    if not costly:
        return (
            f"None of {len(changes)} other common statistics makes a significant difference if only the test uses them."
        )
    worst = min(costly, key=lambda name: changes[name].value)
    return (
        f"{len(costly)} of {len(changes)} other common statistics significantly cost accuracy if only the test uses them; the "
        f"worst is {worst} ({changes[worst]})."
    )


def _channels(images: Pixels, own: Normalization) -> Table:
    values = images.reshape(-1, 3) / 255.0
    after = (values - np.array(own.mean)) / np.array(own.std)
    columns = [values.mean(0), values.std(0), after.mean(0), after.std(0)]
    return Table(
        "Channel statistics",
        ("channel", "mean before", "standard deviation before", "mean after", "standard deviation after"),
        tuple((name, *(float(column[c]) for column in columns)) for c, name in enumerate(("red", "green", "blue"))),
        f"Of {len(images)} training images; before: pixels from 0 to 1. After: normalized with {own.name}.",
    )


def _pictures(images: Pixels, own: Normalization) -> Grid:
    """Before, after (what is outside 0 to 1 is clipped, as plotting libraries do), and after, stretched to be visible."""
    rows = []
    for number, image in enumerate(images, start=1):
        after = (image / 255.0 - np.array(own.mean)) / np.array(own.std)
        stretched = (after - after.min()) / max(after.max() - after.min(), 1e-9)
        shown = (np.asarray(np.clip(255 * values, 0, 255), np.uint8) for values in (after, stretched))
        rows.append((f"image {number}", (image, *shown)))
    return Grid(
        "Before and after",
        ("as decoded", "normalized, clipped to 0..1", "normalized, stretched"),
        tuple(rows),
        "The middle is what a plot of the network's input looks like: half of the values are below 0 and turn black.",
    )
