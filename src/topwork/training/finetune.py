"""Fine-tuning from end to end: backbone, images and a recipe in, weights for a timm network out.

In: a Backbone, a Recipe from ``recipe.plan``, streams of images, and the probe's head where there is one. Out:
:class:`FineTuned`: a state dict that ``timm.create_model(backbone.architecture, num_classes=...)`` loads when the head
is linear. Here the pieces meet and nothing is decided: see ``recipe.py`` for what and ``loop.py`` for how.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from topwork.data.augment import pipeline
from topwork.data.manifest import Manifest
from topwork.data.split import Split
from topwork.data.transforms import InputSpec, Pixels
from topwork.errors import UsageError
from topwork.features.engine import gpu_has_bf16
from topwork.models.backbone import Backbone, load_backbone
from topwork.models.head import HeadSpec, LinearHead, parse_head
from topwork.models.modules import (
    SixBlockNetwork,
    build_classifier,
    count_parameters,
    n_outputs,
    set_linear,
)
from topwork.training.adoption import adopt
from topwork.training.average import Chosen, choose_weights
from topwork.training.batches import ImageStream, decode_all
from topwork.training.checkpoint import INDEX
from topwork.training.extended import put_extended
from topwork.training.folding import State
from topwork.training.loop import Surroundings, Tuned, fit
from topwork.training.losses import TargetTerms
from topwork.training.optimizer import StageRow, freeze, stage_table, stages_of
from topwork.training.recipe import DataFacts, Recipe, TuneSettings, plan
from topwork.training.tail import tail_streams

SIX_BLOCKS = "six-blocks"  # a name for the backbone setting: the small network of models/modules.py, from scratch


@dataclass(frozen=True)
class FineTuned:
    """A tuned classifier.

    Attributes:
        state: of the whole network, classifier included; float32 and on the CPU, ready for safetensors.
        n_parameters, n_trainable: of the network that was trained.
    """

    state: State
    recipe: Recipe
    head: HeadSpec | nn.Module
    tuned: Tuned
    chosen: Chosen
    stages: list[StageRow]
    n_parameters: int
    n_trainable: int
    backbone: Backbone | str
    probe: LinearHead | None = None

    def network(self) -> nn.Module:
        """The tuned network, in eval mode: normalized images (B, 3, H, W) to logits."""
        network = make_network(self.backbone, self.head, self.recipe, self.probe)
        network.load_state_dict(self.state)
        return network.eval()

    def backbone_and_head(self) -> tuple[Backbone, LinearHead]:
        """The tuned network in the form that embedding, model folders and exports know.

        Raises:
            UsageError: a head, or a network, of one's own, which no model folder can describe.
        """
        if isinstance(self.head, nn.Module) or isinstance(self.backbone, str):
            raise UsageError(
                "A head or network of your own can be trained, but only a HeadSpec fits into a model folder."
            )
        return adopt(self.backbone, self.state, self.head, self.recipe.n_classes, self.probe)


def fine_tune(
    backbone: Backbone,
    manifest: Manifest,
    parts: Split,
    settings: TuneSettings | None = None,
    *,
    head: HeadSpec | nn.Module | str = "linear",
    probe: LinearHead | None = None,
    around: Surroundings | None = None,
    seed: int = 0,
    n_threads: int | None = None,
) -> FineTuned:
    """Trains a pretrained network on the train part of a manifest; the valid part chooses epoch and mixture of weights.

    Args:
        head: as ``linear``, ``cosine``, ``256:0.4,128:0.2``; or a module of your own, from (B, D) features to logits.
        probe: head of a fitted probe, which a linear head starts from (an extended one with all that it reads); without
            it the head is first trained alone.
        around: checkpoints, callbacks, stopping.

    Raises:
        UsageError: settings that contradict each other or the data.
        TopworkError: an image vanished, or training failed, with the cause.
    """
    settings, spec = settings or TuneSettings(), parse_head(head) if isinstance(head, str) else head
    labels, n_classes = manifest.targets, len(manifest.classes)
    if probe is not None and spec == HeadSpec():
        spec = trained_from(probe, settings)
    is_fitted = probe is not None and isinstance(spec, HeadSpec) and spec.starts_from_probe
    facts = facts_of(labels[parts.train], n_classes, len(parts.valid))
    recipe = plan(settings, facts, stage_names(backbone.skeleton(n_classes)), seed, head_is_fitted=is_fitted)
    train, valid = streams_of(manifest, parts.train, parts.valid, backbone, recipe, n_threads)
    return tune(backbone, recipe, train, valid, head=spec, probe=probe, around=around)


def trained_from(probe: LinearHead, settings: TuneSettings) -> HeadSpec:
    """What a probe is tuned as: an extended head as it is, where the recipe has one row a class and a pretrained network."""
    is_possible = settings.outputs != "binary" and settings.strategy != "scratch"
    return HeadSpec("extended" if probe.kind == "extended" and is_possible else "linear")


def make_network(
    backbone: Backbone | str,
    head: HeadSpec | nn.Module,
    recipe: Recipe,
    probe: LinearHead | None = None,
) -> nn.Module:
    """The network that training starts from: pretrained (or random) weights, a new head, the probe's rows in it.

    Args:
        probe: an extended head cannot be built without it, as it says what the head reads.
    """
    width = n_outputs(recipe.n_classes, recipe.outputs)
    if backbone == SIX_BLOCKS:
        return SixBlockNetwork(width)
    if isinstance(backbone, str) or recipe.strategy == "scratch":
        name = backbone if isinstance(backbone, str) else f"random:{backbone.architecture}"
        changes = None if isinstance(backbone, str) else replace(backbone.changes, hidden=None)
        backbone = load_backbone(name)
        backbone = backbone.changed(changes) if changes else backbone
    if isinstance(head, HeadSpec) and head.kind == "extended":
        assert probe is not None, "an extended head is the probe's own"
        return put_extended(backbone.module(1), backbone, probe)
    # the classifier of the pretrained network is loaded and then replaced; timm knows where it is
    module = copy.deepcopy(head) if isinstance(head, nn.Module) else head
    network = build_classifier(backbone.module(1), module, width)
    is_plain = isinstance(head, HeadSpec) and head.kind == "linear" and not head.dropout
    if recipe.head_from_probe and probe is not None and is_plain and probe.kind == "plain":
        folded = probe.folded()
        set_linear(network, folded.weight, folded.bias)
    return network


def tune(
    backbone: Backbone | str,
    recipe: Recipe,
    train: ImageStream,
    valid: ImageStream | None,
    *,
    head: HeadSpec | nn.Module | None = None,
    probe: LinearHead | None = None,
    around: Surroundings | None = None,
    target: TargetTerms | None = None,
) -> FineTuned:
    """Trains by a recipe and keeps the best weights.

    Args:
        target: further terms of the loss, on images of another domain.

    Raises:
        TopworkError: training failed, with the cause.
    """
    head, around = head or HeadSpec(), around or Surroundings()
    network = make_network(backbone, head, recipe, probe)
    table = stage_table(network, recipe)
    moving = replace(recipe.phases[0], rates=tuple((row.stage, row.rate) for row in table))
    freeze(network, moving)
    n_parameters, n_trainable = count_parameters(network)
    if around.on_stages and around.processes.is_main:
        around.on_stages([vars(row) for row in table])
    if recipe.tail_views is not None:
        assert target is None, "cached activations are of the training images only"
        cached = tail_streams(network, recipe, train, valid, around.on_progress)
        tuned = fit(network, recipe, cached[0], cached[1], around)
    else:
        tuned = fit(network, recipe, train, valid, around, target)
    fresh = make_network(backbone, head, recipe, probe)
    chosen = choose_weights(fresh, tuned, recipe, valid, around.processes)
    return FineTuned(chosen.state, recipe, head, tuned, chosen, table, n_parameters, n_trainable, backbone, probe)


def streams_of(
    manifest: Manifest,
    train_rows: NDArray[np.int64],
    valid_rows: NDArray[np.int64],
    backbone: Backbone,
    recipe: Recipe,
    n_threads: int | None = None,
    on_progress: Any = None,
) -> tuple[ImageStream, ImageStream | None]:
    """Decodes the images of a manifest once, for training and for validation."""
    labels, n_train = manifest.targets, len(train_rows)

    def from_row(before: int) -> Callable[[int, int], None]:
        return lambda n_done, _: on_progress(before + n_done, n_train + len(valid_rows)) if on_progress else None

    train = training_stream(manifest, train_rows, labels[train_rows], backbone, recipe, n_threads, from_row(0))
    if not len(valid_rows):
        return train, None
    pixels = decode_rows(manifest, valid_rows, backbone.spec, n_threads=n_threads, on_progress=from_row(n_train))
    return train, ImageStream(pixels, labels[valid_rows], backbone.spec)


def training_stream(
    manifest: Manifest,
    rows: NDArray[np.int64],
    labels: NDArray[Any],
    backbone: Backbone,
    recipe: Recipe,
    n_threads: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> ImageStream:
    """Decoded images of some rows, augmented as the recipe says, with any labels."""
    margin = pipeline(recipe.augmentation).margin
    pixels = decode_rows(manifest, rows, backbone.spec, margin=margin, n_threads=n_threads, on_progress=on_progress)
    # named by content: the same images in another order or layout are augmented in the same way
    keys = np.array([int(manifest.samples[row].content_hash[:15], 16) for row in rows], np.int64)
    return ImageStream(pixels, labels, backbone.spec, recipe.augmentation, recipe.seed, keys)


def decode_rows(manifest: Manifest, rows: NDArray[np.int64], spec: InputSpec, **options: Any) -> Pixels:
    """:func:`topwork.training.batches.decode_all` for rows of a manifest, which is what names the images."""
    return decode_all(manifest.read, rows, spec, name=lambda row: manifest.samples[row].path, **options)


def facts_of(labels: NDArray[Any], n_classes: int, n_valid: int, gray: bool = False) -> DataFacts:
    """What :func:`topwork.training.recipe.plan` wants to know, about these training labels and this machine.

    Args:
        labels: (N,) classes, or (N, C) zeros and ones where an image may have several.
    """
    several = labels.ndim == 2
    counts = tuple(int(n) for n in (labels.sum(0) if several else np.bincount(labels, minlength=n_classes)))
    has_gpu = torch.cuda.is_available()
    has_bf16 = gpu_has_bf16() if has_gpu else _has_bf16()
    return DataFacts(counts, n_valid, len(labels), has_gpu, has_bf16=has_bf16, gray=gray, multilabel=several)


def stage_names(network: nn.Module) -> list[str]:
    """The stages that a plan gives rates to."""
    return [stage.name for stage in stages_of(network)]


def _has_bf16() -> bool:
    """Whether the processor multiplies in bf16; where it only emulates it, training would be slower."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(name in flags for name in ("avx512_bf16", "amx_bf16", " bf16"))


def check_resumable(folder: Path) -> None:
    """Raises UsageError where there is nothing to resume from."""
    if not (folder / INDEX).is_file():
        raise UsageError(f"{folder}: no checkpoint to resume from. Start the run without --resume.")
