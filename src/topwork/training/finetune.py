"""Fine-tuning end to end: from a backbone, images and settings to a fine-tuned network and head.

:func:`plan_tuning` and :func:`tune_classifier` are what ``topwork fit`` calls: from manifest, split and probe to a
:class:`TunedClassifier`, an ordinary backbone with the tuned weights. :func:`fine_tune` does the same in Python for any
head. Both call :func:`tune`. ``recipe.py`` decides what is done, ``loop.py`` trains, and ``selection.py`` selects the weights.
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
from torch import Tensor, nn

from topwork.data.augment import pipeline
from topwork.data.manifest import Manifest
from topwork.data.split import Split
from topwork.errors import Interrupted, TopworkError, UsageError
from topwork.features.embed import Features
from topwork.features.engine import best_device, feature_stages, gpu_has_bf16, map_layout, pool_map
from topwork.features.probe import Probe, Trial, fit_probe
from topwork.models.backbone import Backbone, adopt_weights, load_backbone
from topwork.models.head import HeadSpec, LinearHead, Power, last_features_head, parse_head
from topwork.models.modules import (
    build_classifier,
    classifier_name,
    n_outputs,
    powered,
    replace_module,
    set_linear,
)
from topwork.progress import Reporter
from topwork.settings import FitSettings
from topwork.text import Described, count
from topwork.training.batches import ImageDataset, decode_all
from topwork.training.cpu import State
from topwork.training.distributed import processes
from topwork.training.loop import Interruption, TrainerContext, TrainingResult, fit
from topwork.training.losses import TargetTerms
from topwork.training.optimizer import StageRow, stage_table, stages_of
from topwork.training.recipe import DataFacts, Recipe, TuneSettings, head_spec, plan
from topwork.training.selection import DEFAULT_MINUTES, SelectedWeights, estimate, select_weights, training_rate

CHECKPOINTS = "checkpoint"
LEAST_EPOCHS = 3  # with fewer, auto mode does not fine-tune


# ---- for fit: from the probe to a classifier


@dataclass(frozen=True)
class TunedClassifier:
    """A tuned network as backbone and head, and its training."""

    backbone: Backbone
    head: LinearHead
    training: FineTuned


@dataclass(frozen=True)
class TuningPlan:
    """What is trained, from which head, and on which images.

    Attributes:
        trial: the cross-validation of the probe.
    """

    backbone: Backbone
    settings: FitSettings
    recipe: Recipe
    spec: HeadSpec
    start: LinearHead
    facts: DataFacts
    train: ImageDataset
    valid: ImageDataset | None
    trial: Trial

    def network(self) -> nn.Module:
        """The initial network."""
        return make_network(self.backbone, self.spec, self.recipe, self.start)


def plan_tuning(
    backbone: Backbone,
    manifest: Manifest,
    features: Features,
    parts: Split,
    probe: Probe,
    settings: FitSettings,
    on_progress: Callable[[int, int], None] | None = None,
) -> TuningPlan:
    """Plans the training and decodes the images.

    Raises:
        UsageError: settings that contradict each other or the data.
    """
    n_classes, targets, start = len(manifest.classes), manifest.targets, probe.head
    spec = head_spec(settings)
    if spec == HeadSpec():
        spec = trained_from(start, settings)
    if start.kind != "plain" and spec.kind != "extended":  # an extended probe that cannot be tuned
        rows, balance = parts.train, settings.balance
        start = fit_probe(
            features, targets, n_classes, rows=rows, head="plain", seed=settings.seed, balance=balance
        ).head
    gray = all(sample.mode in ("1", "L", "LA", "I;16") for sample in manifest.samples)
    facts = data_facts(targets[parts.train], n_classes, len(parts.valid), gray, settings.device)
    recipe = plan(settings, facts, backbone.stage_names, settings.seed, head_is_fitted=spec.starts_from_probe)
    train, valid = image_datasets(manifest, parts.train, parts.valid, backbone, recipe, settings.workers, on_progress)
    trial = next(trial for trial in probe.trials if trial.chosen)
    return TuningPlan(backbone, settings, recipe, spec, start, facts, train, valid, trial)


def tune_classifier(
    planned: TuningPlan,
    folder: Path,
    reporter: Reporter,
    say: Callable[[str], None],
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> TunedClassifier | None:
    """Fine-tunes the network, or returns None if auto mode decides against it; ``say`` receives the decision.

    Args:
        folder: of the run; checkpoints are kept in a folder in it.

    Raises:
        TopworkError: training failed, with the cause; the last checkpoint is kept.
        Interrupted: by a signal; a checkpoint was saved for resuming.
    """
    group = processes(planned.settings.device)
    recipe, messages = group.agree(_within_time(planned, group.device))  # measured speeds differ between processes
    for message in messages:
        say(message)
    if recipe is None:
        return None
    with Interruption() as interruption:
        context = TrainerContext(
            folder=folder / CHECKPOINTS,
            resume=True,
            reporter=reporter,
            on_epoch=on_epoch,
            stop=interruption.stopped,
            processes=group,
        )
        done = tune(
            planned.backbone,
            recipe,
            planned.train,
            planned.valid,
            head=planned.spec,
            probe=planned.start,
            context=context,
        )
    if done.result.ending == "interrupted" and interruption.signal is not None:
        raise Interrupted(interruption.signal)
    backbone, head = done.backbone_and_head()
    for message in (done.result.message, done.selected.reason, *done.result.notes, *recipe.notes):
        say(message)
    return TunedClassifier(backbone, head, done)


def _within_time(planned: TuningPlan, device: str) -> tuple[Recipe | None, tuple[str, ...]]:
    """Fits the plan into the time budget; in auto mode, decides whether to fine-tune."""
    settings, facts = planned.settings, planned.facts
    budget = settings.time_budget_seconds
    if settings.mode == "auto" and not facts.n_valid:
        return None, ("There are no validation images: not fine-tuning.",)
    if settings.mode != "auto" and budget is None:
        return planned.recipe, ()
    rate = training_rate(planned.network(), planned.recipe, planned.train, device)
    recipe = plan(
        replace(settings, time_budget=f"{budget or 60 * DEFAULT_MINUTES:g}s"),
        replace(facts, images_per_second=rate),
        planned.backbone.stage_names,
        settings.seed,
        head_is_fitted=planned.spec.starts_from_probe,
    )
    if settings.mode != "auto":
        return recipe, ()
    if recipe.n_epochs < min(LEAST_EPOCHS, planned.recipe.n_epochs):
        fits = count(recipe.n_epochs, "epoch")
        return None, (f"Only {fits} would fit into the time budget, which is too little: not fine-tuning.",)
    expected = estimate(
        planned.trial.accuracy,
        planned.trial.n_images,
        facts.n_train,
        recipe,
        rate,
        None if budget is None else budget / 60,
    )
    return (recipe if expected.worth_it else None), (expected.message,)


# ---- in Python: any head


@dataclass(frozen=True, repr=False)
class FineTuned(Described):
    """A tuned classifier.

    Attributes:
        state: of the whole network including the classifier; float32, on the CPU.
    """

    state: State
    recipe: Recipe
    head: HeadSpec | nn.Module
    result: TrainingResult
    selected: SelectedWeights
    stages: list[StageRow]
    backbone: Backbone
    probe: LinearHead | None = None

    @property
    def n_parameters(self) -> int:
        """Of the network."""
        return sum(row.n_parameters for row in self.stages)

    @property
    def n_trainable(self) -> int:
        """Those that were trained."""
        return sum(row.n_trained for row in self.stages)

    def facts(self) -> dict[str, object]:
        """Shown in notebooks."""
        return {
            "Backbone": self.backbone.name,
            "Epochs": len(self.result.history),
            "Weights": self.selected.reason,
            "Trained parameters": f"{self.n_trainable:,} of {self.n_parameters:,}",
        }

    def network(self) -> nn.Module:
        """The tuned network, in eval mode: normalized images (B, 3, H, W) to logits."""
        network = make_network(self.backbone, self.head, self.recipe, self.probe)
        network.load_state_dict(self.state)
        return network.eval()

    def backbone_and_head(self) -> tuple[Backbone, LinearHead]:
        """The tuned network as backbone and head, for embedding, model folders and exports.

        Raises:
            UsageError: a custom head, which model folders do not support.
        """
        if isinstance(self.head, nn.Module):
            raise UsageError("Custom heads can be trained, but only a HeadSpec can be saved in a model folder.")
        return adopt(self.backbone, self.state, self.head, self.recipe.n_classes, self.probe)


def fine_tune(
    backbone: Backbone,
    manifest: Manifest,
    parts: Split,
    settings: TuneSettings | None = None,
    *,
    head: HeadSpec | nn.Module | str = "linear",
    probe: LinearHead | None = None,
    context: TrainerContext | None = None,
    seed: int = 0,
    n_threads: int | None = None,
) -> FineTuned:
    """Trains a pretrained network on the train part of a manifest; epoch and weights are selected on valid.

    Args:
        head: ``linear``, ``cosine``, layers such as ``256:0.4,128:0.2``, or a module from (B, D) features to logits.
        probe: head of a fitted probe, to initialize a linear or extended head; without it, the head is first trained
            alone.
        context: checkpoints, callbacks, stopping.

    Raises:
        UsageError: settings that contradict each other or the data.
        TopworkError: an image is gone, or training failed.
    """
    settings, spec = settings or TuneSettings(), parse_head(head) if isinstance(head, str) else head
    labels, n_classes = manifest.targets, len(manifest.classes)
    if probe is not None and spec == HeadSpec():
        spec = trained_from(probe, settings)
    is_fitted = probe is not None and isinstance(spec, HeadSpec) and spec.starts_from_probe
    facts = data_facts(labels[parts.train], n_classes, len(parts.valid))
    recipe = plan(settings, facts, backbone.stage_names, seed, head_is_fitted=is_fitted)
    train, valid = image_datasets(manifest, parts.train, parts.valid, backbone, recipe, n_threads)
    return tune(backbone, recipe, train, valid, head=spec, probe=probe, context=context)


def tune(
    backbone: Backbone,
    recipe: Recipe,
    train: ImageDataset,
    valid: ImageDataset | None,
    *,
    head: HeadSpec | nn.Module | None = None,
    probe: LinearHead | None = None,
    context: TrainerContext | None = None,
    target: TargetTerms | None = None,
) -> FineTuned:
    """Trains by a recipe and keeps the best weights.

    Args:
        target: additional terms of the loss, on images of another domain.

    Raises:
        TopworkError: training failed, with the cause.
    """
    head, context = head or HeadSpec(), context or TrainerContext()
    network = make_network(backbone, head, recipe, probe)
    table = stage_table(network, recipe)
    if context.processes.is_main:
        context.reporter.stages([vars(row) for row in table])
    result = fit(network, recipe, train, valid, context, target)
    fresh = make_network(backbone, head, recipe, probe)
    selected = select_weights(fresh, result, recipe, valid, context.processes)
    return FineTuned(selected.state, recipe, head, result, selected, table, backbone, probe)


def make_network(
    backbone: Backbone,
    head: HeadSpec | nn.Module,
    recipe: Recipe,
    probe: LinearHead | None = None,
) -> nn.Module:
    """The initial network: pretrained (or random) weights and a new head, with the probe's weights if given.

    Args:
        probe: required for an extended head, because it defines the features.
    """
    width = n_outputs(recipe.n_classes, recipe.outputs)
    if recipe.strategy == "scratch":
        backbone = load_backbone(f"random:{backbone.architecture}").changed(replace(backbone.changes, hidden=None))
    if isinstance(head, HeadSpec) and head.kind == "extended":
        assert probe is not None, "an extended head is the probe's own"
        return put_extended(backbone.module(1), backbone, probe)
    # the pretrained classifier is loaded and then replaced; timm knows where it is
    module = copy.deepcopy(head) if isinstance(head, nn.Module) else head
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)  # a new head is random
        network = build_classifier(backbone.module(1), module, width)
    is_plain = isinstance(head, HeadSpec) and head.kind == "linear" and not head.dropout
    if recipe.head_from_probe and probe is not None and is_plain and probe.kind == "plain":
        folded = probe.folded()
        set_linear(network, folded.weight, folded.bias)
    return network


def trained_from(probe: LinearHead, settings: TuneSettings) -> HeadSpec:
    """The head to tune a probe as: extended only if the recipe has one row per class and a pretrained network."""
    is_possible = settings.outputs != "binary" and settings.strategy != "scratch"
    return HeadSpec("extended" if probe.kind == "extended" and is_possible else "linear")


def stage_names(network: nn.Module) -> list[str]:
    """The stages that a plan gives rates to."""
    return [stage.name for stage in stages_of(network)]


# ---- images and facts


def image_datasets(
    manifest: Manifest,
    train_rows: NDArray[np.int64],
    valid_rows: NDArray[np.int64],
    backbone: Backbone,
    recipe: Recipe,
    n_threads: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[ImageDataset, ImageDataset | None]:
    """Decodes the images of a manifest once, for training and for validation."""
    labels, n_train = manifest.targets, len(train_rows)

    def from_row(before: int) -> Callable[[int, int], None]:
        return lambda n_done, _: on_progress(before + n_done, n_train + len(valid_rows)) if on_progress else None

    train = training_dataset(manifest, train_rows, labels[train_rows], backbone, recipe, n_threads, from_row(0))
    if not len(valid_rows):
        return train, None
    pixels = decode_all(manifest, valid_rows, backbone.spec, n_threads=n_threads, on_progress=from_row(n_train))
    return train, ImageDataset(pixels, labels[valid_rows], backbone.spec)


def training_dataset(
    manifest: Manifest,
    rows: NDArray[np.int64],
    labels: NDArray[Any],
    backbone: Backbone,
    recipe: Recipe,
    n_threads: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> ImageDataset:
    """Decoded images of some rows, augmented according to the recipe, with any labels."""
    margin = pipeline(recipe.augmentation).margin
    pixels = decode_all(manifest, rows, backbone.spec, margin=margin, n_threads=n_threads, on_progress=on_progress)
    # keyed by content: the same images in another order or layout get the same augmentation
    keys = np.array([int(manifest.samples[row].content_hash[:15], 16) for row in rows], np.int64)
    return ImageDataset(pixels, labels, backbone.spec, recipe.augmentation, recipe.seed, keys)


def data_facts(
    labels: NDArray[Any], n_classes: int, n_valid: int, gray: bool = False, device: str = "auto"
) -> DataFacts:
    """The input of :func:`topwork.training.recipe.plan` for these labels and this machine.

    Args:
        labels: (N,) classes, or (N, C) 0 or 1 for several labels.
        device: see ``--device``.
    """
    several = labels.ndim == 2
    counts = tuple(int(n) for n in (labels.sum(0) if several else np.bincount(labels, minlength=n_classes)))
    device = best_device(device)
    has_bf16 = gpu_has_bf16() if device == "cuda" else device == "cpu" and _cpu_has_bf16()
    return DataFacts(counts, n_valid, len(labels), device != "cpu", has_bf16=has_bf16, gray=gray, multilabel=several)


def _cpu_has_bf16() -> bool:
    """Whether the processor supports bf16 natively; emulation would be slower."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(name in flags for name in ("avx512_bf16", "amx_bf16", " bf16"))


