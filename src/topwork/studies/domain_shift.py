"""Domain shift: what a trained head loses on images that look different, and what adapting recovers without labels.

If the data has domains (a column, or --domain-by), the first one is for training and every other one is new. Otherwise the
held-out images are changed: gray, blurred, reduced to outlines. Compared on the new images: the unadapted head, the head
adapted without labels (``adaptation/guards.py``), and one adapted with five labels per class.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from topwork.adaptation.adapted_head import adapted_head, score
from topwork.adaptation.align import Domains, Rows
from topwork.adaptation.expected import predicted_accuracy
from topwork.adaptation.guards import Choice, choose
from topwork.blocks import AnyCell, Grid, Table
from topwork.evaluation.perturb import PERTURBATIONS
from topwork.evaluation.predictions import softmax
from topwork.models.head import LinearHead
from topwork.studies.bench import Bench, Bools, Ints
from topwork.studies.study import Findings, Measured, accuracies, accuracy_bars, difference
from topwork.text import percent

SIDE, QUICK_SIDE = 224, 96
CHANGES = ("gray", "blur", "edges")
N_LABELS = 5  # per class
PENALTY = 3e-3
N_SHOWN = 4
PLAIN, ADAPTED, LABELED = "not adapted", "adapted, no labels", f"adapted, {N_LABELS} labels per class"


@dataclass(frozen=True, eq=False)
class Shift:
    """One new domain: (N,) right or wrong by way, which images count, and the source's before and after."""

    name: str
    right: dict[str, Bools]
    unlabeled: Bools
    choice: Choice
    expected: float
    source: tuple[Bools, Bools]


def run(bench: Bench) -> Findings:
    """The study."""
    side = bench.side(SIDE, QUICK_SIDE)
    named = sorted({sample.domain for sample in bench.manifest.samples if sample.domain})
    shifts, grid = _between_domains(bench, side, named) if len(named) > 1 else _changed(bench, side)
    answers = {s.name: {way: right[s.unlabeled] for way, right in s.right.items()} for s in shifts}
    rows: tuple[tuple[AnyCell, ...], ...] = tuple(
        (
            s.name, *map(Measured.of, answers[s.name].values()), percent(s.expected), s.choice.outcome, *map(Measured.of, s.source)
        )
        for s in shifts
    )  # fmt: skip
    columns = (*answers[shifts[0].name], "expected without labels", "decision", "old images before", "old images after")
    note = "On images whose label was not given. Expected: of the head before adapting, from how far the methods agree."
    return Findings(
        sentences=tuple(_sentence(shift, bench.seed) for shift in shifts) + _summary(shifts),
        parts=(
            Table("New domains", ("new images", *columns), rows, note),
            *(accuracy_bars(f"On {name}", found) for name, found in answers.items()),
            *([grid] if grid else []),
        ),
        values={
            shift.name: {
                **accuracies(answers[shift.name]),
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
    """The held-out images changed, the training images unchanged."""
    backbone = bench.scaled(side)
    rows = np.concatenate([bench.train, bench.held_out])
    plain = bench.pixels(rows, side)
    n = len(bench.train)
    features = bench.embedded(rows, plain, f"plain {side}", backbone)
    labels = bench.labels[rows]
    head = bench.probe_on(features, np.arange(n), labels[:n])
    columns = _columns(head, features.blocks(head.transform.blocks))
    shifts, pictures = [], [("unchanged", tuple(plain[n:][:N_SHOWN]))]
    for name in CHANGES:
        change = next(found for found in PERTURBATIONS if found.name == name)
        images = change.make(plain[n:])
        changed = bench.embedded(bench.held_out, images, f"{name} {side}", backbone)
        target = _columns(head, {block: changed.block(block) for block in head.transform.blocks})
        shifts.append(_shift(change.title, head, columns, labels, n, target, labels[n:], bench))
        pictures.append((change.title, tuple(images[:N_SHOWN])))
    grid = Grid("What changes", tuple(f"image {number + 1}" for number in range(len(pictures[0][1]))), tuple(pictures))
    return shifts, grid


def _between_domains(bench: Bench, side: int, names: list[str]) -> tuple[list[Shift], None]:
    """The first domain is for training; every other one is new."""
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
    """Everything about one new domain; the first ``n`` rows of the source are for training, the rest held out."""
    rng = np.random.default_rng([bench.seed, 29])
    given = np.full(len(truth), -1, np.int64)
    for label in np.unique(truth):
        own = rng.permutation(np.flatnonzero(truth == label))
        given[own[: min(N_LABELS, len(own) // 2)]] = label  # the other half is left to evaluate on
    answers = softmax(score(head, target))
    right, choices, heads = {PLAIN: answers.argmax(1) == truth}, [], []
    for way, known in ((ADAPTED, np.full_like(given, -1)), (LABELED, given)):
        domains = Domains(source[:n], labels[:n], target, known, len(bench.classes))
        choice = choose(domains, answers, seed=bench.seed)
        found = adapted_head(head, domains, choice, PENALTY) if choice.outcome == "adapted" else head
        right[way] = score(found, target).argmax(1) == truth
        choices.append(choice)
        heads.append(found)
    votes = predicted_accuracy(answers.argmax(1).astype(np.int64), choices[0].votes)
    before, after = (score(h, source[n:]).argmax(1) == labels[n:] for h in (head, heads[0]))
    expected = (votes + float(answers.max(1).mean())) / 2
    return Shift(name, right, given < 0, choices[0], expected, (before, after))


def _sentence(shift: Shift, seed: int) -> str:
    before, after, labeled = (right[shift.unlabeled] for right in shift.right.values())
    facts = f"{shift.name}: accuracy {percent(float(before.mean()))} before adapting"
    if shift.choice.outcome != "adapted":
        text = f"{facts}; it was not adapted without labels. {shift.choice.reason}"
    else:
        found = difference(before, after, seed)
        clear = "significant" if found.is_clear else "no significant difference"
        text = f"{facts}, {percent(float(after.mean()))} after, without labels ({found}, {clear})."
    more = difference(after, labeled, seed)
    said = str(more) if more.is_clear and more.value > 0 else "no significant further gain"
    return f"{text} With {N_LABELS} labels per class: {said}."


def _summary(shifts: list[Shift]) -> tuple[str, ...]:
    errors = [abs(shift.expected - float(shift.right[PLAIN][shift.unlabeled].mean())) for shift in shifts]
    error = 100 * float(np.mean(errors))
    return (f"The accuracy expected without labels was off by {error:.0f} percentage points on average.",)
