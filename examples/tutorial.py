"""What the five scripts share: their command line, training a tutorial's network, and topwork's default on the same split."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

import topwork
from topwork.data.manifest import Manifest
from topwork.data.split import Split
from topwork.evaluation.metrics import evaluate_part
from topwork.evaluation.predictions import Predictions
from topwork.models.backbone import Backbone
from topwork.models.modules import classifier_name
from topwork.settings import TuneSettings
from topwork.studies.words import compared
from topwork.text import duration, percent
from topwork.training.finetune import data_facts, image_datasets, stage_names
from topwork.training.loop import TrainerContext, fit
from topwork.training.recipe import plan
from topwork.training.selection import tuned_logits


@dataclass(frozen=True)
class Trained:
    """The test images as a trained network answers them, the seconds it took, and one record an epoch."""

    test: Predictions
    seconds: float
    history: list[dict[str, Any]] = field(default_factory=list)


def options(about: str | None, backbone: str, epochs: int, size: int = 224, **more: Any) -> argparse.Namespace:
    """The arguments of a script, with its tutorial's values as defaults; ``more`` are further ones by name."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="folder of images; without it they are downloaded, where that is possible"
    )
    parser.add_argument("--backbone", default=backbone, help=f"default {backbone}; lite0 needs no network")
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--size", type=int, default=size, help="input side in pixels")
    parser.add_argument("--seed", type=int, default=0)
    for name, value in more.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    return parser.parse_args()


def train(
    network: nn.Module, backbone: Backbone, settings: TuneSettings, manifest: Manifest, parts: Split, seed: int = 0
) -> Trained:
    """Trains a network on the train part, chooses the epoch on valid where there is one, and answers the test part."""
    labels = np.array(manifest.labels)
    facts = data_facts(labels[parts.train], len(manifest.classes), len(parts.valid))
    # statistics of frozen batch norms rest unless the tutorial says otherwise
    policy = "frozen" if settings.batch_norm == "auto" else settings.batch_norm
    recipe = plan(replace(settings, batch_norm=policy, interpolate=False), facts, stage_names(network), seed)
    learning, valid = image_datasets(manifest, parts.train, parts.valid, backbone, recipe)
    test, _ = image_datasets(manifest, parts.test, parts.test[:0], backbone, replace(recipe, augmentation="none"))
    started = time.perf_counter()
    tuned = fit(network, recipe, learning, valid, TrainerContext(on_epoch=_tell))
    logits = tuned_logits(network, tuned.best, recipe, test)
    if recipe.outputs == "binary":
        logits = np.concatenate([np.zeros_like(logits), logits], axis=1)  # sigmoid(z) = softmax(0, z)
    answers = Predictions(manifest.classes, parts.test, labels[parts.test], logits)
    return Trained(answers, time.perf_counter() - started, tuned.history)


def default(manifest: Manifest, parts: Split, size: int) -> Trained:
    """The same split by topwork's default: a head on frozen features, chosen by cross-validation on train."""
    started = time.perf_counter()
    backbone = topwork.load_backbone("lite0").with_spec(height=size, width=size)
    features = topwork.embed(backbone, manifest)
    probe = topwork.fit_probe(features, manifest.labels, len(manifest.classes), rows=parts.train)
    blocks = {name: features.block(name, parts.test) for name in probe.head.transform.blocks}
    labels = np.array(manifest.labels)[parts.test]
    answers = Predictions(manifest.classes, parts.test, labels, probe.head.logits(blocks))
    return Trained(answers, time.perf_counter() - started)


def sizes(architecture: str, change: Callable[[Any], nn.Module]) -> tuple[int, int]:
    """(all, in the head) parameters of a tutorial's network, counted without making its weights."""
    with torch.device("meta"):
        network = change(timm.create_model(architecture, pretrained=False))
    head = network.get_submodule(classifier_name(network))
    return sum(p.numel() for p in network.parameters()), sum(p.numel() for p in head.parameters())


def show(title: str, published: str, theirs: Trained, ours: Trained) -> None:
    """Both ways beside what was published, and whether they differ."""
    print(f"\n{title}, {len(theirs.test):,} test images. Published: {published}.")
    for name, found in (("the tutorial's way here", theirs), ("topwork's default", ours)):
        judged = evaluate_part(found.test).as_dict()
        interval, top = judged["accuracy"], judged.get("top5_accuracy")
        five = f", top five {percent(top)}" if top is not None and len(found.test.classes) > 5 else ""
        low, high = 100 * interval["low"], 100 * interval["high"]
        print(f"  {name:24} {percent(interval['value'])} ({low:.1f} to {high:.1f}){five}, {duration(found.seconds)}")
    print(compared("the tutorial's way", theirs.test.correct, "topwork's default", ours.test.correct))


def _tell(record: dict[str, Any]) -> None:
    judged = f", valid {percent(record['valid_accuracy'])}" if "valid_accuracy" in record else ""
    print(f"  epoch {record['epoch']}: loss {record['train_loss']:.3f}{judged}", flush=True)
