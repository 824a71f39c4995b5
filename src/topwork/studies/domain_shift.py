"""Domain shift: how much accuracy a head loses on images that look different, and how much adaptation recovers.

If the data has domains (a column, or --domain-by), the first one is for training and every other one is new. Otherwise the
held-out images are changed: gray, blurred, reduced to outlines. Compared on the new images: the unadapted head, the head
adapted without labels (``adaptation/guards.py``), and one adapted with five labels per class.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from topwork.adaptation.adapted_head import adapted_head, score
from topwork.adaptation.align import Domains, Rows
from topwork.adaptation.expected import expected_accuracy
from topwork.adaptation.guards import Choice, choose
from topwork.blocks import AnyCell, Grid, Table
from topwork.evaluation.perturb import PERTURBATIONS
from topwork.evaluation.predictions import softmax
from topwork.features.embed import Features
from topwork.models.backbone import Backbone
from topwork.models.head import LinearHead
from topwork.studies.bench import Bench, Bools, Ints
from topwork.studies.study import Findings, accuracies, accuracy_bars, compared, measured
from topwork.text import percent

CHANGES = ("gray", "blur", "edges")
N_LABELS = 5  # per class
PENALTY = 3e-3
N_SHOWN = 4
PLAIN, ADAPTED, LABELED = "not adapted", "adapted without labels", f"adapted with {N_LABELS} labels per class"


@dataclass(frozen=True, eq=False)
class Source:
    """A head, and the columns and labels of its domain; the first ``n_train`` rows are for training."""

    head: LinearHead
    rows: Rows
    labels: Ints
    n_train: int


@dataclass(frozen=True, eq=False)
class Shift:
    """One new domain: correctness by method on images without given labels, and on the source's held-out images."""

    answers: dict[str, Bools]
    choice: Choice
    expected: float
    source: tuple[Bools, Bools]


def run(bench: Bench) -> Findings:
    """Runs the study."""
    backbone = bench.scaled(224, 96)
    domains = sorted({sample.domain for sample in bench.manifest.samples if sample.domain})
    shifts, grids = _between(bench, backbone, domains) if len(domains) > 1 else _changed(bench, backbone)
    rows: list[tuple[AnyCell, ...]] = []
    for name, s in shifts.items():
        target, source = (map(measured, right) for right in (s.answers.values(), s.source))
        rows.append((name, *target, percent(s.expected), s.choice.outcome, *source))
    columns = (
        "new domain",
        PLAIN,
        ADAPTED,
        LABELED,
        "expected accuracy",
        "decision",
        "source before",
        "source after",
    )
    note = "On images without given labels. Expected accuracy: of the unadapted head, estimated without labels."
    return Findings(
        sentences=tuple(_sentence(name, shift, bench.seed) for name, shift in shifts.items()),
        parts=(
            Table("New domains", columns, tuple(rows), note),
            *(accuracy_bars(f"On {name}", shift.answers) for name, shift in shifts.items()),
            *grids,
        ),
        values={
            name: {
                **accuracies(s.answers), "outcome": s.choice.outcome, "method": s.choice.method, "expected": s.expected,
                "distance": asdict(s.choice.distance),
            }
            for name, s in shifts.items()
        },
        facts=bench.facts(side=backbone.spec.height),
    )  # fmt: skip


def _changed(bench: Bench, backbone: Backbone) -> tuple[dict[str, Shift], list[Grid]]:
    """The held-out images changed, the training images unchanged."""
    rows, n = np.concatenate([bench.train, bench.held_out]), len(bench.train)
    plain = bench.pixels(rows, backbone)
    features, labels = bench.embedded(rows, plain, "plain", backbone), bench.labels[rows]
    head = bench.probe(features, np.arange(n), labels).head
    source = Source(head, _columns(head, features), labels, n)
    shifts, pictures = {}, [("unchanged", tuple(plain[n:][:N_SHOWN]))]
    for change in (found for name in CHANGES for found in PERTURBATIONS if found.name == name):
        images = change.make(plain[n:])
        target = _columns(head, bench.embedded(bench.held_out, images, change.name, backbone))
        shifts[change.title] = _shift(source, target, labels[n:], bench)
        pictures.append((change.title, tuple(images[:N_SHOWN])))
    return shifts, [Grid("Changes", ("",) * N_SHOWN, tuple(pictures))]


def _between(bench: Bench, backbone: Backbone, names: list[str]) -> tuple[dict[str, Shift], list[Grid]]:
    """The first domain is for training; every other one is new."""
    features = bench.features(backbone)
    domain = np.array([sample.domain or "" for sample in bench.manifest.samples])
    train, held = (rows[domain[rows] == names[0]] for rows in (bench.train, bench.held_out))
    head, own = bench.probe(features, train).head, np.concatenate([train, held])
    columns = _columns(head, features)
    source = Source(head, columns[own], bench.labels[own], len(train))
    new = {name: np.flatnonzero(domain == name) for name in names[1:]}
    return {name: _shift(source, columns[rows], bench.labels[rows], bench) for name, rows in new.items()}, []


def _columns(head: LinearHead, features: Features) -> Rows:
    return head.transform.apply(features.blocks(head.transform.blocks))


def _shift(source: Source, target: Rows, truth: Ints, bench: Bench) -> Shift:
    """The results for one new domain."""
    rng = np.random.default_rng([bench.seed, 29])
    given, head, n = np.full(len(truth), -1, np.int64), source.head, source.n_train
    for label in np.unique(truth):
        own = rng.permutation(np.flatnonzero(truth == label))
        given[own[: min(N_LABELS, len(own) // 2)]] = label  # the other half is for evaluation
    probabilities = softmax(score(head, target))
    unlabeled, predicted = given < 0, probabilities.argmax(1)
    answers, choices, heads = {PLAIN: (predicted == truth)[unlabeled]}, [], [head]
    for way, known in ((ADAPTED, np.full_like(given, -1)), (LABELED, given)):
        domains = Domains(source.rows[:n], source.labels[:n], target, known, len(bench.classes))
        choice = choose(domains, probabilities, seed=bench.seed)
        heads.append(adapted_head(head, domains, choice, PENALTY) if choice.outcome == "adapted" else head)
        answers[way] = (score(heads[-1], target).argmax(1) == truth)[unlabeled]
        choices.append(choice)
    before, after = (score(h, source.rows[n:]).argmax(1) == source.labels[n:] for h in heads[:2])
    expected = expected_accuracy(predicted, choices[0], probabilities.max(1))["value"]
    return Shift(answers, choices[0], expected, (before, after))


def _sentence(name: str, shift: Shift, seed: int) -> str:
    before, after, labeled = shift.answers.values()
    if shift.choice.outcome == "adapted":
        text = compared(PLAIN, before, ADAPTED, after, seed)
    else:
        text = f"{percent(float(before.mean()))} accuracy; not adapted without labels. {shift.choice.reason}"
    return f"{name}: {text} {compared(ADAPTED, after, LABELED, labeled, seed)}"
