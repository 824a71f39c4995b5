"""When the pictures change: what a trained head loses on images of another look, and what gets it back without labels.

Where the data names domains (a column, or --domain-by) the first domain trains and every other one is new. Elsewhere the
held-out images are changed: gray, blurred, reduced to outlines. The new images are answered by the head as it is, by the
head adapted without their labels (``adaptation/guards.py``), and by one that got five labels a class as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from topwork.adaptation.adapted_head import adapted_head
from topwork.adaptation.align import Domains, Rows
from topwork.adaptation.expected import predicted_accuracy
from topwork.adaptation.guards import Choice, choose
from topwork.blocks import AnyCell, Bars, Grid, Table
from topwork.data.transforms import Pixels
from topwork.evaluation.perturb import PERTURBATIONS
from topwork.evaluation.predictions import softmax
from topwork.models.head import LinearHead
from topwork.studies.bench import Bench, Bools, Ints
from topwork.studies.study import Findings, Measured, Part
from topwork.studies.words import difference
from topwork.text import percent, points

SIDE, QUICK_SIDE = 224, 96
CHANGES = ("gray", "blur", "edges")
N_LABELS = 5  # a class
PENALTY = 3e-3
N_SHOWN = 4
AS_IT_IS, ADAPTED, LABELED = "as it is", "adapted, no labels", f"adapted, {N_LABELS} labels a class"


@dataclass(frozen=True, eq=False)
class Shift:
    """One new domain: its columns and labels, answers right or wrong by way, and the source's before and after."""

    name: str
    truth: Ints
    right: dict[str, Bools]
    judged: Bools
    choice: Choice
    expected: float
    source: tuple[Bools, Bools]


def run(bench: Bench) -> Findings:
    """The study."""
    side = bench.side(SIDE, QUICK_SIDE)
    named = sorted({sample.domain for sample in bench.manifest.samples if sample.domain})
    shifts, grid = _between_domains(bench, side, named) if len(named) > 1 else _changed(bench, side)
    rows: list[tuple[AnyCell, ...]] = []
    for shift in shifts:
        measured = {way: Measured.of(right[shift.judged]) for way, right in shift.right.items()}
        before, after = (Measured.of(right) for right in shift.source)
        rows.append((shift.name, *measured.values(), percent(shift.expected), shift.choice.outcome, before, after))
    parts: list[Part] = [
        Table(
            "New looks",
            (
                "new images",
                *shifts[0].right,
                "expected without labels",
                "decision",
                "old images before",
                "old images after",
            ),
            tuple(rows),
            "EvaluatedPart on images whose label nobody gave. Expected: of the head as it is, from the methods' agreement.",
        ),
        *(
            Bars(
                f"On {shift.name}",
                "accuracy on new images",
                tuple((way, Measured.of(right[shift.judged])) for way, right in shift.right.items()),
            )
            for shift in shifts
        ),
    ]
    return Findings(
        sentences=tuple(_sentence(shift, bench.seed) for shift in shifts) + _summary(shifts),
        parts=(*parts, *([grid] if grid else [])),
        values={
            shift.name: {
                **{way: float(right[shift.judged].mean()) for way, right in shift.right.items()},
                "outcome": shift.choice.outcome,
                "method": shift.choice.method,
                "expected": shift.expected,
                "distance": shift.choice.distance.as_dict(),
            }
            for shift in shifts
        },
        facts=bench.facts(side=side),
    )


def _changed(bench: Bench, side: int) -> tuple[list[Shift], Grid]:
    """The held-out images under changes, against the training images as they are."""
    backbone = bench.scaled(side)
    rows = np.concatenate([bench.train, bench.held_out])
    plain = bench.pixels(rows, side)
    n = len(bench.train)
    features = bench.embedded(rows, plain, f"plain {side}", backbone)
    labels = bench.labels[rows]
    head = bench.probe_on(features, np.arange(n), labels[:n])
    columns = _columns(head, features.blocks(head.transform.blocks))
    shifts, pictures = [], [("as they are", _few(plain[n:]))]
    for name in CHANGES:
        change = next(found for found in PERTURBATIONS if found.name == name)
        images = change.make(plain[n:])
        changed = bench.embedded(bench.held_out, images, f"{name} {side}", backbone)
        target = _columns(head, {block: changed.block(block) for block in head.transform.blocks})
        shifts.append(_shift(change.title, head, columns, labels, n, target, labels[n:], bench))
        pictures.append((change.title, _few(images)))
    grid = Grid("What changes", tuple(f"image {number + 1}" for number in range(len(pictures[0][1]))), tuple(pictures))
    return shifts, grid


