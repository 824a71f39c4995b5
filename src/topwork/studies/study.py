"""The list of studies, and what a study finds: sentences derived from measured values, with tables, charts and images.

The study NAME is the module of that name in this folder, with one function ``run(bench) -> Findings`` and a row in
``STUDIES``. This module has the results and helpers of all studies: differences on the same held-out images, and
sentences and charts about them. It does not import torch. Pages are in ``report/other_pages.py``.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from topwork.blocks import Bars, Chart, Grid, Share, Table
from topwork.errors import UsageError
from topwork.evaluation.compare import SIGNIFICANCE, accuracy_difference_interval, mcnemar
from topwork.evaluation.intervals import wilson
from topwork.studies.bench import Bench
from topwork.text import join_names, percent, points


def measured(correct: ArrayLike) -> Share:
    """Accuracy from (N,) booleans, N > 0, with its 95% interval (Wilson)."""
    right = np.asarray(correct, np.bool_)
    interval = wilson(float(right.mean()), len(right))
    return Share(float(right.mean()), interval.low, interval.high, len(right))


def stated(correct: ArrayLike) -> str:
    """``94.8% (95% CI 91.2–97.0)``, for sentences."""
    share = measured(correct)
    return percent(share.value) + share.interval(" (95% CI {})")


@dataclass(frozen=True)
class Difference:
    """Accuracy of the second method minus the first on the same images, with its paired 95% interval and McNemar's p-value."""

    value: float
    low: float
    high: float
    p_value: float
    n: int
    is_clear: bool

    def __str__(self) -> str:
        return f"{points(self.value)} points (95% CI {points(self.low)} to {points(self.high)})"


