"""What a model relies on: its accuracy on perturbed images, as effects, findings and sentences.

The images are changed in one way at a time and classified again; each effect is a paired comparison with the unchanged
images. Significance is corrected for multiple tests (McNemar's exact test, false discovery rate of 5%: Benjamini &
Hochberg 1995). Findings follow from the effects and from two checks: does the normalization fit the weights
(``perturb``), and does a class depend on a fixed region near the border, such as a watermark, a date stamp or a ruler,
which are at the same place in most images of a class, unlike objects? Warnings come first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topwork.data.transforms import InputSpec, Pixels
from topwork.evaluation.compare import SIGNIFICANCE, accuracy_difference_interval, mcnemar
from topwork.evaluation.dataset_summary import ShortcutCheck
from topwork.evaluation.explain import BORDER_AREA, border_share, find_evidence
from topwork.evaluation.intervals import wilson
from topwork.evaluation.perturb import (
    PERTURBATIONS,
    Box,
    Fit,
    Perturbation,
    alternatives,
    hide_box,
    misfit_sentence,
    renormalized,
    statistics_fit,
)
from topwork.evaluation.predictions import Ints, softmax
from topwork.features.engine import Engine
from topwork.features.feature_maps import OpenNetwork, open_network
from topwork.models.classifier import Classifier
from topwork.text import count, percent, percent_ci, points

N_EXAMPLES = 4
_N_MAPS = {"activation": 200, "gradient": 100, "occlusion": 24}  # images with heatmaps: occlusion costs 49 passes each
_N_CHECKED = 32  # images for the batch-norm check
_RESIZES = {"squash": "squashing", "crop": "a center crop", "pad": "padding"}
_LEAST_OF_CLASS = 10
_CONCENTRATED = 1.8  # a border cell with this many times its share of the evidence is a candidate; 0.8 is typical
# A region counts if hiding it costs this share of the logit and the mirrored regions less than half as much: an object
# at the edge (faces and their collars: 0.31 and 0.19) is on both sides, a mark is not (0.12 to 0.57 and 0).
_LEAST_LOST, _MIRRORED_SHARE, _CLEAR_Z = 0.06, 0.5, 3.5
Load = Callable[[InputSpec], Pixels]
Probabilities = NDArray[np.float64]


@dataclass(frozen=True)
class Effect:
    """The effect of one change on the predictions.

    Attributes:
        accuracy: with a 95% confidence interval ``low`` to ``high``.
        confidence: mean probability of the predictions.
        difference: accuracy minus that on the unchanged images, with a paired interval.
        p_value: corrected for the number of effects.
        same: share of images with the same prediction as before.
        examples: prediction and probability for each of the example images.
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
        """Whether the difference is significant."""
        return self.p_value < SIGNIFICANCE and self.difference != 0


@dataclass(frozen=True)
class Finding:
    """One finding: a ``warning``, a ``note``, or something ``good``."""

    kind: str
    topic: str
    text: str


