"""Training in studies: the usual loop, evaluated after each epoch, with the training time.

In: a network, settings of fine-tuning, and a :class:`Task` of decoded images or stored features. Out: :class:`Learned`:
correctness of each held-out image after every epoch. Recipes come from ``training/recipe.py``, the loop from
``training/loop.py``; nothing is chosen on the held-out images.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from topwork.blocks import Chart, Series, Table
from topwork.data.transforms import InputSpec, Pixels
from topwork.models.backbone import Backbone
from topwork.models.head import HeadSpec, LinearHead
from topwork.models.modules import build_classifier, count_parameters, set_linear
from topwork.models.stages import is_inside
from topwork.studies.bench import Bench, Bools, Ints
from topwork.studies.study import measured
from topwork.training.batches import Dataset, ImageDataset
from topwork.training.finetune import data_facts, stage_names
from topwork.training.loop import TrainerContext, fit
from topwork.training.optimizer import freeze
from topwork.training.recipe import TuneSettings, plan

N_TRAIN, N_HELD_OUT = 240, 200  # maximum number of images, so that training takes minutes on two cores
EVALUATION_BATCH = 64
Logits = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Task:
    """Training and held-out images, decoded to one size; without ``spec``, frozen features (N, D) float32."""

    train: NDArray[Any]
    train_labels: Ints
    held_out: NDArray[Any]
    held_out_labels: Ints
    spec: InputSpec | None
    n_classes: int
    seed: int = 0

    @property
    def labels(self) -> Ints:
        """Labels of the training images, then of the held-out ones."""
        return np.concatenate([self.train_labels, self.held_out_labels])

    def dataset(self, augmentation: str = "none") -> Dataset:
        """The training images for the loop."""
        if self.spec is None:
            return _FeatureDataset(self.train, self.train_labels)
        return ImageDataset(self.train, self.train_labels, self.spec, augmentation, self.seed)

    def first(self, n_train: int) -> Task:
        """The same with the first training images only, which are balanced by their order."""
        return replace(self, train=self.train[:n_train], train_labels=self.train_labels[:n_train])

    def facts(self, bench: Bench, epochs: int) -> dict[str, object]:
        """The conditions of the study, for its record."""
        side = {} if self.spec is None else {"side": self.spec.height}
        return bench.facts(n_train=len(self.train), n_held_out=len(self.held_out), epochs=epochs, **side)


class _FeatureDataset:
    """Frozen features to train a head on."""

    def __init__(self, features: NDArray[Any], labels: Ints) -> None:
        self.features, self.labels, self.shape = features, labels, (1, 1, features.shape[1])

    def wrap(self, network: nn.Module) -> nn.Module:
        return network

    def load(self, rows: Ints, epoch: int | None) -> NDArray[Any]:  # noqa: ARG002
        return np.asarray(self.features[rows])


def task_of(bench: Bench, backbone: Backbone, change: Callable[[Pixels], Pixels] | None = None) -> Task:
    """Decodes the first images of both parts, optionally changed (for example, without color)."""
    train, held_out = bench.train[:N_TRAIN], bench.held_out[:N_HELD_OUT]
    images = [bench.pixels(rows, backbone) for rows in (train, held_out)]
    first, second = images if change is None else map(change, images)
    labels = bench.labels
    return Task(first, labels[train], second, labels[held_out], backbone.spec, len(bench.classes), bench.seed)


# ---- results


@dataclass(frozen=True, eq=False)
class Epoch:
    """The state after an epoch: seconds of training so far, and correctness of each held-out image."""

    number: int
    seconds: float
    loss: float | None
    correct: Bools


@dataclass(frozen=True, eq=False)
class Learned:
    """The result of training."""

    name: str
    epochs: tuple[Epoch, ...]
    n_parameters: int
    n_trainable: int

    @property
    def last(self) -> Epoch:
        """The last epoch."""
        return self.epochs[-1]

    @property
    def correct(self) -> Bools:
        """Correctness after the last epoch."""
        return self.last.correct


def by_epoch(title: str, runs: Iterable[Learned], what: Literal["accuracy", "loss"]) -> Chart:
    """Accuracy or loss on the held-out images after each epoch."""

    def value(epoch: Epoch) -> float:
        return float(epoch.correct.mean()) if what == "accuracy" else epoch.loss or 0.0

    series = tuple(Series(run.name, tuple((float(e.number), value(e)) for e in run.epochs)) for run in runs)
    return Chart(title, "epoch", f"{what} on held-out images", series, y_is_share=what == "accuracy")


def runs_table(runs: Iterable[Learned], note: str = "", title: str = "All runs", more: Sequence[str] = ()) -> Table:
    """Every run with its size, time, accuracy and loss; ``more`` is a note on each."""
    rows = [
        (run.name, run.n_parameters, run.n_trainable, run.last.number, run.last.seconds, measured(run.correct), run.last.loss)
        for run in runs
    ]  # fmt: skip
    columns = ("run", "parameters", "trainable", "epochs", "seconds", "accuracy", "loss on held-out images")
    if not more:
        return Table(title, columns, tuple(rows), note)
    return Table(title, (*columns, "details"), tuple((*row, text) for row, text in zip(rows, more, strict=True)), note)


# ---- training


def learn(
    name: str, network: nn.Module, settings: TuneSettings, task: Task, rates: dict[str, float] | None = None
) -> Learned:
    """Trains a network by one plan and evaluates it after every epoch.

    Args:
        network: changed in place to the weights of the last epoch.
        rates: peak rate by stage, or by module with several stages, instead of the plan's; 0 freezes it.
    """
    stages = stage_names(network)
    recipe = plan(replace(settings, ema=None, patience=None), data_facts(task.train_labels, task.n_classes, 0), stages, task.seed)  # fmt: skip
    if rates is not None:
        named = tuple((stage, next(r for name, r in rates.items() if is_inside(stage, [name]))) for stage in stages)
        recipe = replace(recipe, phases=tuple(replace(p, rates=named, batch_norm="frozen") for p in recipe.phases))
    frozen = copy.deepcopy(network)
    freeze(frozen, recipe.phases[-1])
    epochs: list[Epoch] = []

    def evaluate(record: dict[str, Any]) -> None:
        seconds = record["seconds"] + (epochs[-1].seconds if epochs else 0.0)
        loss, correct = _evaluated(logits_of(network, task), task.held_out_labels)
        epochs.append(Epoch(record["epoch"], seconds, loss, correct))

    fit(network, recipe, task.dataset(recipe.augmentation), None, TrainerContext(on_epoch=evaluate))
    return Learned(name, tuple(epochs), *count_parameters(frozen))


def fitted(bench: Bench, task: Task, what: str, backbone: Backbone, name: str) -> tuple[LinearHead, Learned]:
    """A head fitted on the frozen features of a task's images; ``what`` names how they were changed."""
    n = len(task.train)
    rows = np.concatenate([bench.train[:n], bench.held_out[: len(task.held_out)]])
    features = bench.embedded(rows, np.concatenate([task.train, task.held_out]), what, backbone)
    started = time.perf_counter()
    head = bench.probe(features, np.arange(n), task.labels).head
    seconds = time.perf_counter() - started
    logits = head.logits({"last": features.block("last", np.arange(n, len(features)))})
    size = int(head.weight.size + head.bias.size)
    epoch = Epoch(0, seconds, *_evaluated(logits, task.held_out_labels))
    return head, Learned(name, (epoch,), backbone.n_parameters + size, size)


