"""Fine-tuning end to end: from a backbone, images and settings to a fine-tuned network and head.

:func:`tune_classifier` is what ``topwork fit`` calls: from manifest, split and probe to a :class:`TunedClassifier`, an
ordinary backbone with the tuned weights. :func:`fine_tune` does the same in Python for any head. Both call
:func:`tune`. ``recipe.py`` decides what is done, ``loop.py`` trains, and ``selection.py`` selects the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from topwork.data.augment import pipeline
from topwork.data.manifest import Manifest
from topwork.data.split import Split
from topwork.data.transforms import InputSpec, Pixels
from topwork.errors import Interrupted, UsageError
from topwork.features.embed import Features
from topwork.features.engine import best_device, gpu_has_bf16
from topwork.features.probe import Probe, fit_probe
from topwork.models.backbone import Backbone, load_backbone
from topwork.models.head import HeadSpec, LinearHead, parse_head
from topwork.models.modules import SixBlockNetwork, build_classifier, n_outputs, set_linear
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
from topwork.training.tuned_head import adopt, put_extended

SIX_BLOCKS = "six-blocks"  # a name for the backbone setting: the small network in models/modules.py, from scratch
CHECKPOINTS = "checkpoint"
LEAST_EPOCHS = 3  # with fewer, auto mode does not fine-tune


# ---- for fit: from the probe to a classifier


@dataclass(frozen=True)
class TunedClassifier:
    """A tuned network as backbone and head.

    Attributes:
        trained_head: the trained head, in the syntax of ``--hidden``.
        recipe: of the tuning, as plain JSON values.
        history: one record per epoch.
        stages: (stage, parameters, trainable, rate) of the network.
    """

    backbone: Backbone
    head: LinearHead
    trained_head: str
    recipe: dict[str, Any]
    history: list[dict[str, Any]]
    stages: list[dict[str, Any]]
    n_parameters: int
    n_trainable: int


@dataclass(frozen=True)
class TuningInputs:
    """Inputs of fine-tuning."""

    backbone: Backbone
    manifest: Manifest
    features: Features
    parts: Split
    probe: Probe
    settings: FitSettings
    folder: Path | None = None

    @property
    def labels(self) -> NDArray[Any]:
        """(N,) class index of every sample; (N, C) 0 or 1 for several labels."""
        return self.manifest.targets

    @property
    def stage_names(self) -> list[str]:
        """The stages that a plan gives rates to, the classifier last."""
        return self.backbone.stage_names


@dataclass(frozen=True)
class TuningPlan:
    """The recipe, the initial head and the decoded images."""

    recipe: Recipe
    spec: HeadSpec
    start: LinearHead
    facts: DataFacts
    train: ImageDataset
    valid: ImageDataset | None

    @property
    def head_is_fitted(self) -> bool:
        """Whether the head starts from the probe's."""
        return self.spec.starts_from_probe


def plan_tuning(inputs: TuningInputs, on_progress: Callable[[int, int], None]) -> TuningPlan:
    """Plans the training and decodes the images.

    Raises:
        UsageError: settings that contradict each other or the data.
    """
    settings, parts, manifest = inputs.settings, inputs.parts, inputs.manifest
    start, spec = _starting_head(inputs)
    gray = all(sample.mode in ("1", "L", "LA", "I;16") for sample in manifest.samples)
    facts = data_facts(inputs.labels[parts.train], len(manifest.classes), len(parts.valid), gray, settings.device)
    recipe = plan(settings, facts, inputs.stage_names, settings.seed, head_is_fitted=spec.starts_from_probe)
    train, valid = image_datasets(
        manifest, parts.train, parts.valid, inputs.backbone, recipe, settings.workers, on_progress
    )
    return TuningPlan(recipe, spec, start, facts, train, valid)