# ---- the probe's head in the network, and the tuned network as backbone and head
# With a plain head, a network would have to relearn what an extended probe gains from square roots and maps of earlier stages
# (docs/lab-log.md, 2026-11-26). After training, hidden layers become part of the network, and any head a LinearHead with one
# row per class, so that engine, store, model folder, export and server need not know about tuning.

LEAST_ROOT = 1e-6  # below it the square root is constant: its slope at zero is infinite


class ExtendedHead(nn.Module):
    """Maps pooled features, and pooled maps of earlier stages, to logits: (B, D) to (B, C), like ``LinearHead.logits``."""

    def __init__(self, head: LinearHead) -> None:
        super().__init__()
        self.blocks, self.power = head.transform.blocks, head.transform.power
        self.weight, self.bias = (nn.Parameter(torch.from_numpy(value.copy())) for value in (head.weight, head.bias))
        self.mean: Tensor
        self.scale: Tensor
        for name in ("mean", "scale"):
            self.register_buffer(name, torch.from_numpy(getattr(head.transform, name).copy()))
        self.watched: list[str] = []
        self.pooled: dict[str, Tensor] = {}

    def watch(self, network: nn.Module, stages: list[str]) -> None:
        """Pools the maps of these modules into ``pooled`` whenever they run."""
        self.watched = stages
        layout = map_layout(network)
        for name in stages:
            network.get_submodule(name).register_forward_hook(_Keep(self.pooled, name, layout))

    def forward(self, last: Tensor) -> Tensor:
        """Computes the logits; the stages have run before."""
        values = {"last": last.float()}
        if "stages" in self.blocks:
            values["stages"] = torch.cat([self.pooled[name] for name in self.watched], 1)
        self.pooled.clear()  # frees the graph of this batch
        joined = torch.cat([values[name] for name in self.blocks], 1)
        columns = (powered(joined, self.power, LEAST_ROOT) - self.mean) / self.scale
        with torch.autocast(columns.device.type, enabled=False):
            logits: Tensor = nn.functional.linear(columns, self.weight, self.bias)
        return logits


