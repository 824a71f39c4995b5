"""The list of studies. The study NAME is the module of that name in this folder.

Only text, so that ``topwork study --list`` does not import torch.
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