@dataclass(frozen=True)
class Examination:
    """The results of ``topwork examine``.

    Attributes:
        n: images examined.
        guess: accuracy of always predicting the most frequent class.
        unchanged: the unchanged images.
        effects: one per perturbation, preprocessing last.
        fits: how normalizations fit the weights, best first.
        border: share of the evidence in the outer tenth of each side, and its share of the area.
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
    shortcuts: ShortcutCheck | None
    findings: tuple[Finding, ...]
    example_rows: tuple[int, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"effects": [asdict(e) | {"is_clear": e.is_clear} for e in self.effects]}


def examine(
    classifier: Classifier,
    engine: Engine,
    load: Load,
    labels: Ints,
    *,
    shortcuts: ShortcutCheck | None = None,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> Examination:
    """Examines a classifier on images whose classes it knows.

    Args:
        engine: of the network, as in prediction.
        load: returns the images, uint8 (N, H, W, 3), for an input spec.
        labels: (N,) true labels.
        shortcuts: the shortcut check of the data.
        on_progress: called with (steps done, steps in all).
    """
    spec, network = classifier.backbone.spec, open_network(classifier.backbone)
    images, changes = load(spec), all_changes(spec, load)
    probabilities: dict[str, Probabilities] = {}
    for number, change in enumerate(changes.values(), start=1):
        changed = change.make(images)
        blocks = engine.run(changed) if changed.dtype == np.uint8 else network.run(changed).blocks
        probabilities[change.name] = softmax(classifier.head.logits(dict(blocks)))
        on_progress(number, len(changes) + 1)
    guess = float(np.bincount(labels).max() / len(labels))
    shown = _examples(probabilities["unchanged"].argmax(1) == labels, labels, seed)
    effects = _effects(changes, probabilities, labels, classifier.classes, shown, guess)
    method, maps = _heatmaps(classifier, images, labels, network, engine)
    n = len(maps)
    places = fixed_places(classifier, engine, images[:n], labels[:n], maps)
    border = (float(border_share(maps).mean()), BORDER_AREA)
    fits = statistics_fit(classifier.backbone, images[:_N_CHECKED])
    on_progress(len(changes) + 1, len(changes) + 1)
    findings = [
        _accuracy(effects["unchanged"], guess),
        *_normalization(effects, fits),
        *(Finding("warning", "shortcut", place_sentence(place)) for place in places),
        _background(effects),
        _border(*border, bool(places)),
        *_files(shortcuts),
        _texture(effects),
        Finding("note", "color", effects["gray"].sentence),
        _robustness(effects),
    ]
    return Examination(
        n=len(labels),
        guess=guess,
        unchanged=effects.pop("unchanged"),
        effects=tuple(effects.values()),
        fits=fits,
        places=places,
        border=border,
        method=method,
        shortcuts=shortcuts,
        findings=tuple(sorted(findings, key=lambda finding: finding.kind != "warning")),
        example_rows=tuple(shown.tolist()),
    )


def all_changes(spec: InputSpec, load: Load) -> dict[str, Perturbation]:
    """Every change by name: none, the perturbations, other resize modes, other normalizations (as floats).

    Args:
        load: returns the same images for another input spec.
    """
    changes = [Perturbation("unchanged", "", "Unchanged", "Unchanged", "", lambda images: images), *PERTURBATIONS]

    def resized(fit: str) -> Callable[[Pixels], Pixels]:
        return lambda _: load(InputSpec.from_dict(spec.as_dict() | {"fit": fit}))

    about = "the right preprocessing"
    for fit, title in (("squash", "Squashed"), ("crop", "Center crop")):
        if fit != spec.fit:
            done = f"With {_RESIZES[fit]} instead of {_RESIZES[spec.fit]}"
            changes.append(Perturbation(f"fit_{fit}", "preprocessing", title, done, about, resized(fit)))
    for other in alternatives(spec):
        name = "norm_" + "".join(c if c.isalnum() else "_" for c in other.name.lower()).strip("_")
        make = renormalized(spec, other)
        changes.append(Perturbation(name, "normalization", other.name, f"Normalized with {other.name}", about, make))
    return {change.name: change for change in changes}


def _examples(correct: NDArray[np.bool_], labels: Ints, seed: int) -> Ints:
    """Images to show: correctly classified when unchanged, from as many classes as possible."""
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(~correct[order], kind="stable")]
    once = order[np.sort(np.unique(labels[order], return_index=True)[1])]
    return np.concatenate([once, order[~np.isin(order, once)]])[:N_EXAMPLES].astype(np.int64)


def _heatmaps(
    classifier: Classifier, images: Pixels, labels: Ints, network: OpenNetwork, engine: Engine
) -> tuple[str, NDArray[np.float32]]:
    """Heatmaps (n, h, w) of the true class for a limited number of images, in blocks to bound memory."""

    def piece(rows: slice) -> Any:
        return find_evidence(classifier, images[rows], labels[rows, None], network, engine)

    method = piece(slice(1)).method
    n = min(len(images), _N_MAPS[method])
    return method, np.concatenate([piece(slice(i, min(n, i + 32))).maps[:, 0] for i in range(0, n, 32)])


# ---- effects


def _effects(
    changes: Mapping[str, Perturbation],
    probabilities: Mapping[str, Probabilities],
    labels: Ints,
    classes: tuple[str, ...],
    shown: Ints,
    guess: float,
) -> dict[str, Effect]:
    """The effect of each change by its name."""
    from scipy.stats import false_discovery_control

    predicted = {name: stated.argmax(1) for name, stated in probabilities.items()}
    correct = {name: answers == labels for name, answers in predicted.items()}
    first, before = correct["unchanged"], float(correct["unchanged"].mean())
    others = [name for name in changes if name != "unchanged"]
    corrected = false_discovery_control([mcnemar(first, correct[name]) for name in others])
    p_values = dict(zip(others, corrected.tolist(), strict=True))
    found = {}
    for name, change in changes.items():
        accuracy, stated = float(correct[name].mean()), probabilities[name].max(1)
        interval, around = wilson(accuracy, len(labels)), accuracy_difference_interval(first, correct[name])
        effect = Effect(
            name=name,
            group=change.group,
            title=change.title,
            n=len(labels),
            accuracy=accuracy,
            low=interval.low,
            high=interval.high,
            confidence=float(stated.mean()),
            difference=accuracy - before,
            difference_low=around.low,
            difference_high=around.high,
            p_value=p_values.get(name, 1.0),
            same=float((predicted[name] == predicted["unchanged"]).mean()),
            sentence="",
            examples=tuple((classes[predicted[name][row]], round(float(stated[row]), 4)) for row in shown),
        )
        found[name] = replace(effect, sentence=effect_sentence(effect, change.done, change.about, before, guess))
    return found


def effect_sentence(effect: Effect, done: str, about: str, before: float, guess: float) -> str:
    """Describes one effect in a sentence.

    Args:
        done: what was done, as in "Without color".
        about: what was removed.
        before: accuracy on the unchanged images.
        guess: accuracy of always predicting the most frequent class.
    """
    start = f"{done}, accuracy is {percent(effect.accuracy)}"
    if effect.name == "unchanged":
        return f"{start} on {count(effect.n, 'image')}."
    if not effect.is_clear:
        span = f"{points(effect.difference_low)} to {points(effect.difference_high)} points"
        if effect.difference_low > 0 or effect.difference_high < 0:
            return f"{start}: a difference that is not significant after correcting for multiple comparisons ({span})."
        return f"{start}: no significant difference ({span})."
    if effect.difference > 0:
        return f"{start}, higher than {percent(before)} on the unchanged images. This should not help; investigate."
    unaware = ""
    if effect.confidence - effect.accuracy > 0.2:
        unaware = f" It is overconfident on these images: mean confidence {percent(effect.confidence)}."
    if effect.low <= guess or effect.accuracy < guess:
        return f"{start}, no better than guessing ({percent(guess)}): the model depends on {about}.{unaware}"
    lost = -effect.difference / max(before - guess, 1e-9)
    degree = "relies heavily on" if lost > 0.4 else "relies on" if lost > 0.15 else "relies slightly on"
    return f"{start} instead of {percent(before)}: the model {degree} {about}.{unaware}"


# ---- findings


def _accuracy(first: Effect, guess: float) -> Finding:
    accuracy = percent_ci({"value": first.accuracy, "low": first.low, "high": first.high})
    return Finding(
        "note",
        "accuracy",
        f"Accuracy on {count(first.n, 'unchanged image')}: {accuracy}; always predicting the most frequent class gives {percent(guess)}.",
    )


def _normalization(effects: dict[str, Effect], fits: tuple[Fit, ...]) -> list[Finding]:
    others = [effect for effect in effects.values() if effect.group == "normalization"]
    better = [effect for effect in others if effect.is_clear and effect.difference > 0]
    warnings, said = [], misfit_sentence(fits)
    if better:
        fitting = fits[0].normalization.name if fits else None  # breaks ties
        best = max(better, key=lambda effect: (effect.accuracy, effect.title == fitting))
        warnings.append(
            "The stored normalization is probably not the one the model was trained with: "
            f"with {best.title}, accuracy is {percent(best.accuracy)} instead of {percent(effects['unchanged'].accuracy)}."
        )
    if said is not None and said[0]:
        warnings.append(said[1])
    if warnings or not others:
        return [Finding("warning", "normalization", text) for text in warnings]
    worst = min(others, key=lambda effect: effect.accuracy)
    start = said[1] if said is not None else "No other normalization is better."
    return [
        Finding("good", "normalization", f"{start} With {worst.title}, accuracy would be {percent(worst.accuracy)}.")
    ]


def _background(effects: dict[str, Effect]) -> Finding:
    without, only = effects["no_center"], effects["no_surround"]
    kind, text = "note", f"{without.sentence} {only.sentence}"
    if without.accuracy > only.accuracy + 0.05 and only.is_clear:
        kind = "warning"
        text += " So the model relies on the surroundings of the objects: the background, the border or a mark."
    elif only.accuracy > without.accuracy + 0.05 and without.is_clear:
        text += " So it relies on the center, where objects usually are."
    return Finding(kind, "object or background", text)


def _border(share: float, area: float, has_places: bool) -> Finding:
    more = "more than" if share > 1.1 * area else "less than" if share < 0.9 * area else "about what"
    return Finding(
        "warning" if share > 1.2 * area and not has_places else "note",
        "border",
        f"The outer tenth of each side is {percent(area)} of the area and contains {percent(share)} of the evidence: {more} an "
        "even distribution would have there.",
    )


def _files(shortcuts: ShortcutCheck | None) -> list[Finding]:
    if shortcuts is None or not shortcuts.families:
        return []
    if shortcuts.warnings:
        return [Finding("warning", "file properties", f"{text} The model may rely on it.") for text in shortcuts.warnings]  # fmt: skip
    best = shortcuts.families[0]
    figures = f"balanced accuracy {percent(best.balanced_accuracy, 0)}, chance {percent(best.chance, 0)}"
    return [Finding("good", "file properties", f"Metadata says little about the label: at most {figures} ({best.family}).")]  # fmt: skip


def _texture(effects: dict[str, Effect]) -> Finding:
    texture = effects["shuffle"]
    shape = max((effects["edges"], effects["silhouette"]), key=lambda effect: effect.accuracy)
    gap, half_width = texture.accuracy - shape.accuracy, 1.96 * sqrt(0.25 / texture.n)
    said = "Neither texture nor shape clearly matters more."
    if gap > half_width:
        said = "So the model relies more on texture than on shape, like most networks trained on photos."
    elif gap < -half_width:
        said = "So the model relies more on shape than on texture."
    return Finding("note", "texture or shape", f"{texture.sentence} {shape.sentence} {said}")


def _robustness(effects: dict[str, Effect]) -> Finding:
    some = [e for e in effects.values() if e.group in ("quality", "view", "detail") and e.is_clear]
    hurt = sorted((e for e in some if e.difference < -0.05), key=lambda effect: effect.difference)[:6]
    if not hurt:
        text = "No change of view, detail or quality lowers accuracy by 5 points or more."
        return Finding("good", "robustness", text)
    named = ", ".join(f"{e.title[0].lower()}{e.title[1:]} ({points(e.difference)})" for e in hurt)
    return Finding("note", "robustness", f"Largest drops in accuracy, in points: {named.replace('jPEG', 'JPEG')}.")


# ---- fixed regions


@dataclass(frozen=True)
class FixedPlace:
    """A region near the border with evidence in most images of a class.

    Attributes:
        box: top, bottom, left, right in input pixels.
        where: in words.
        concentration: evidence there, relative to a uniform distribution.
        lost: share of the logit of the class lost by hiding the region, and the mean over mirrored regions.
        rows: positions of example images.
    """

    label: str
    box: Box
    where: str
    n: int
    concentration: float
    lost: float
    lost_elsewhere: float
    rows: tuple[int, ...]


def fixed_places(
    classifier: Classifier, engine: Engine, images: Pixels, labels: Ints, maps: NDArray[np.float32]
) -> tuple[FixedPlace, ...]:
    """Regions near the border that a class depends on in most of its images, found in the mean map of each class.

    They are kept only if hiding the region costs clearly more than hiding the mirrored regions.

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
        border = mean.copy()
        border[1:-1, 1:-1] = -np.inf
        row, column = np.unravel_index(int(border.argmax()), mean.shape)
        if mean[row, column] < _CONCENTRATED:
            continue
        box = _box(mean, int(row), int(column), images.shape[1:3])
        lost = _lost(classifier, engine, images[rows], int(label), box)
        if lost is not None:
            where, name = _where(box, *images.shape[1:3]), classifier.classes[label]
            shown = tuple(rows[:8].tolist())
            found.append(FixedPlace(name, box, where, len(rows), float(mean[row, column]), *lost, shown))
    return tuple(sorted(found, key=lambda place: -place.lost))