def logits_of(network: nn.Module, task: Task) -> Logits:
    """(N, C) logits of the held-out images; restores the mode of the network."""
    modes = [(module, module.training) for module in network.modules()]
    wrapped = task.dataset().wrap(network).eval()
    with torch.no_grad():
        batches = torch.split(torch.from_numpy(task.held_out), EVALUATION_BATCH)
        logits: Logits = torch.cat([wrapped(batch).float() for batch in batches]).numpy()
    for module, training in modes:
        module.training = training
    return logits


def _evaluated(logits: NDArray[Any], labels: Ints) -> tuple[float, Bools]:
    """Mean loss of (N, C) logits, or of (N, 1) for two classes, and correctness."""
    tensor, target = torch.from_numpy(logits).float(), torch.from_numpy(labels)
    if logits.shape[1] == 1:
        loss = F.binary_cross_entropy_with_logits(tensor[:, 0], target.float())
        return float(loss), np.asarray((logits[:, 0] > 0) == (labels == 1))
    return float(F.cross_entropy(tensor, target)), np.asarray(logits.argmax(1) == labels)


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A module whose random weights depend only on the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def pretrained(backbone: Backbone, n_outputs: int, head: LinearHead | None = None, seed: int = 0) -> nn.Module:
    """The backbone with a new linear classifier, initialized with a fitted plain head if given."""
    network = seeded(lambda: build_classifier(backbone.module(1), HeadSpec(), n_outputs), seed)
    if head is not None:
        folded = head.folded()
        set_linear(network, folded.weight, folded.bias)
    return network
