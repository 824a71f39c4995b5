"""Training inside studies: the same loop as everywhere, evaluated after each epoch, with the time it took.

In: a network, what fine-tuning may be asked, and a :class:`Task` of decoded images or stored features. Out:
:class:`Learned`: right or wrong for each held-out image after every epoch. Recipes come from ``training/recipe.py``, the
loop from ``training/loop.py``; nothing is chosen on the held-out images.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from topwork.blocks import Chart, Series
from topwork.data.transforms import InputSpec, Pixels
from topwork.features.embed import Features
from topwork.models.backbone import Backbone
from topwork.models.head import HeadSpec, LinearHead
from topwork.models.modules import build_classifier, count_parameters, set_linear
from topwork.models.stages import is_inside
from topwork.studies.bench import Bench, Bools, Ints
from topwork.training.batches import Dataset, ImageDataset
from topwork.training.finetune import data_facts, stage_names
from topwork.training.loop import TrainerContext, fit
from topwork.training.optimizer import freeze
from topwork.training.recipe import Phase, Recipe, TuneSettings, plan

EVALUATION_BATCH = 64


@dataclass(frozen=True, eq=False)
class Task:
    """Training and held-out images, decoded to one size."""

    train: Pixels
    train_labels: Ints
    held_out: Pixels
    held_out_labels: Ints
    spec: InputSpec
    n_classes: int
    seed: int = 0

    def stream(self, recipe: Recipe) -> Dataset:
        """The training images, augmented by the recipe."""
        return ImageDataset(self.train, self.train_labels, self.spec, recipe.augmentation, recipe.seed)

    def inputs(self, network: nn.Module) -> nn.Module:
        """The network as a module that takes what ``held_out`` holds."""
        wrapped: nn.Module = ImageDataset(self.held_out, self.held_out_labels, self.spec).wrap(network)
        return wrapped

    def first(self, n_train: int) -> Task:
        """The same with fewer training images: the first ones, balanced by their order."""
        return replace(self, train=self.train[:n_train], train_labels=self.train_labels[:n_train])


@dataclass(frozen=True, eq=False)
class FeatureTask(Task):
    """The same with frozen features (N, D) float32 in place of images: only a head is trained."""

    def stream(self, recipe: Recipe) -> Dataset:  # noqa: ARG002
        """The training features."""
        return _FeatureStream(self.train, self.train_labels)

    def inputs(self, network: nn.Module) -> nn.Module:
        """The head itself."""
        return network


class _FeatureStream:
    """Frozen features as a stream of the training loop."""

    def __init__(self, features: NDArray[Any], labels: Ints) -> None:
        self.features, self.labels, self.shape = features, labels, (1, 1, features.shape[1])

    def wrap(self, network: nn.Module) -> nn.Module:
        return network

    def load(self, rows: Ints, epoch: int | None) -> NDArray[Any]:  # noqa: ARG002
        return np.asarray(self.features[rows])


@dataclass(frozen=True, eq=False)
class Epoch:
    """The state after an epoch: seconds of training so far, training loss, and each held-out image right or wrong."""

    number: int
    seconds: float
    train_loss: float
    loss: float
    correct: Bools


@dataclass(frozen=True, eq=False)
class Learned:
    """What training came to; ``logits`` are those of the held-out images at the end."""

    name: str
    epochs: tuple[Epoch, ...]
    logits: NDArray[np.float32]
    n_parameters: int
    n_trainable: int

    @property
    def correct(self) -> Bools:
        """Right or wrong after the last epoch."""
        return self.epochs[-1].correct

    @property
    def answer(self) -> tuple[str, Bools]:
        """Name, and right or wrong."""
        return self.name, self.correct

    @property
    def accuracy(self) -> float:
        """After the last epoch."""
        return float(self.correct.mean())

    @property
    def seconds(self) -> float:
        """Of training, without evaluation."""
        return self.epochs[-1].seconds


def by_epoch(title: str, runs: Iterable[Learned], what: Literal["accuracy", "loss"]) -> Chart:
    """Accuracy or loss on the held-out images after each epoch."""

    def value(epoch: Epoch) -> float:
        return float(epoch.correct.mean()) if what == "accuracy" else epoch.loss

    series = tuple(Series(run.name, tuple((float(e.number), value(e)) for e in run.epochs)) for run in runs)
    return Chart(title, "epoch", f"{what} on held-out images", series, y_is_share=what == "accuracy")


def task_of(
    bench: Bench, side: int, n_train: int, n_held_out: int, change: Callable[[Pixels], Pixels] | None = None
) -> Task:
    """Decodes the first images of both parts, optionally changed (without color, say)."""
    train, held_out = bench.train[:n_train], bench.held_out[:n_held_out]
    change = change or (lambda images: images)
    return Task(
        change(bench.pixels(train, side)), bench.labels[train], change(bench.pixels(held_out, side)),
        bench.labels[held_out], bench.scaled(side).spec, len(bench.classes), bench.seed,
    )  # fmt: skip


def embed_task(bench: Bench, task: Task, what: str, backbone: Backbone) -> Features:
    """Features of a task's training images, then of its held-out ones; ``what`` names how the images were changed."""
    rows = np.concatenate([bench.train[: len(task.train)], bench.held_out[: len(task.held_out)]])
    return bench.embedded(rows, np.concatenate([task.train, task.held_out]), what, backbone)


