"""topwork: transfer learning for image classification, from a folder of images to a classifier you can trust.

The public names are gathered here and loaded when they are first used: ``import topwork`` must stay quick and must not
import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Backbone": "topwork.models.backbone",
    "Classifier": "topwork.models.classifier",
    "Features": "topwork.features.embed",
    "ImageClassifier": "topwork.estimator",
    "ImageFeatures": "topwork.estimator",
    "InputSpec": "topwork.data.transforms",
    "Manifest": "topwork.data.manifest",
    "Predictor": "topwork.export.predictor",
    "Rules": "topwork.data.samples",
    "Split": "topwork.data.split",
    "TopworkError": "topwork.errors",
    "adapt": "topwork.commands.adapt",
    "compare_domains": "topwork.commands.compare_domains",
    "compare_runs": "topwork.commands.compare",
    "decode": "topwork.data.images",
    "embed": "topwork.features.embed",
    "evaluate": "topwork.commands.evaluate",
    "fine_tune": "topwork.training.finetune",
    "fit": "topwork.commands.fit",
    "fit_probe": "topwork.features.probe",
    "load_backbone": "topwork.models.backbone",
    "load_classifier": "topwork.models.classifier",
    "load_run": "topwork.run",
    "scan": "topwork.data.manifest",
    "split": "topwork.data.split",
}
__all__ = ["__version__", *_HOMES]  # noqa: PLE0604 - names are strings

if TYPE_CHECKING:
    from topwork.commands.adapt import adapt as adapt
    from topwork.commands.compare import compare_runs as compare_runs
    from topwork.commands.compare_domains import compare_domains as compare_domains
    from topwork.commands.evaluate import evaluate as evaluate
    from topwork.commands.fit import fit as fit
    from topwork.data.images import decode as decode
    from topwork.data.manifest import Manifest as Manifest
    from topwork.data.manifest import scan as scan
    from topwork.data.samples import Rules as Rules
    from topwork.data.split import Split as Split
    from topwork.data.split import split as split
    from topwork.data.transforms import InputSpec as InputSpec
    from topwork.errors import TopworkError as TopworkError
    from topwork.estimator import ImageClassifier as ImageClassifier
    from topwork.estimator import ImageFeatures as ImageFeatures
    from topwork.export.predictor import Predictor as Predictor
    from topwork.features.embed import Features as Features
    from topwork.features.embed import embed as embed
    from topwork.features.probe import fit_probe as fit_probe
    from topwork.models.backbone import Backbone as Backbone
    from topwork.models.backbone import load_backbone as load_backbone
    from topwork.models.classifier import Classifier as Classifier
    from topwork.models.classifier import load_classifier as load_classifier
    from topwork.run import load_run as load_run
    from topwork.training.finetune import fine_tune as fine_tune


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'topwork' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