def _between_domains(bench: Bench, side: int, names: list[str]) -> tuple[list[Shift], None]:
    """The first domain trains; every other one is new."""
    features = bench.features(bench.scaled(side))
    domain = np.array([sample.domain or "" for sample in bench.manifest.samples])
    train = bench.train[domain[bench.train] == names[0]]
    held = bench.held_out[domain[bench.held_out] == names[0]]
    head = bench.probe(features, train)

    def columns(rows: Ints) -> Rows:
        return _columns(head, {block: features.block(block, rows) for block in head.transform.blocks})

    own = np.concatenate([train, held])
    source, labels = columns(own), bench.labels[own]
    shifts = []
    for name in names[1:]:
        rows = np.flatnonzero(domain == name)
        shifts.append(_shift(name, head, source, labels, len(train), columns(rows), bench.labels[rows], bench))
    return shifts, None


def _columns(head: LinearHead, blocks: dict[str, np.ndarray[tuple[int, int], np.dtype[np.float16]]]) -> Rows:
    return head.transform.apply(dict(blocks))


def _shift(
    name: str, head: LinearHead, source: Rows, labels: Ints, n: int, target: Rows, truth: Ints, bench: Bench
) -> Shift:
    """Everything about one new domain; the first ``n`` rows of the source train, the rest judge it."""
    rng = np.random.default_rng([bench.seed, 29])
    given = np.full(len(truth), -1, np.int64)
    for label in np.unique(truth):
        own = rng.permutation(np.flatnonzero(truth == label))
        given[own[: min(N_LABELS, len(own) // 2)]] = label  # the other half is left to judge on
    answers = softmax(_logits(head, target))
    right, choices, heads = {AS_IT_IS: answers.argmax(1) == truth}, [], []
    for way, known in ((ADAPTED, np.full_like(given, -1)), (LABELED, given)):
        domains = Domains(source[:n], labels[:n], target, known, len(bench.classes))
        choice = choose(domains, answers, seed=bench.seed)
        found = adapted_head(head, domains, choice, PENALTY) if choice.outcome == "adapted" else head
        right[way] = _logits(found, target).argmax(1) == truth
        choices.append(choice)
        heads.append(found)
    votes = predicted_accuracy(answers.argmax(1).astype(np.int64), choices[0].votes)
    before, after = (_logits(h, source[n:]).argmax(1) == labels[n:] for h in (head, heads[0]))
    expected = (votes + float(answers.max(1).mean())) / 2
    return Shift(name, truth, right, given < 0, choices[0], expected, (before, after))


def _logits(head: LinearHead, columns: Rows) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return np.asarray(columns.astype(np.float64) @ head.weight.T.astype(np.float64) + head.bias)


def _few(images: Pixels) -> tuple[Pixels, ...]:
    return tuple(images[:N_SHOWN])


def _sentence(shift: Shift, seed: int) -> str:
    before, after, labeled = (right[shift.judged] for right in shift.right.values())
    facts = f"{shift.name}: the head is right for {percent(float(before.mean()))} as it is"
    if shift.choice.outcome != "adapted":
        text = f"{facts}; without labels it was left so: {shift.choice.reason}"
    else:
        found = difference(before, after, seed)
        clear = (
            "clearly more"
            if found.is_clear and found.value > 0
            else "clearly less"
            if found.is_clear
            else "no clear difference"
        )
        text = f"{facts} and for {percent(float(after.mean()))} once adapted without a label ({points(found.value)} points, {clear})."
    more = difference(after, labeled, seed)
    said = f"{points(more.value)} points more" if more.is_clear and more.value > 0 else "no clear gain on top"
    return f"{text} {N_LABELS} labels a class: {said}."


def _summary(shifts: list[Shift]) -> tuple[str, ...]:
    errors = [abs(shift.expected - float(shift.right[AS_IT_IS][shift.judged].mean())) for shift in shifts]
    return (
        f"The accuracy on new images was expected without labels to within {100 * float(np.mean(errors)):.0f} points on average.",
    )
