"""What an examination means, in plain sentences: in go effects and checks, out come findings that follow from the numbers.

Without a significant difference, the sentence says so. Warnings come first: a wrong normalization, a fixed region that a
class depends on, files that reveal the label, evidence outside the objects.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from topwork.evaluation.compare import SIGNIFICANCE
from topwork.evaluation.explain import Randomized
from topwork.evaluation.fixed_regions import FixedPlace, place_sentence
from topwork.evaluation.preprocessing import Fit, misfit_sentence
from topwork.evaluation.shortcut import ShortcutCheck
from topwork.text import count, percent, percent_ci, points


@dataclass(frozen=True)
class Effect:
    """What the model makes of the images after one change.

    Attributes:
        accuracy: with a 95% confidence interval ``low`` to ``high``.
        confidence: mean probability of the answers.
        difference: accuracy minus that on the unchanged images, with its paired interval.
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
        """Whether the difference is significant."""
        return self.p_value < SIGNIFICANCE and self.difference != 0


@dataclass(frozen=True)
class Finding:
    """One sentence for a person: a ``warning``, a ``note``, or something ``good``."""

    kind: str
    topic: str
    text: str


def effect_sentence(effect: Effect, done: str, about: str, before: float, guess: float) -> str:
    """What one effect means, in a sentence that follows from its numbers.

    Args:
        done: what was done, as in "Without color".
        about: what that took away.
        before: accuracy on the unchanged images.
        guess: accuracy of always predicting the most frequent class.
    """
    if effect.name == "unchanged":
        return f"Unchanged, accuracy is {percent(before)} on {count(effect.n, 'image')}."
    start = f"{done}, accuracy is {percent(effect.accuracy)}"
    if not effect.is_clear:
        span = f"{points(effect.difference_low)} to {points(effect.difference_high)} points"
        if effect.difference_low > 0 or effect.difference_high < 0:
            return f"{start}: perhaps a difference ({span}), but not significant among so many comparisons."
        return f"{start}: no significant difference ({span})."
    if effect.difference > 0:
        return f"{start}, higher than {percent(before)} on the unchanged images: that should not help, so look into it."
    lost = -effect.difference / max(before - guess, 1e-9)
    unaware = ""
    if effect.confidence - effect.accuracy > 0.2:
        unaware = f" It is overconfident here: mean confidence {percent(effect.confidence)}."
    if effect.low <= guess or effect.accuracy < guess:
        return f"{start}, no better than guessing ({percent(guess)}): the model depends on {about}.{unaware}"
    degree = "relies heavily on" if lost > 0.4 else "relies on" if lost > 0.15 else "relies slightly on"
    return f"{start} instead of {percent(before)}: the model {degree} {about}.{unaware}"


# ---- findings


def find_findings(
    effects: dict[str, Effect],
    guess: float,
    fits: tuple[Fit, ...],
    places: tuple[FixedPlace, ...],
    border: tuple[float, float] | None,
    randomized: tuple[Randomized, ...],
    shortcuts: ShortcutCheck | None,
) -> tuple[Finding, ...]:
    """Everything worth saying, warnings first.

    Args:
        effects: by name, ``unchanged`` among them.
        guess: accuracy of always predicting the most frequent class.
        border: share of the evidence near the border, and of the area.
    """
    first = effects["unchanged"]
    found = [Finding("note", "accuracy", _accuracy_text(first, guess))]
    found += _normalization_findings(effects, fits)
    found += [Finding("warning", "shortcut", place_sentence(place)) for place in places]
    found += _place_findings(effects, border, bool(places))
    found += _file_findings(shortcuts)
    found += [Finding("note", "texture or shape", text) for text in _texture_text(effects)]
    found += [Finding("note", "color", effects["gray"].sentence)]
    found += _fragility_findings(effects)
    found += _sanity_findings(randomized)
    return tuple(sorted(found, key=lambda finding: finding.kind != "warning"))


def _accuracy_text(first: Effect, guess: float) -> str:
    return (
        f"Accuracy on {count(first.n, 'unchanged image')}: "
        f"{percent_ci({'value': first.accuracy, 'low': first.low, 'high': first.high})}; always predicting the most frequent "
        f"class gives {percent(guess)}."
    )