class _Keep:
    """A hook that is copied together with its target, unlike a closure."""

    def __init__(self, pooled: dict[str, Tensor], name: str, layout: tuple[int, bool]) -> None:
        self._pooled, self._name, self._layout = pooled, name, layout

    def __call__(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._pooled[self._name] = pool_map(output, *self._layout).float()


def put_extended(network: nn.Module, backbone: Backbone, head: LinearHead) -> nn.Module:
    """Replaces the classifier of a timm network by an extended head, in place; returns the network."""
    module = ExtendedHead(head)
    replace_module(network, classifier_name(network), module)
    if "stages" in head.transform.blocks:
        module.watch(network, feature_stages(backbone))
    return network


def adopt(
    backbone: Backbone, state: State, head: HeadSpec, n_classes: int, probe: LinearHead | None = None
) -> tuple[Backbone, LinearHead]:
    """The tuned network as a backbone, and its last layer as a head.

    Args:
        probe: the initial extended head, which has the same columns.

    Raises:
        TopworkError: the weights do not fit the network.
        UsageError: the last layer of this network is not supported.
    """
    classifier = replace(backbone, changes=replace(backbone.changes, hidden=None)).classifier_name
    is_sequence = bool(head.hidden or head.dropout)
    last = f"{classifier}.{head.last_index}." if is_sequence else f"{classifier}."
    rows = {key.removeprefix(last): value for key, value in state.items() if key.startswith(last)}
    if "weight" not in rows or rows["weight"].ndim != 2:
        raise UsageError(
            f"--backbone {backbone.name}: its classifier is not a single linear layer, so it cannot be fine-tuned."
        )
    if head.kind == "extended":
        assert probe is not None, "an extended head is the probe's own"
        linear = replace(probe, weight=rows["weight"].float().numpy(), bias=rows["bias"].float().numpy())
    else:
        linear = _last_layer(rows, head.kind)
    below = f"{classifier}." if not head.hidden else last
    rest = {key: value for key, value in state.items() if not key.startswith(below)}
    changes = replace(backbone.changes, hidden=str(head) if head.hidden else None)
    network = replace(backbone, changes=changes).skeleton()
    missing, unexpected = network.load_state_dict(rest, strict=False)
    if missing or unexpected or len(linear.weight) != n_classes:
        raise TopworkError(f"{backbone.name}: the fine-tuned weights do not fit the network: {missing or unexpected}")
    name = f"{backbone.name.removesuffix(' (tuned)')} (tuned)"
    return adopt_weights(backbone, network, changes=changes, name=name), linear


def _last_layer(rows: dict[str, Tensor], kind: str) -> LinearHead:
    """The head with one row per class that a trained layer is equivalent to."""
    weight = rows["weight"].float()
    power: Power = "none"
    if kind == "cosine":  # scale · cos(f, w) = (scale · w/|w| / √D) · (√D · f/|f|); "unit" features have length √D
        weight = rows["scale"].float() * nn.functional.normalize(weight, dim=1) / weight.shape[1] ** 0.5
        power = "unit"
    bias = rows["bias"].float() if "bias" in rows else torch.zeros(len(weight))
    if len(weight) == 1:  # sigmoid(s) = softmax(0, s)
        weight, bias = (torch.cat([torch.zeros_like(value), value]) for value in (weight, bias))
    return last_features_head(weight.numpy(), bias.numpy(), power)
