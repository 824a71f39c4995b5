"""What did the model learn? In go a classifier and labelled images, out come effects, findings and plain sentences.

The images are changed in one way at a time (``perturb``, ``preprocessing``) and the same model answers again; each
effect is paired with the answers to the images as they are. An effect is called clear only where it stays significant
among all of them (McNemar's exact test, with the false discovery rate held at 5 %: Benjamini & Hochberg 1995). Everything said follows from these numbers.

Two checks look for shortcuts. *Fixed places*: evidence that lies at one place near the border in most images of a class
moves with no object; hiding and transplanting that place tells whether answers hang on it. *File properties*: if they
alone tell the classes apart (``shortcut``), the model may use them too. Not here: pages (``web``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topwork.data.transforms import InputSpec, Pixels
from topwork.evaluation.compare import accuracy_difference_interval, mcnemar
from topwork.evaluation.explain import Randomised, border_area, border_share, find_evidence, randomisation_test
from topwork.evaluation.intervals import wilson
from topwork.evaluation.perturb import PERTURBATIONS, Perturbation, hide_box
from topwork.evaluation.predictions import Bools, Ints, softmax
from topwork.evaluation.preprocessing import Fit, alternatives, misfit_sentence, renormalised, statistics_fit
from topwork.evaluation.shortcut import ShortcutCheck
from topwork.features.engine import Engine
from topwork.features.maps import OpenNetwork, open_network
from topwork.models.classifier import Classifier

SIGNIFICANCE = 0.05
N_EXAMPLES = 4
_N_MAPS = {"activation": 200, "covering": 24}  # images whose evidence is looked at: covering costs 49 passes each
_N_CHECKED = 32  # images for the batch-norm check
_N_RANDOMISED = 8
_LEAST_OF_CLASS = 8
_CONCENTRATED = 1.8  # a border cell with this many times its share of the evidence may be a fixed place; usual: 0.8
_CLEAR_Z = 3.5
_ORDER = {"warning": 0, "note": 1, "good": 2}


@dataclass(frozen=True)
class Effect:
    """What the model makes of the images after one change.

    Attributes:
        accuracy: with a 95 % interval ``low`` to ``high``.
        confidence: mean probability of the answers.
        difference: accuracy less that on the images as they are, with its paired interval.
        p_value: corrected for the number of effects.
        same: share of images with the same answer as before.
        examples: answer and probability for each of the example images.
    """

    name: str
    group: str
    title: str
    n: int
    accuracy: float
    low: float
    high: float
    confidence: float
    difference: float
    difference_low: float
    difference_high: float
    p_value: float
    same: float
    sentence: str
    examples: tuple[tuple[str, float], ...]

    @property
    def is_clear(self) -> bool:
        """Whether chance would hardly do it."""
        return self.p_value < SIGNIFICANCE and self.difference != 0


@dataclass(frozen=True)
class FixedPlace:
    """A place near the border that holds evidence in most images of a class.

    Attributes:
        box: top, bottom, left, right in input pixels.
        where: in words.
        concentration: evidence there, in multiples of an even spread.
        lost: share of the logit of the class that hiding the place takes away, and the mean over mirrored places.
        transplanted: share of images of other classes that become this class when the place is copied into them, and
            the same for the mirrored places.
        rows: positions of images to look at.
    """

    label: str
    box: tuple[int, int, int, int]
    where: str
    n: int
    concentration: float
    lost: float
    lost_elsewhere: float
    transplanted: float
    transplanted_elsewhere: float
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Finding:
    """One sentence for a person: a ``warning``, a ``note``, or something ``good``."""

    kind: str
    topic: str
    text: str


@dataclass(frozen=True)
class Examination:
    """Everything ``topwork examine`` found.

    Attributes:
        n: images examined.
        guess: accuracy of always naming the commonest class.
        unchanged: the images as they are.
        effects: one a perturbation, preprocessing last.
        fits: how normalisations fit the weights, best first.
        border: share of the evidence in the outer tenth of each side, and the share of the area that is.
        example_rows: positions of the example images.
    """

    n: int
    guess: float
    unchanged: Effect
    effects: tuple[Effect, ...]
    fits: tuple[Fit, ...]
    places: tuple[FixedPlace, ...]
    border: tuple[float, float] | None
    method: str
    randomised: tuple[Randomised, ...]
    shortcuts: ShortcutCheck | None
    findings: tuple[Finding, ...]
    example_rows: tuple[int, ...]
    notes: tuple[str, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = asdict(self)
        values["effects"] = [asdict(e) | {"is_clear": e.is_clear} for e in self.effects]
        return values


def examine(
    classifier: Classifier,
    engine: Engine,
    load: Callable[[InputSpec], Pixels],
    labels: Ints,
    *,
    shortcuts: ShortcutCheck | None = None,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Examination:
    """Examines a classifier on images whose classes it knows.

    Args:
        engine: runs the network as in prediction.
        load: the images, uint8 (N, H, W, 3), as an input spec wants them.
        labels: (N,) true labels.
        shortcuts: what facts of the files alone tell about the labels.
        on_progress: called with (steps done, steps in all).
    """
    spec = classifier.backbone.spec
    images = load(spec)
    others = alternatives(spec)
    fits_to_try = [fit for fit in ("squash", "crop") if fit != spec.fit]
    n_steps = 1 + len(PERTURBATIONS) + len(others) + len(fits_to_try) + 3
    progress = _Progress(on_progress, n_steps)
    network = open_network(classifier.backbone, classifier.precision)
    asker = _Asker(classifier, engine, network, labels, seed)
    asker.ask("unchanged", "", "As they are", images, "")
    progress.step()
    for some in PERTURBATIONS:
        asker.ask(some.name, some.group, some.title, some.make(images), "", some)
        progress.step()
    for fit in fits_to_try:
        changed = load(InputSpec.from_dict(spec.as_dict() | {"fit": fit}))
        title = "Middle cut out" if fit == "crop" else "Whole image squashed"
        asker.ask(f"fit_{fit}", "preprocessing", title, changed, f"{title} instead of {_FIT_WORDS[spec.fit]}")
        progress.step()
    for other in others:
        values = renormalised(images, spec, other)
        asker.ask(f"norm_{_slug(other.name)}", "normalisation", other.name, values, f"Normalised with {other.name}")
        progress.step()
    effects = asker.effects()
    evidence = _evidence(classifier, images, labels, network, engine)
    places = fixed_places(classifier, engine, images[: len(evidence.maps)], labels[: len(evidence.maps)], evidence.maps)
    progress.step()
    border = (float(border_share(evidence.maps).mean()), border_area()) if len(evidence.maps) else None
    fits = statistics_fit(classifier.backbone, images[:_N_CHECKED])
    progress.step()
    n = _N_RANDOMISED
    is_exact = evidence.method == "activation"
    randomised = randomisation_test(classifier, images[:n], labels[:n], evidence.maps[:n], seed) if is_exact else ()
    progress.step()
    findings = _findings(effects, asker.guess, fits, places, border, randomised, shortcuts)
    return Examination(
        n=len(labels),
        guess=asker.guess,
        unchanged=effects["unchanged"],
        effects=tuple(effect for name, effect in effects.items() if name != "unchanged"),
        fits=fits,
        places=places,
        border=border,
        method=evidence.method,
        randomised=randomised,
        shortcuts=shortcuts,
        findings=findings,
        example_rows=tuple(int(row) for row in asker.examples),
    )


class _Progress:
    def __init__(self, tell: Callable[[int, int], None] | None, n_steps: int) -> None:
        self.tell, self.n_steps, self.n_done = tell, n_steps, 0

    def step(self) -> None:
        self.n_done += 1
        if self.tell:
            self.tell(min(self.n_done, self.n_steps), self.n_steps)


_FIT_WORDS = {"squash": "the whole image squashed", "crop": "the middle cut out", "pad": "the whole image with bars"}


# ---- effects


@dataclass(frozen=True, eq=False)
class _Answers:
    group: str
    title: str
    done: str
    about: str
    predicted: Ints
    probability: NDArray[np.float64]
    correct: Bools


class _Asker:
    """Asks the model again and again, and compares with its first answers."""

    def __init__(
        self, classifier: Classifier, engine: Engine, network: OpenNetwork, labels: Ints, seed: int
    ) -> None:
        self.classifier, self.engine, self.network, self.labels, self.seed = classifier, engine, network, labels, seed
        self.answers: dict[str, _Answers] = {}
        self.guess = float(np.bincount(labels).max() / len(labels))

    def ask(
        self, name: str, group: str, title: str, images: NDArray[Any], done: str, some: Perturbation | None = None
    ) -> None:
        is_bytes = images.dtype == np.uint8
        blocks = self.engine.run(images) if is_bytes else self.network.run(images).blocks
        probabilities = softmax(self.classifier.head.logits(dict(blocks)))
        predicted = probabilities.argmax(1).astype(np.int64)
        about = some.about if some else "the right preprocessing"
        self.answers[name] = _Answers(
            group, title, some.done if some else done, about, predicted, probabilities.max(1), predicted == self.labels
        )

    @property
    def examples(self) -> Ints:
        """Images to show: answered right as they are, of different classes as far as there are."""
        first = self.answers["unchanged"]
        order = np.random.default_rng(self.seed).permutation(len(self.labels))
        order = order[np.argsort(~first.correct[order], kind="stable")]
        _, places = np.unique(self.labels[order], return_index=True)
        once = order[np.sort(places)]
        rest = order[~np.isin(order, once)]
        return np.concatenate([once, rest])[:N_EXAMPLES].astype(np.int64)

    def effects(self) -> dict[str, Effect]:
        first, shown = self.answers["unchanged"], self.examples
        raw = {name: mcnemar(first.correct, a.correct) for name, a in self.answers.items() if name != "unchanged"}
        corrected = _corrected(raw)
        found: dict[str, Effect] = {}
        for name, answers in self.answers.items():
            n, right = len(answers.correct), float(answers.correct.mean())
            around = accuracy_difference_interval(first.correct, answers.correct)
            interval = wilson(right, n)
            effect = Effect(
                name=name,
                group=answers.group,
                title=answers.title,
                n=n,
                accuracy=right,
                low=interval.low,
                high=interval.high,
                confidence=float(answers.probability.mean()),
                difference=right - float(first.correct.mean()),
                difference_low=around.low,
                difference_high=around.high,
                p_value=corrected.get(name, 1.0),
                same=float((answers.predicted == first.predicted).mean()),
                sentence="",
                examples=tuple(
                    (self.classifier.classes[answers.predicted[row]], round(float(answers.probability[row]), 4))
                    for row in shown
                ),
            )
            said = effect_sentence(effect, answers.done, answers.about, float(first.correct.mean()), self.guess)
            found[name] = Effect(**(vars(effect) | {"sentence": said}))
        return found


def _corrected(p_values: dict[str, float]) -> dict[str, float]:
    """P-values adjusted for their number, so that of those below 0.05 about 5 % are chance (Benjamini & Hochberg 1995)."""
    order = sorted(p_values, key=lambda name: -p_values[name])
    corrected, lowest = {}, 1.0
    for place, name in enumerate(order):
        lowest = min(lowest, p_values[name] * len(order) / (len(order) - place))
        corrected[name] = lowest
    return corrected


def effect_sentence(effect: Effect, done: str, about: str, before: float, guess: float) -> str:
    """What one effect means, in a sentence that follows from its numbers.

    Args:
        done: what was done, as in "Without colour".
        about: what that took away.
        before: accuracy on the images as they are.
        guess: accuracy of always naming the commonest class.
    """
    if effect.name == "unchanged":
        return f"As they are, it is right for {_percent(before)} of the {effect.n} images."
    start = f"{done}, it is right for {_percent(effect.accuracy)}"
    if not effect.is_clear:
        span = f"{_points(effect.difference_low)} to {_points(effect.difference_high)} points"
        if effect.difference_low > 0 or effect.difference_high < 0:
            return f"{start}: perhaps a difference ({span}), but no clear difference among so many comparisons."
        return f"{start}: no clear difference ({span})."
    if effect.difference > 0:
        return f"{start}, more than the {_percent(before)} as they are: that should not help, so look into it."
    lost = -effect.difference / max(before - guess, 1e-9)
    unaware = ""
    if effect.confidence - effect.accuracy > 0.2:
        unaware = f" It does not notice: its mean confidence is {_percent(effect.confidence)}."
    if effect.low <= guess or effect.accuracy < guess:
        return f"{start}, no better than guessing ({_percent(guess)}): it cannot do without {about}.{unaware}"
    degree = "relies heavily on" if lost > 0.4 else "relies on" if lost > 0.15 else "relies a little on"
    return f"{start} instead of {_percent(before)}: it {degree} {about}.{unaware}"


def _percent(share: float) -> str:
    text = f"{100 * share:.1f}"
    return f"{text.removesuffix('.0')} %"


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f}".replace("-", "−")


# ---- shortcuts


def _evidence(
    classifier: Classifier, images: Pixels, labels: Ints, network: OpenNetwork, engine: Engine
) -> _TrueEvidence:
    """Maps of the true class, of as many images as are affordable, in pieces so that memory stays flat."""
    first = find_evidence(classifier, images[:1], labels[:1, None], network, engine)
    n = min(len(images), _N_MAPS[first.method])
    pieces = [
        find_evidence(classifier, images[start : start + 32], labels[start : start + 32, None], network, engine).maps[:, 0]
        for start in range(0, n, 32)
    ]
    return _TrueEvidence(first.method, np.concatenate(pieces)[:n] if pieces else first.maps[:0, 0])


@dataclass(frozen=True, eq=False)
class _TrueEvidence:
    method: str
    maps: NDArray[np.float32]


def fixed_places(
    classifier: Classifier, engine: Engine, images: Pixels, labels: Ints, maps: NDArray[np.float32]
) -> tuple[FixedPlace, ...]:
    """Places near the border that decide about a class in most of its images: watermarks, stamps, rulers, frames.

    Found in the mean map of each class, and kept only if hiding the place costs the class clearly more than hiding the
    mirrored places does. Objects near the border move from image to image; such a place does not.

    Args:
        images: uint8 (N, H, W, 3).
        labels: (N,) true labels.
        maps: (N, h, w) evidence for the true class.
    """
    positive = np.maximum(maps, 0)
    total = positive.sum((1, 2), keepdims=True)
    shares = positive / np.where(total > 0, total, 1) * maps[0].size
    found = []
    for label in np.unique(labels):
        rows = np.flatnonzero((labels == label) & (total[:, 0, 0] > 0))
        if len(rows) < _LEAST_OF_CLASS:
            continue
        mean = shares[rows].mean(0)
        on_border = np.ones(mean.shape, np.bool_)
        on_border[1:-1, 1:-1] = False
        peak = np.unravel_index(int(np.where(on_border, mean, -np.inf).argmax()), mean.shape)
        if mean[peak] >= _CONCENTRATED:
            place = _tested_place(classifier, engine, images, labels, int(label), rows, mean, (int(peak[0]), int(peak[1])))
            found += [place] if place is not None else []
    return tuple(sorted(found, key=lambda place: -place.lost))


def _tested_place(
    classifier: Classifier,
    engine: Engine,
    images: Pixels,
    labels: Ints,
    label: int,
    rows: Ints,
    mean: NDArray[np.float32],
    peak: tuple[int, int],
) -> FixedPlace | None:
    """Hides the place and its mirror images, and copies them into images of other classes."""
    height, width = images.shape[1:3]
    box = _box(_grown(mean, peak), mean.shape, (height, width))
    mirrored = [b for b in _mirrored(box, height, width) if not _overlap(b, box)]

    def logit(pixels: Pixels) -> NDArray[np.float64]:
        logits = classifier.head.logits(dict(engine.run(pixels)))
        return np.asarray(logits[:, label] - logits.mean(1))

    chosen = images[rows]
    before = logit(chosen)
    lost = before - logit(hide_box(chosen, box))
    elsewhere = np.mean([before - logit(hide_box(chosen, other)) for other in mirrored], axis=0) if mirrored else 0 * lost
    extra = lost - elsewhere
    z = extra.mean() / (extra.std(ddof=1) / math.sqrt(len(extra)) + 1e-12)
    if not (lost.mean() > 0 and z > _CLEAR_Z):
        return None
    others = np.flatnonzero(labels != label)[:64]

    def transplanted(place: tuple[int, int, int, int]) -> float:
        top, bottom, left, right = place
        changed = images[others].copy()
        donors = rows[np.arange(len(others)) % len(rows)]
        changed[:, top:bottom, left:right] = images[donors, top:bottom, left:right]
        answers = classifier.head.logits(dict(engine.run(changed))).argmax(1)
        return float((answers == label).mean())

    scale = float(np.abs(before).mean())
    return FixedPlace(
        label=classifier.classes[label],
        box=box,
        where=_where(box, height, width),
        n=len(rows),
        concentration=float(mean[peak]),
        lost=float(lost.mean()) / scale,
        lost_elsewhere=float(elsewhere.mean()) / scale,
        transplanted=transplanted(box) if len(others) else 0.0,
        transplanted_elsewhere=float(np.mean([transplanted(b) for b in mirrored])) if len(others) and mirrored else 0.0,
        rows=tuple(int(row) for row in rows[:8]),
    )


def _grown(mean: NDArray[np.float32], peak: tuple[int, int]) -> tuple[int, int, int, int]:
    """The rectangle of cells around the peak, at most half a side long, in which the mean map stays high."""
    top, bottom, left, right = peak[0], peak[0], peak[1], peak[1]
    least = max(1.2, 0.3 * float(mean[peak]))
    n_rows, n_columns = mean.shape
    while True:
        sides = {
            (-1, 0, 0, 0): mean[top - 1, left : right + 1].mean() if top > 0 else 0,
            (0, 1, 0, 0): mean[bottom + 1, left : right + 1].mean() if bottom < n_rows - 1 else 0,
            (0, 0, -1, 0): mean[top : bottom + 1, left - 1].mean() if left > 0 else 0,
            (0, 0, 0, 1): mean[top : bottom + 1, right + 1].mean() if right < n_columns - 1 else 0,
        }
        step, value = max(sides.items(), key=lambda item: float(item[1]))
        grown = top + step[0], bottom + step[1], left + step[2], right + step[3]
        # Towards the middle, where objects are, not beyond a third.
        if value < least or grown[1] - grown[0] >= n_rows / 3 or grown[3] - grown[2] >= n_columns / 2:
            return top, bottom, left, right
        top, bottom, left, right = grown


def _box(cells: tuple[int, int, int, int], grid: tuple[int, ...], shape: tuple[int, int]) -> tuple[int, int, int, int]:
    """Cells as pixels, half a cell wider: the network sees more than its cell."""
    (top, bottom, left, right), (n_rows, n_columns), (height, width) = cells, grid, shape
    rows = max(0.0, top - 0.5), min(n_rows, bottom + 1.5)
    columns = max(0.0, left - 0.5), min(n_columns, right + 1.5)
    return (
        round(rows[0] * height / n_rows),
        round(rows[1] * height / n_rows),
        round(columns[0] * width / n_columns),
        round(columns[1] * width / n_columns),
    )


def _mirrored(box: tuple[int, int, int, int], height: int, width: int) -> list[tuple[int, int, int, int]]:
    top, bottom, left, right = box
    up, aside = (height - bottom, height - top), (width - right, width - left)
    return [(*up, left, right), (top, bottom, *aside), (*up, *aside)]


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    shared = max(0, min(a[1], b[1]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[2], b[2]))
    return shared > 0.25 * (a[1] - a[0]) * (a[3] - a[2])


def _where(box: tuple[int, int, int, int], height: int, width: int) -> str:
    middle = (box[0] + box[1]) / 2 / height, (box[2] + box[3]) / 2 / width
    row = "top" if middle[0] < 0.36 else "bottom" if middle[0] > 0.64 else ""
    column = "left" if middle[1] < 0.36 else "right" if middle[1] > 0.64 else ""
    if row and column:
        return f"the {row} {column} corner"
    return f"the {row or column} edge" if row or column else "one place"


# ---- findings


def _findings(
    effects: dict[str, Effect],
    guess: float,
    fits: tuple[Fit, ...],
    places: tuple[FixedPlace, ...],
    border: tuple[float, float] | None,
    randomised: tuple[Randomised, ...],
    shortcuts: ShortcutCheck | None,
) -> tuple[Finding, ...]:
    first = effects["unchanged"]
    found = [Finding("note", "accuracy", _accuracy_text(first, guess))]
    found += _normalisation_findings(effects, fits)
    found += [Finding("warning", "shortcut", place_sentence(place)) for place in places]
    found += _place_findings(effects, border, bool(places))
    found += _file_findings(shortcuts)
    found += [Finding("note", "texture or shape", text) for text in _texture_text(effects, first, guess)]
    found += [Finding("note", "colour", effects["grey"].sentence)]
    found += _fragility_findings(effects)
    found += _sanity_findings(randomised)
    return tuple(sorted(found, key=lambda finding: _ORDER[finding.kind] if finding.kind == "warning" else 1))


def _accuracy_text(first: Effect, guess: float) -> str:
    return (
        f"On the {first.n} images as they are it is right for {_percent(first.accuracy)} "
        f"({_percent(first.low)} to {_percent(first.high)}); always naming the commonest class gives {_percent(guess)}."
    )


def _normalisation_findings(effects: dict[str, Effect], fits: tuple[Fit, ...]) -> list[Finding]:
    found = []
    others = [effect for effect in effects.values() if effect.group == "normalisation"]
    better = [effect for effect in others if effect.is_clear and effect.difference > 0]
    if better:
        best = max(better, key=lambda effect: effect.accuracy)
        found.append(
            Finding(
                "warning",
                "normalisation",
                f"The stored normalisation is most likely not the one the model was trained with: with {best.title} it is "
                f"right for {_percent(best.accuracy)} instead of {_percent(effects['unchanged'].accuracy)}.",
            )
        )
    said = misfit_sentence(fits)
    if said is not None and said[0]:
        found.append(Finding("warning", "normalisation", said[1]))
    elif not better and others:
        worst = min(others, key=lambda effect: effect.accuracy)
        start = said[1] + " " if said is not None else "No other normalisation does better. "
        found.append(
            Finding("good", "normalisation", f"{start}With {worst.title} it would be right for {_percent(worst.accuracy)}.")
        )
    return found


def place_sentence(place: FixedPlace) -> str:
    """What a fixed place means."""
    moved = ""
    if place.transplanted > place.transplanted_elsewhere + 0.05:
        moved = (
            f" Copied into images of other classes, this place alone turns {_percent(place.transplanted)} of them into "
            f"“{place.label}” (the mirrored places: {_percent(place.transplanted_elsewhere)})."
        )
    return (
        f"“{place.label}” seems to be recognised by something at {place.where}, at the same place in most of its "
        f"{place.n} images: {place.concentration:.1f} times its share of the evidence lies there, and hiding it takes away "
        f"{_percent(min(1.0, place.lost))} of what speaks for the class "
        f"(the mirrored places: {_percent(max(0.0, place.lost_elsewhere))}).{moved} "
        "Objects move, marks do not: look for a watermark, a date stamp, a ruler or a frame, and remove or cover it."
    )


def _place_findings(
    effects: dict[str, Effect], border: tuple[float, float] | None, has_places: bool
) -> list[Finding]:
    without, only = effects["no_centre"], effects["no_surround"]
    text = f"{without.sentence} {only.sentence}"
    found = []
    if without.accuracy > only.accuracy + 0.05 and only.is_clear:
        found.append(
            Finding(
                "warning",
                "object or background",
                f"{text} It does better without the middle than without the surround: what it goes by lies around "
                "the objects, in the background, at the border or in a mark.",
            )
        )
    elif only.accuracy > without.accuracy + 0.05 and without.is_clear:
        found.append(
            Finding("note", "object or background", f"{text} So it goes by the middle, where the objects mostly are.")
        )
    else:
        found.append(Finding("note", "object or background", text))
    if border is not None:
        share, area = border
        kind = "warning" if share > 1.2 * area and not has_places else "note"
        more = "more than" if share > 1.1 * area else "less than" if share < 0.9 * area else "about"
        found.append(
            Finding(
                kind,
                "border",
                f"The outer tenth of each side is {_percent(area)} of the area and holds {_percent(share)} of the "
                f"evidence: {more} an even spread would put there.",
            )
        )
    return found


def _file_findings(shortcuts: ShortcutCheck | None) -> list[Finding]:
    if shortcuts is None or not shortcuts.families:
        return []
    if shortcuts.warnings:
        return [Finding("warning", "file properties", f"{text} The model may use it, too.") for text in shortcuts.warnings]
    best = shortcuts.families[0]
    return [
        Finding(
            "good",
            "file properties",
            f"Facts about the files alone give little away: the most telling, {best.family}, reach "
            f"{_percent(round(best.balanced_accuracy, 2))} balanced accuracy where guessing gives {_percent(round(best.chance, 2))}.",
        )
    ]


def _texture_text(effects: dict[str, Effect], first: Effect, guess: float) -> list[str]:
    texture = effects["shuffle"]
    shape = max((effects["edges"], effects["silhouette"]), key=lambda effect: effect.accuracy)
    text = f"{texture.sentence} {shape.sentence}"
    gap = texture.accuracy - shape.accuracy
    half_width = 1.96 * math.sqrt(max(0.5 / texture.n, 1e-9) * 0.5)
    if gap > half_width:
        return [f"{text} So it goes more by texture than by shape, as most networks trained on photos do."]
    if gap < -half_width:
        return [f"{text} So it goes more by shape than by texture."]
    return [f"{text} Neither texture alone nor shape alone stands out."]


def _fragility_findings(effects: dict[str, Effect]) -> list[Finding]:
    hurt = [e for e in effects.values() if e.group in ("quality", "view", "detail") and e.is_clear and e.difference < -0.05]
    if not hurt:
        return [Finding("good", "robustness", "No change of view, detail or quality tried here costs it 5 points or more.")]
    hurt.sort(key=lambda effect: effect.difference)
    named = ", ".join(f"{e.title.lower().replace('jpeg', 'JPEG')} ({_points(e.difference)})" for e in hurt[:6])
    return [Finding("note", "robustness", f"What costs it most, in points of accuracy: {named}.")]


def _sanity_findings(randomised: tuple[Randomised, ...]) -> list[Finding]:
    if not randomised:
        return []
    most = max(abs(r.agreement) for r in randomised)
    steps = "; ".join(f"{r.part}: {r.agreement:.2f}" for r in randomised)
    if most < 0.5:
        text = "The maps of evidence depend on what was learned: with random weights they look different"
        return [Finding("good", "maps", f"{text} (rank correlation after randomising {steps}).")]
    text = "The maps of evidence stay similar with random weights: they show edges of the image rather than what was learned"
    return [Finding("warning", "maps", f"{text} (rank correlation after randomising {steps}).")]


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name.lower()).strip("_")