def _normalization_findings(effects: dict[str, Effect], fits: tuple[Fit, ...]) -> list[Finding]:
    found = []
    others = [effect for effect in effects.values() if effect.group == "normalization"]
    better = [effect for effect in others if effect.is_clear and effect.difference > 0]
    if better:
        fitting = fits[0].normalization.name if fits else None  # decides among equals
        best = max(better, key=lambda effect: (effect.accuracy, effect.title == fitting))
        found.append(
            Finding(
                "warning",
                "normalization",
                f"The stored normalization is most likely not the one the model was trained with: with {best.title}, accuracy "
                f"is {percent(best.accuracy)} instead of {percent(effects['unchanged'].accuracy)}.",
            )
        )
    said = misfit_sentence(fits)
    if said is not None and said[0]:
        found.append(Finding("warning", "normalization", said[1]))
    elif not better and others:
        worst = min(others, key=lambda effect: effect.accuracy)
        start = said[1] + " " if said is not None else "No other normalization is better. "
        found.append(
            Finding("good", "normalization", f"{start}With {worst.title}, accuracy would be {percent(worst.accuracy)}.")
        )
    return found


def _place_findings(effects: dict[str, Effect], border: tuple[float, float] | None, has_places: bool) -> list[Finding]:
    without, only = effects["no_center"], effects["no_surround"]
    text = f"{without.sentence} {only.sentence}"
    found = []
    if without.accuracy > only.accuracy + 0.05 and only.is_clear:
        found.append(
            Finding(
                "warning",
                "object or background",
                f"{text} The model does better without the center than without the background: what it relies on is around "
                "the objects, in the background, at the border or in a mark.",
            )
        )
    elif only.accuracy > without.accuracy + 0.05 and without.is_clear:
        found.append(
            Finding("note", "object or background", f"{text} So it relies on the center, where objects usually are.")
        )
    else:
        found.append(Finding("note", "object or background", text))
    if border is not None:
        share, area = border
        kind = "warning" if share > 1.2 * area and not has_places else "note"
        more = "more than" if share > 1.1 * area else "less than" if share < 0.9 * area else "about what"
        found.append(
            Finding(
                kind,
                "border",
                f"The outer tenth of each side is {percent(area)} of the area and holds {percent(share)} of the "
                f"evidence: {more} an even distribution would have there.",
            )
        )
    return found


def _file_findings(shortcuts: ShortcutCheck | None) -> list[Finding]:
    if shortcuts is None or not shortcuts.families:
        return []
    if shortcuts.warnings:
        return [
            Finding("warning", "file properties", f"{text} The model may rely on it.") for text in shortcuts.warnings
        ]
    best = shortcuts.families[0]
    return [
        Finding(
            "good",
            "file properties",
            f"Metadata alone says little about the label: the most informative, {best.family}, gives a balanced accuracy of "
            f"{percent(best.balanced_accuracy, 0)}; chance is {percent(best.chance, 0)}.",
        )
    ]


def _texture_text(effects: dict[str, Effect]) -> list[str]:
    texture = effects["shuffle"]
    shape = max((effects["edges"], effects["silhouette"]), key=lambda effect: effect.accuracy)
    text = f"{texture.sentence} {shape.sentence}"
    gap = texture.accuracy - shape.accuracy
    half_width = 1.96 * math.sqrt(max(0.5 / texture.n, 1e-9) * 0.5)
    if gap > half_width:
        return [f"{text} So the model relies more on texture than on shape, like most networks trained on photos."]
    if gap < -half_width:
        return [f"{text} So the model relies more on shape than on texture."]
    return [f"{text} Neither texture nor shape clearly matters more."]


def _fragility_findings(effects: dict[str, Effect]) -> list[Finding]:
    hurt = [
        e for e in effects.values() if e.group in ("quality", "view", "detail") and e.is_clear and e.difference < -0.05
    ]
    if not hurt:
        return [
            Finding(
                "good", "robustness", "No change of view, detail or quality lowers the accuracy by 5 points or more."
            )
        ]
    hurt.sort(key=lambda effect: effect.difference)
    named = ", ".join(f"{e.title.lower().replace('jpeg', 'JPEG')} ({points(e.difference)})" for e in hurt[:6])
    return [Finding("note", "robustness", f"Largest losses, in points of accuracy: {named}.")]


def _sanity_findings(randomized: tuple[Randomized, ...]) -> list[Finding]:
    if not randomized:
        return []
    most = max(abs(r.agreement) for r in randomized)
    steps = "; ".join(f"{r.part}: {r.agreement:.2f}" for r in randomized)
    if most < 0.5:
        text = "The heatmaps depend on what was learned: with random weights they look different"
        return [Finding("good", "heatmaps", f"{text} (rank correlation after randomizing {steps}).")]
    text = "The heatmaps stay similar with random weights: they show edges of the image rather than what was learned"
    return [Finding("warning", "heatmaps", f"{text} (rank correlation after randomizing {steps}).")]
