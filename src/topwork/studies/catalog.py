"""Every study: what it teaches, what it costs, where it comes from. The study NAME is the module of that name here.

Only text, so that ``topwork study --list`` loads no network library.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass

from topwork.errors import UsageError
from topwork.studies.bench import Bench
from topwork.studies.study import Findings


@dataclass(frozen=True)
class Study:
    """A study as ``topwork study --list`` shows it.

    Attributes:
        teaches: what one knows afterwards.
        cost: time it takes, with what that was measured on.
        source: the tutorial or paper it comes from.
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
        "Pretrained weights expect pixels with one mean and deviation, and training and test must agree on it.",
        "100 s of processor time",
        "guns and knives: the 2 x 2 table of training and testing with and without it",
    ),
    Study(
        "strategies",
        "Features only, last stages, or everything?",
        "What to train depends on how many images there are and how like the pretraining data they are.",
        "130 s of processor time",
        "Oxford pets: the three strategies",
    ),
    Study(
        "scratch",
        "Pretrained or from scratch?",
        "What pretrained weights are worth, at equal epochs and at equal time.",
        "3 minutes of processor time",
        "cats and dogs: six blocks of convolution from scratch against a pretrained VGG16",
    ),
    Study(
        "residual",
        "Why do deep networks need skip connections?",
        "Gradients vanish in plain deep networks and not in residual ones; which padding keeps a map's side.",
        "60 s of processor time",
        "cats and dogs: the residual block and its exercise",
    ),
    Study(
        "rates",
        "Which learning rate, which schedule?",
        "The range test, flat against one-cycle, one rate against rates that rise with depth.",
        "140 s of processor time",
        "Oxford pets: lr_find, fit_one_cycle and slices of rates",
    ),
    Study(
        "data-size",
        "How many images are enough?",
        "Accuracy against images per class, with intervals, and what more images should bring.",
        "20 s of processor time",
        "cats and dogs: 500 images of each; Caltech-101: classes of few images",
    ),
    Study(
        "grayscale",
        "What about gray images?",
        "Three ways to feed gray images to a color backbone, and whether a learned first layer helps.",
        "60 s of processor time",
        "cats and dogs: the exercise with one input channel",
    ),
    Study(
        "augmentation",
        "What does augmentation bring?",
        "What the network sees, and which random changes help here.",
        "80 s of processor time",
        "Caltech-101 and Oxford pets: their transforms",
    ),
    Study(
        "heads",
        "Which head, which loss?",
        "Linear, hidden layers, cosine; cross-entropy against binary cross-entropy for two classes.",
        "40 s of processor time",
        "all five: 256-ReLU-0.4, 128-ReLU-0.2 with a sigmoid, one linear layer, fastai's head",
    ),
    Study(
        "backbones",
        "Which backbone?",
        "Parameters, multiply-adds, speed here and accuracy of the networks that tutorials use.",
        "130 s of processor time",
        "all five: ResNet-18, 34, 50, 101, 152 and VGG16",
    ),
    Study(
        "domain-shift",
        "What if the pictures change?",
        "What a change of look costs, and what comes back without labels; give --domain-by where folders are domains.",
        "2 minutes",
        "guns and knives: learned from photographs, used on X-ray scans",
    ),
)


def study_named(name: str) -> Study:
    """The study of this name.

    Raises:
        UsageError: there is none, with the nearest names.
    """
    known = {study.name: study for study in STUDIES}
    if name not in known:
        near = difflib.get_close_matches(name, known, 2) or list(known)
        raise UsageError(f"{name}: no such study; did you mean {' or '.join(near)}? topwork study --list names them.")
    return known[name]


def runner_of(study: Study) -> Callable[[Bench], Findings]:
    """The function of a study."""
    module = importlib.import_module(f"topwork.studies.{study.name.replace('-', '_')}")
    run: Callable[[Bench], Findings] = module.run
    return run