def _lost(classifier: Classifier, engine: Engine, images: Pixels, label: int, box: Box) -> tuple[float, float] | None:
    """Share of the logit lost by hiding the box, and its mirror images; None if they differ too little."""

    def logit(pixels: Pixels) -> NDArray[np.float64]:
        logits = classifier.head.logits(dict(engine.run(pixels)))
        return np.asarray(logits[:, label] - logits.mean(1))

    height, width = images.shape[1:3]
    top, bottom, left, right = box
    up, aside = (height - bottom, height - top), (width - right, width - left)
    mirrored = [b for b in ((*up, left, right), (top, bottom, *aside), (*up, *aside)) if not _overlap(b, box)]
    before = logit(images)
    lost = before - logit(hide_box(images, box))
    elsewhere = np.zeros_like(lost)
    for other in mirrored:
        elsewhere += (before - logit(hide_box(images, other))) / len(mirrored)
    extra, scale = lost - elsewhere, float(np.abs(before).mean())
    z = extra.mean() / (extra.std(ddof=1) / sqrt(len(extra)) + 1e-12)
    is_special = elsewhere.mean() < _MIRRORED_SHARE * lost.mean() and lost.mean() > _LEAST_LOST * scale
    return (float(lost.mean()) / scale, float(elsewhere.mean()) / scale) if is_special and z > _CLEAR_Z else None