def tune_classifier(
    inputs: TuningInputs,
    reporter: Reporter,
    say: Callable[[str], None],
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> TunedClassifier | None:
    """Fine-tunes the network, or returns None if auto mode decides against it; ``say`` receives the decision.

    Raises:
        UsageError: settings that contradict each other or the data.
        TopworkError: training failed, with the cause; the last checkpoint is kept.
        Interrupted: by a signal; a checkpoint was saved for resuming.
    """
    planned = plan_tuning(inputs, reporter.progress)
    recipe, messages = processes(inputs.settings.device).agree(
        _within_time(inputs, planned)
    )  # measured speeds differ between processes
    for message in messages:
        say(message)
    if recipe is None:
        return None
    folder = inputs.folder / CHECKPOINTS if inputs.folder is not None else None
    with Interruption() as interruption:
        context = TrainerContext(
            folder=folder,
            resume=True,
            reporter=reporter,
            on_epoch=on_epoch,
            stop=interruption.stopped,
            processes=processes(inputs.settings.device),
        )
        done = tune(
            inputs.backbone,
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
    return TunedClassifier(
        backbone=backbone,
        head=head,
        trained_head=str(planned.spec),
        recipe=recipe.as_dict() | {"tried": [vars(candidate) for candidate in done.selected.tried]},
        history=done.result.history,
        stages=[vars(row) for row in done.stages],
        n_parameters=done.n_parameters,
        n_trainable=done.n_trainable,
    )


def _starting_head(inputs: TuningInputs) -> tuple[LinearHead, HeadSpec]:
    """The initial head and the head to train; if an extended probe cannot be tuned, a plain one is fitted."""
    probe, spec = inputs.probe.head, head_spec(inputs.settings)
    if spec == HeadSpec():
        spec = trained_from(probe, inputs.settings)
    if probe.kind == "plain" or spec.kind == "extended":
        return probe, spec
    rows, n_classes, settings = inputs.parts.train, len(inputs.manifest.classes), inputs.settings
    plain = fit_probe(
        inputs.features, inputs.labels, n_classes, rows=rows, head="plain", seed=settings.seed, balance=settings.balance
    )
    return plain.head, spec


def _within_time(inputs: TuningInputs, planned: TuningPlan) -> tuple[Recipe | None, tuple[str, ...]]:
    """Fits the plan into the time budget; in auto mode, decides whether to fine-tune."""
    settings, facts = inputs.settings, planned.facts
    budget = settings.time_budget_seconds
    if settings.mode != "auto" and budget is None:
        return planned.recipe, ()
    network = make_network(inputs.backbone, planned.spec, planned.recipe, planned.start)
    rate = training_rate(network, planned.recipe, planned.train, processes(settings.device).device)
    recipe = plan(
        replace(settings, time_budget=f"{budget or 60 * DEFAULT_MINUTES:g}s"),
        replace(facts, images_per_second=rate),
        inputs.stage_names,
        settings.seed,
        head_is_fitted=planned.head_is_fitted,
    )
    if settings.mode != "auto":
        return recipe, ()
    if recipe.n_epochs < min(LEAST_EPOCHS, planned.recipe.n_epochs):
        fits = count(recipe.n_epochs, "epoch")
        return None, (f"Only {fits} fits into the time budget, which is too little: not fine-tuning.",)
    chosen = next(trial for trial in inputs.probe.trials if trial.chosen)
    expected = estimate(
        chosen.accuracy, chosen.n_images, facts.n_train, recipe, rate, None if budget is None else budget / 60
    )
    return (recipe if expected.worth_it else None), (expected.message,)


# ---- in Python: any head, any network


@dataclass(frozen=True, repr=False)
class FineTuned(Described):
    """A tuned classifier.

    Attributes:
        state: of the whole network including the classifier; float32, on the CPU.
        n_parameters, n_trainable: of the network that was trained.
    """

    state: State
    recipe: Recipe
    head: HeadSpec | nn.Module
    result: TrainingResult
    selected: SelectedWeights
    stages: list[StageRow]
    n_parameters: int
    n_trainable: int
    backbone: Backbone | str
    probe: LinearHead | None = None

    def facts(self) -> dict[str, object]:
        """Shown in notebooks."""
        return {
            "Backbone": self.backbone if isinstance(self.backbone, str) else self.backbone.name,
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
            UsageError: a custom head or network, which model folders do not support.
        """
        if isinstance(self.head, nn.Module) or isinstance(self.backbone, str):
            raise UsageError(
                "Custom heads and networks can be trained, but only a HeadSpec can be saved in a model folder."
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
    backbone: Backbone | str,
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
    n_parameters, n_trainable = sum(row.n_parameters for row in table), sum(row.n_trained for row in table)
    if context.processes.is_main:
        context.reporter.stages([vars(row) for row in table])
    result = fit(network, recipe, train, valid, context, target)
    fresh = make_network(backbone, head, recipe, probe)
    selected = select_weights(fresh, result, recipe, valid, context.processes)
    return FineTuned(selected.state, recipe, head, result, selected, table, n_parameters, n_trainable, backbone, probe)


def make_network(
    backbone: Backbone | str,
    head: HeadSpec | nn.Module,
    recipe: Recipe,
    probe: LinearHead | None = None,
) -> nn.Module:
    """The initial network: pretrained (or random) weights and a new head, with the probe's weights if given.

    Args:
        probe: required for an extended head, because it defines the features.
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
    # the pretrained classifier is loaded and then replaced; timm knows where it is
    module = copy.deepcopy(head) if isinstance(head, nn.Module) else head
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
    pixels = decode_rows(manifest, valid_rows, backbone.spec, n_threads=n_threads, on_progress=from_row(n_train))
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
    pixels = decode_rows(manifest, rows, backbone.spec, margin=margin, n_threads=n_threads, on_progress=on_progress)
    # keyed by content: the same images in another order or layout get the same augmentation
    keys = np.array([int(manifest.samples[row].content_hash[:15], 16) for row in rows], np.int64)
    return ImageDataset(pixels, labels, backbone.spec, recipe.augmentation, recipe.seed, keys)


def decode_rows(manifest: Manifest, rows: NDArray[np.int64], spec: InputSpec, **options: Any) -> Pixels:
    """:func:`topwork.training.batches.decode_all` for rows of a manifest."""
    return decode_all(manifest.read_unchanged, rows, spec, name=lambda row: manifest.samples[row].path, **options)


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