def learn(
    name: str,
    network: nn.Module,
    settings: TuneSettings,
    task: Task,
    *,
    rates: dict[str, float] | None = None,
    on_epoch: Callable[[nn.Module], None] | None = None,
) -> Learned:
    """Trains a network by one plan and evaluates it after every epoch.

    Args:
        network: changed in place; ends with the last epoch's weights.
        rates: peak rate by stage, or by module that holds stages, instead of the plan's; 0 freezes it.
        on_epoch: called with the network after each epoch.
    """
    facts = data_facts(task.train_labels, task.n_classes, 0)
    recipe = plan(replace(settings, ema=None, patience=None), facts, stage_names(network), task.seed)
    if rates is not None:
        named = tuple(
            (stage, next(r for name, r in rates.items() if is_inside(stage, [name]))) for stage in stage_names(network)
        )
        phases = tuple(replace(phase, rates=named, batch_norm="frozen") for phase in recipe.phases)
        recipe = replace(recipe, phases=phases)
    n_parameters, n_trainable = _counted(network, recipe.phases[-1])
    epochs: list[Epoch] = []
    last: list[NDArray[np.float32]] = []

    def evaluate(record: dict[str, Any]) -> None:
        logits = logits_of(network, task)
        seconds = record["seconds"] + (epochs[-1].seconds if epochs else 0.0)
        loss, correct = _evaluated(logits, task.held_out_labels, recipe.outputs)
        epochs.append(Epoch(record["epoch"], seconds, record["train_loss"], loss, correct))
        last[:] = [logits]
        if on_epoch is not None:
            on_epoch(network)

    fit(network, recipe, task.stream(recipe), None, TrainerContext(on_epoch=evaluate))
    return Learned(name, tuple(epochs), last[0], n_parameters, n_trainable)


def logits_of(network: nn.Module, task: Task) -> NDArray[np.float32]:
    """(N, C) logits of the held-out images; the network is left in the mode it was in."""
    modes = [(module, module.training) for module in network.modules()]
    wrapped = task.inputs(network).eval()
    parts = []
    with torch.no_grad():
        for start in range(0, len(task.held_out), EVALUATION_BATCH):
            parts.append(wrapped(torch.from_numpy(task.held_out[start : start + EVALUATION_BATCH])).float().numpy())
    for module, training in modes:
        module.training = training
    return np.concatenate(parts)


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A module whose random weights follow from the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def pretrained(backbone: Backbone, n_outputs: int, head: LinearHead | None = None, seed: int = 0) -> nn.Module:
    """The backbone with a new linear classifier; with a fitted plain head, with its weights in it."""
    network = seeded(lambda: build_classifier(backbone.module(1), HeadSpec(), n_outputs), seed)
    if head is not None:
        folded = head.folded()
        set_linear(network, folded.weight, folded.bias)
    return network


def _counted(network: nn.Module, phase: Phase) -> tuple[int, int]:
    counted = copy.deepcopy(network)
    freeze(counted, phase)
    return count_parameters(counted)


def _evaluated(logits: NDArray[np.float32], labels: Ints, outputs: str) -> tuple[float, Bools]:
    """Mean loss, and right or wrong."""
    tensor, target = torch.from_numpy(logits), torch.from_numpy(labels)
    if outputs == "binary":
        loss = F.binary_cross_entropy_with_logits(tensor[:, 0], target.float())
        return float(loss), np.asarray((logits[:, 0] > 0) == (labels == 1))
    return float(F.cross_entropy(tensor, target)), np.asarray(logits.argmax(1) == labels)