@dataclass(frozen=True, eq=False)
class Findings:
    """What a study found.

    Attributes:
        sentences: conclusions, the most important first; each follows from measured values.
        parts: tables, charts and images in reading order.
        values: the measured values by name, as plain JSON values, for programs and tests.
        facts: the conditions: images, network, size, epochs.
    """

    sentences: tuple[str, ...]
    parts: tuple[Table | Chart | Bars | Grid, ...]
    values: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; only the names of pictures."""
        kinds: dict[str, list[dict[str, Any]]] = {"tables": [], "plots": [], "bars": [], "grids": []}
        for part in self.parts:
            if isinstance(part, Grid):
                rows = [{"name": name, "n_pictures": len(pictures)} for name, pictures in part.rows]
                kinds["grids"].append({"title": part.title, "columns": list(part.columns), "rows": rows})
            else:
                kind = {Table: "tables", Chart: "plots", Bars: "bars"}[type(part)]
                kinds[kind].append(asdict(part))
        return {"sentences": list(self.sentences), "values": self.values, "facts": self.facts, **kinds}


def difference(first: ArrayLike, second: ArrayLike, seed: int = 0) -> Difference:
    """Compares two methods on the same N images, given as (N,) booleans: whether each prediction is correct."""
    one, two = np.asarray(first, np.bool_), np.asarray(second, np.bool_)
    interval, p_value = accuracy_difference_interval(one, two, seed=seed), mcnemar(one, two)
    value = float(two.mean() - one.mean())
    return Difference(value, interval.low, interval.high, p_value, len(one), p_value < SIGNIFICANCE and value != 0)


def compared(first: str, first_correct: ArrayLike, second: str, second_correct: ArrayLike, seed: int = 0) -> str:
    """Whether the second method is better than the first, on the same images."""
    found = difference(first_correct, second_correct, seed)
    one, two = (percent(measured(correct).value) for correct in (first_correct, second_correct))
    facts = f"{upper(second)} vs. {first}: {two} vs. {one} accuracy, {found}"
    if not found.is_clear:
        return f"{facts}. No significant difference (p = {found.p_value:.2f}, {found.n} images)."
    better = second if found.value > 0 else first
    p = "< 0.001" if found.p_value < 0.001 else f"= {found.p_value:.3f}"
    return f"{facts}. {upper(better)} is significantly better (p {p})."


def best_of(answers: Mapping[str, ArrayLike], seed: int = 0) -> str:
    """Which of several methods is best, and which others are not significantly worse."""
    names = sorted(answers, key=lambda name: -float(np.mean(np.asarray(answers[name], np.bool_))))
    best = names[0]
    tied = [name for name in names[1:] if not difference(answers[best], answers[name], seed).is_clear]
    worse = [name for name in names[1:] if name not in tied]
    facts = f"Highest accuracy: {best}, {stated(answers[best])}"
    if not tied:
        return f"{facts}, significantly better than all others."
    text = f"{facts}; no significant difference from {join_names(tied)} on {len(np.asarray(answers[best]))} images"
    return f"{text}; significantly better than {join_names(worse)}." if worse else f"{text}."


def accuracy_bars(title: str, answers: Mapping[str, ArrayLike]) -> Bars:
    """Accuracy of each method with its interval."""
    rows = tuple((name, measured(right)) for name, right in answers.items())
    return Bars(title, "accuracy on held-out images", rows)


def accuracies(answers: Mapping[str, ArrayLike]) -> dict[str, float]:
    """Accuracy by name, for ``values``."""
    return {name: float(np.asarray(right).mean()) for name, right in answers.items()}


def upper(text: str) -> str:
    """The text with its first letter capitalized."""
    return text[:1].upper() + text[1:]


# ---- the list of studies


@dataclass(frozen=True)
class Study:
    """A study as ``topwork study --list`` shows it.

    Attributes:
        teaches: what you learn.
        cost: typical running time.
        source: the tutorial or paper it is based on.
    """

    name: str
    title: str
    teaches: str
    cost: str
    source: str


STUDIES = (
    Study(
        "normalization",
        "What does normalization do?",
        "Pretrained weights expect a certain mean and standard deviation, and training and test must use the same.",
        "100 s of CPU time",
        "guns and knives: training and testing with and without normalization",
    ),
    Study(
        "strategies",
        "Frozen features, last stages, or full fine-tuning?",
        "Which layers to train depends on the number of images and on their similarity to the pretraining data.",
        "130 s of CPU time",
        "Oxford pets: three fine-tuning strategies",
    ),
    Study(
        "scratch",
        "Pretrained or from scratch?",
        "How much pretraining helps, for the same number of epochs and for the same training time.",
        "3 minutes of CPU time",
        "cats and dogs: six convolution blocks from scratch vs. a pretrained VGG16",
    ),
    Study(
        "residual",
        "Why do deep networks need skip connections?",
        "Gradients vanish in plain deep networks but not in residual ones; which padding keeps the size of a feature map.",
        "60 s of CPU time",
        "cats and dogs: residual blocks and an exercise",
    ),
    Study(
        "rates",
        "Which learning rate, which schedule?",
        "The learning-rate range test, flat vs. one-cycle schedules, one rate vs. discriminative rates.",
        "140 s of CPU time",
        "Oxford pets: lr_find, fit_one_cycle and slice learning rates",
    ),
    Study(
        "data-size",
        "How many images are enough?",
        "Accuracy by number of images per class, with confidence intervals, and the gain to expect from more images.",
        "20 s of CPU time",
        "cats and dogs: 500 images per class; Caltech-101: classes with few images",
    ),
    Study(
        "grayscale",
        "How to use grayscale images?",
        "Three ways to feed grayscale images to a color backbone, and whether a learned first layer helps.",
        "60 s of CPU time",
        "cats and dogs: an exercise with one input channel",
    ),
    Study(
        "augmentation",
        "Does augmentation help?",
        "What the network sees, and which augmentations help on your images.",
        "80 s of CPU time",
        "Caltech-101 and Oxford pets: transforms",
    ),
    Study(
        "heads",
        "Which head, which loss?",
        "Linear, hidden layers or cosine; cross-entropy vs. binary cross-entropy for two classes.",
        "40 s of CPU time",
        "all five: 256-ReLU-0.4, 128-ReLU-0.2 with a sigmoid, a linear layer, fastai's head",
    ),
    Study(
        "backbones",
        "Which backbone?",
        "Parameters, multiply-adds, speed and accuracy of the networks that the tutorials use.",
        "130 s of CPU time",
        "all five: ResNet-18, 34, 50, 101, 152 and VGG16",
    ),
    Study(
        "domain-shift",
        "What if the images change?",
        "How much accuracy a domain shift costs, and how much can be recovered without labels; use --domain-by if folders are domains.",
        "2 minutes",
        "guns and knives: trained on photographs, used on X-ray scans",
    ),
)


def study_named(name: str) -> Study:
    """The study of this name.

    Raises:
        UsageError: no such study; suggests the closest names.
    """
    known = {study.name: study for study in STUDIES}
    if name not in known:
        near = difflib.get_close_matches(name, known, 2) or list(known)
        raise UsageError(f"{name}: no such study; did you mean {' or '.join(near)}? See topwork study --list.")
    return known[name]


def runner_of(study: Study) -> Callable[[Bench], Findings]:
    """The function of a study."""
    module = importlib.import_module(f"topwork.studies.{study.name.replace('-', '_')}")
    run: Callable[[Bench], Findings] = module.run
    return run
