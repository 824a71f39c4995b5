"""Train with and without normalization, test with and without: the tutorial's table, and what other statistics cost.

A head on frozen features is trained on images prepared one way and tested on images prepared in another. Normalization can
be forgotten in two ways: pixels stay between 0 and 1, or even between 0 and 255, as the decoder gives them.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from topwork.blocks import Bars, Grid, Table
from topwork.data.transforms import Pixels
from topwork.evaluation.preprocessing import (
    BYTES,
    UNIT,
    USUAL,
    Fit,
    Normalization,
    alternatives,
    misfit_sentence,
    statistics_fit,
)  # fmt: skip
from topwork.models.backbone import Backbone
from topwork.studies.bench import Bench, Bools
from topwork.studies.study import Findings, Measured
from topwork.studies.words import difference
from topwork.text import percent, points

SIDE, QUICK_SIDE = 160, 96
N_STATISTICS, N_SHOWN = 64, 3
WITH = "normalized"
# Left out altogether, and with the division by 255 left out as well.
FORGOTTEN = {"pixels 0 to 1": UNIT, "pixels 0 to 255": BYTES}


def run(bench: Bench) -> Findings:
    """The study."""
    backbone = bench.scaled(bench.side(SIDE, QUICK_SIDE))
    own = _declared(backbone)
    ways = {
        WITH: own,
        **FORGOTTEN,
        **{way.name: way for way in alternatives(backbone.spec) if way not in (UNIT, BYTES)},
    }
    features, heads = {}, {}
    for name, way in ways.items():
        bench.say(f"normalization: {name}")
        features[name] = bench.features(_under(backbone, way))
        heads[name] = bench.probe(features[name])
    main = (WITH, *FORGOTTEN)
    answers = {(a, b): bench.judged(heads[a], features[b]) for a in main for b in main}
    others = [
        (name, bench.judged(heads[WITH], features[name]), bench.judged(heads[name], features[name])) for name in ways
    ]
    images = bench.pixels(bench.train[:N_STATISTICS], backbone.spec.height)
    fits = statistics_fit(backbone, images)
    said = misfit_sentence(fits)
    shares = {pair: Measured.of(right) for pair, right in answers.items()}
    return Findings(
        sentences=(*_sentences(answers), *_wrong_sentence(others), *([said[1]] if said else [])),
        parts=(
            Table(
                "Trained and tested, with and without",
                ("trained on", *(f"tested on {name}" for name in main)),
                tuple((a, *(shares[a, b] for b in main)) for a in main),
                "The first tutorial's table, of guns and knives with a ResNet: 99.1 and 53.5 % trained with normalization and "
                "tested with and without it, 97.2 and 99.1 % trained without.",
            ),
            _pictures(images[:N_SHOWN], own),
            _channels(images, own),
            Bars(
                "The same head, tested under other statistics",
                "accuracy on held-out images",
                tuple((name, Measured.of(right)) for name, right, _ in others),
                "Trained under the backbone's own statistics; only the test is prepared differently.",
            ),
            Table(
                "Other statistics, and how well they fit the weights",
                ("statistics", "only tested so", "trained and tested so", "misfit"),
                tuple(_row(ways[name], name, tested, both, fits) for name, tested, both in others),
                "Misfit: distance between what the first batch norm saw in pretraining and what it sees now; 0 is perfect.",
            ),
        ),
        values={
            "accuracy": {f"trained on {a}, tested on {b}": share.value for (a, b), share in shares.items()},
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


def _under(backbone: Backbone, way: Normalization) -> Backbone:
    """The backbone with its input prepared in another way; the engine and the store tell them apart."""
    return replace(backbone, spec=replace(backbone.spec, mean=way.mean, std=way.std))


def _row(
    way: Normalization, name: str, tested: Bools, both: Bools, fits: tuple[Fit, ...]
) -> tuple[str, Measured, Measured, float | None]:
    misfit = next((fit.misfit for fit in fits if fit.normalization.name == way.name), None)
    return name, Measured.of(tested), Measured.of(both), misfit


def _sentences(answers: dict[tuple[str, str], Bools]) -> list[str]:
    said = []
    for name in FORGOTTEN:
        drop = difference(answers[WITH, WITH], answers[WITH, name])
        right, broken = (float(answers[WITH, tested].mean()) for tested in (WITH, name))
        facts = f"Trained on normalized images, the classifier is right for {percent(right)}; tested on {name}, for {percent(broken)}"
        if drop.is_clear and drop.value < 0:
            cost, low, high = (points(value)[1:] for value in (-drop.value, -drop.high, -drop.low))
            said.append(f"{facts}: forgetting the normalization in the test costs {cost} points ({low} to {high}).")
        else:
            said.append(f"{facts}: no clear difference on these {drop.n} images.")
    name = next(iter(FORGOTTEN))
    both, agreed = difference(answers[WITH, WITH], answers[name, name]), float(answers[name, name].mean())
    if both.is_clear:
        more = "less" if both.value < 0 else "more"
        said.append(
            f"Trained and tested on {name}, it is right for {percent(agreed)}, clearly {more} than with normalization in both "
            f"({points(both.value)} points): the head learns to live with odd features, but they are not those of pretraining."
        )
    else:
        said.append(
            f"Trained and tested on {name}, it is right for {percent(agreed)}: no clear difference from normalization in both. "
            "What must not happen is that training and test disagree."
        )
    return said


def _wrong_sentence(wrong: list[tuple[str, Bools, Bools]]) -> list[str]:
    own, others = wrong[0], wrong[1:]
    costs = [(name, difference(own[1], tested)) for name, tested, _ in others]
    clear = [(name, cost) for name, cost in costs if cost.is_clear and cost.value < 0]
    if not clear:
        return [f"None of {len(costs)} other usual statistics makes a clear difference when only the test uses them."]
    name, cost = min(clear, key=lambda found: found[1].value)
    return [
        f"{len(clear)} of {len(costs)} other usual statistics clearly cost accuracy when only the test uses them; the worst "
        f"is {name} ({points(cost.value)} points)."
    ]


def _channels(images: Pixels, own: Normalization) -> Table:
    values = images.reshape(-1, 3) / 255.0
    rows = []
    for channel, name in enumerate(("red", "green", "blue")):
        before = values[:, channel]
        after = (before - own.mean[channel]) / own.std[channel]
        rows.append((name, float(before.mean()), float(before.std()), float(after.mean()), float(after.std())))
    return Table(
        "Channel statistics",
        ("channel", "mean before", "deviation before", "mean after", "deviation after"),
        tuple(rows),
        f"Of {len(images)} training images; before: pixels from 0 to 1. After: less {own.name.replace('ImageNet', 'ImageNet')}.",
    )


def _pictures(images: Pixels, own: Normalization) -> Grid:
    """Before, after (what is outside 0 to 1 is cut off, as plotting libraries do), and after, stretched to be seen."""
    mean, std = np.array(own.mean), np.array(own.std)
    rows = []
    for number, image in enumerate(images, start=1):
        after = (image / 255.0 - mean) / std
        low, high = after.min(), after.max()
        stretched = (after - low) / max(high - low, 1e-9)
        rows.append((f"image {number}", (image, _bytes(after), _bytes(stretched))))
    return Grid(
        "Before and after",
        ("as decoded", "normalized, cut to 0..1", "normalized, stretched"),
        tuple(rows),
        "The middle is what a plot of the network's input looks like: half of the values are below 0 and turn black.",
    )


def _bytes(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Pixels:
    return np.asarray(np.clip(255 * values, 0, 255), np.uint8)