def _box(mean: NDArray[np.float32], row: int, column: int, shape: tuple[int, ...]) -> Box:
    """The rectangle around a cell in which the mean map is high, in pixels, enlarged by half a cell."""
    (n_rows, n_columns), (height, width) = mean.shape, shape
    top, bottom, left, right = row, row + 1, column, column + 1
    least = max(1.2, 0.3 * float(mean[row, column]))
    while True:
        grown = [
            (mean[a:b, c:d].mean(), box)
            for a, b, c, d, box in (
                (top - 1, top, left, right, (top - 1, bottom, left, right)),
                (bottom, bottom + 1, left, right, (top, bottom + 1, left, right)),
                (top, bottom, left - 1, left, (top, bottom, left - 1, right)),
                (top, bottom, right, right + 1, (top, bottom, left, right + 1)),
            )
            if a >= 0 and c >= 0 and b <= n_rows and d <= n_columns
        ]
        value, (a, b, c, d) = max(grown)
        # Small, so that hiding it does not hide objects; marks are usually wide.
        if value < least or b - a - 1 >= n_rows / 4 or d - c - 1 >= n_columns / 2.5:
            break
        top, bottom, left, right = a, b, c, d
    rows, columns = (
        (max(0.0, top - 0.5), min(n_rows, bottom + 0.5)),
        (max(0.0, left - 0.5), min(n_columns, right + 0.5)),
    )
    (a, b), (c, d) = (round(v * height / n_rows) for v in rows), (round(v * width / n_columns) for v in columns)
    return a, b, c, d


def _overlap(a: Box, b: Box) -> bool:
    shared = max(0, min(a[1], b[1]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[2], b[2]))
    return shared > 0.25 * (a[1] - a[0]) * (a[3] - a[2])


def _where(box: Box, height: int, width: int) -> str:
    middle = (box[0] + box[1]) / 2 / height, (box[2] + box[3]) / 2 / width
    row = "top" if middle[0] < 0.36 else "bottom" if middle[0] > 0.64 else ""
    column = "left" if middle[1] < 0.36 else "right" if middle[1] > 0.64 else ""
    if row and column:
        return f"the {row} {column} corner"
    return f"the {row or column} edge" if row or column else "one region"


def place_sentence(place: FixedPlace) -> str:
    """A sentence about a fixed region."""
    return (
        f"“{place.label}” seems to be recognized by something in {place.where}: in most of its {place.n} images the region holds "
        f"{place.concentration:.1f} times its share of the evidence, and hiding it removes {percent(min(1.0, place.lost), 0)} "
        f"of the evidence for the class (the mirrored regions: {percent(max(0.0, place.lost_elsewhere), 0)}). Look for a "
        "watermark, a date stamp, a ruler, a frame, or a strip of background that is always there, and remove or cover it."
    )
