"""The training loop, for all recipes.

In: a network, a :class:`Recipe`, datasets for training and validation. Out: :class:`TrainingResult`: best, last and
initial weights under the network's own names, and the history as plain records. See ``batches.py`` for the data,
``optimizer.py`` for what is trained at which rate, and ``selection.py`` for what happens to the weights afterwards.

A run can be interrupted anywhere. Every random choice depends on (seed, epoch, step or sample), so a checkpoint
contains weights, optimizer, sums and a position, and a resumed run computes the same bits on a CPU.

When memory runs out, a step is split into halves, quarters, ... with accumulated gradients, so that the batch size and
the learning rate do not change.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from topwork.errors import TopworkError, UsageError
from topwork.evaluation.calibration import fit_temperature
from topwork.features.probe import cross_entropies
from topwork.memory import give_memory_back, reuse_memory
from topwork.progress import Reporter
from topwork.text import count
from topwork.training.batches import Dataset, ahead, batches_of, epoch_order, to_device
from topwork.training.checkpoint import load_checkpoint, restore_optimizer, save_checkpoint
from topwork.training.cpu import Folding, State, avoid_strided_pointwise, fold_batch_norm, use_fast_depthwise
from topwork.training.distributed import Processes, processes
from topwork.training.losses import Loss, TargetTerms, mix
from topwork.training.optimizer import add_adapters, merged, set_rates, start_phase, trained_names
from topwork.training.recipe import Phase, Recipe

Record = dict[str, Any]
Ending = Literal["finished", "patience", "time budget", "interrupted", "loss not finite"]
CURVE_POINTS = 20  # of loss and rate stored per epoch
EVALUATION_BATCH = 64


@dataclass(frozen=True)
class TrainerContext:
    """Options of training besides recipe and data.

    Attributes:
        folder: for checkpoints; None for no checkpoints.
        resume: continue from the checkpoint in ``folder`` if there is one.
        reporter: receives stages, progress (training images done, of all) and epochs.
        on_epoch: called with the record of each finished epoch.
        stop: called before each step; True saves a checkpoint and ends.
        checkpoint_seconds: interval of checkpoints during an epoch.
    """

    folder: Path | None = None
    resume: bool = False
    reporter: Reporter = field(default_factory=Reporter)
    on_epoch: Callable[[Record], None] | None = None
    stop: Callable[[], bool] | None = None
    checkpoint_seconds: float = 600.0
    processes: Processes = field(default_factory=processes)


@dataclass(frozen=True)
class TrainingResult:
    """The result of a run.

    Attributes:
        best, last, start: state dicts with the names and shapes of the given network.
        end: the weights evaluated after the last epoch: ``last``, or the moving average if there is one.
        best_epochs: (epoch, monitored value, state), best first, as many as the recipe averages.
        ending: why training ended; ``message`` is a sentence.
        notes: sentences for the user.
    """

    best: State
    last: State
    start: State
    end: State
    best_epoch: int
    history: list[Record]
    ending: Ending
    message: str
    best_epochs: tuple[tuple[int, float, State], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class EvalResult:
    """Loss (mean, weighted as in training) and accuracy on a dataset.

    Attributes:
        calibrated_loss: weighted cross-entropy at the best temperature. Networks become overconfident before they stop
            improving, and probabilities are temperature-scaled after training anyway, so this selects better weights
            (Berta et al. 2025, arXiv 2501.19195).
        losses, correct, weights: (N,) calibrated loss, 0/1 accuracy and weight of each image.
    """

    loss: float
    accuracy: float
    calibrated_loss: float
    losses: NDArray[np.float64] = field(repr=False, compare=False)
    correct: NDArray[np.float64] = field(repr=False, compare=False)
    weights: NDArray[np.float64] = field(repr=False, compare=False)

    def rank(self, monitor: Literal["loss", "accuracy"]) -> tuple[float, float]:
        """Lower is better; the second value breaks ties."""
        keys = (self.calibrated_loss, -self.accuracy)
        return keys if monitor == "loss" else keys[::-1]


def fit(
    network: nn.Module,
    recipe: Recipe,
    train: Dataset,
    valid: Dataset | None = None,
    context: TrainerContext | None = None,
    target: TargetTerms | None = None,
) -> TrainingResult:
    """Trains a network by a recipe.

    Args:
        network: from images to logits; its weights are overwritten.
        valid: selects the best epoch; without it, the last one is best.
        target: further terms of the loss, on images of another domain.

    Raises:
        TopworkError: the loss is not finite in the first epoch, or a checkpoint cannot be written.
        UsageError: one training image with trainable batch-norm statistics, or several processes with a target.
    """
    with torch.random.fork_rng(devices=[]):
        run = _Run(network, recipe, train, valid, context or TrainerContext(), target)
        run.restore_or_begin()
        try:
            for phase, epochs in recipe.phases_with_epochs():
                if run.epoch >= epochs.stop:
                    continue
                run.begin_phase(phase)
                while run.epoch < epochs.stop:
                    for rows, images, position in run.batches(epochs):
                        factor = set_rates(run.optimizer, recipe, phase, position)
                        loss = run.step(rows, images)
                        run.after_step(loss, factor)
                    run.end_epoch(phase, epochs)
            run.finish("finished", f"Finished {count(recipe.n_epochs, 'epoch')}.")
        except _Ended as ended:
            return run.result(*ended.args)
        finally:
            give_memory_back()


class _Ended(Exception):
    """Training is over: (ending, message)."""


class TrainableNetwork:
    """A network optimized for training (folded, channels-last, on its device), and the way back to its own names."""

    def __init__(
        self, network: nn.Module, recipe: Recipe, data: Dataset, device: str, group: Processes | None = None
    ) -> None:
        reuse_memory()
        self.device, self.core = device, network
        self.folding: Folding | None = fold_batch_norm(network, data.shape) if recipe.folds else None
        if recipe.lora_rank is not None:
            add_adapters(network, recipe.lora_rank, recipe.seed)
        self.changing = trained_names(network, recipe.phases)
        if any(phase.batch_norm == "train" for phase in recipe.phases):
            self.changing |= {name for name, _ in network.named_buffers()}
        if device == "cpu":
            avoid_strided_pointwise(network)
            if recipe.precision == "bf16":
                use_fast_depthwise(network)
        network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if group is not None:
            group.broadcast(network.state_dict().values())  # the same random head for all processes
        self.outer: nn.Module = data.wrap(network).to(device)
        self.call: Callable[[Tensor], Tensor] = torch.compile(self.outer) if recipe.compile else self.outer
        self.dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32

    def inputs(self, loaded: Any) -> Tensor:
        """The network's input, on its device."""
        return to_device(loaded, self.device)

    def logits(self, inputs: Tensor) -> Tensor:
        """(B, C) float32."""
        with torch.autocast(self.device.split(":")[0], self.dtype, enabled=self.dtype != torch.float32):
            return self.call(inputs).float()

    def state(self) -> State:
        """A copy of the weights that training can change."""
        return {name: value.detach().clone() for name, value in self.changing_values()}

    def changing_values(self) -> Iterator[tuple[str, Tensor]]:
        """(name, value) of the weights that training can change."""
        return ((name, value) for name, value in self.core.state_dict().items() if name in self.changing)

    def load(self, state: State) -> None:
        """Loads weights from :meth:`state`, or of the whole network."""
        unexpected = self.core.load_state_dict(state, strict=False).unexpected_keys
        assert not unexpected, f"weights of another network: {unexpected}"

    def original(self, state: State) -> State:
        """All weights under the names of the given network, on the CPU."""
        state = merged(self.core.state_dict() | state)
        state = self.folding.unfold(state) if self.folding else state
        return {name: value.detach().cpu().contiguous() for name, value in state.items()}


class _Run:
    """The state of training. The checkpoint contains all of it except the architecture."""

    optimizer: torch.optim.Optimizer

    def __init__(
        self,
        network: nn.Module,
        recipe: Recipe,
        train: Dataset,
        valid: Dataset | None,
        context: TrainerContext,
        target: TargetTerms | None,
    ) -> None:
        if any(phase.batch_norm == "train" for phase in recipe.phases) and len(train.labels) < 2:
            raise UsageError("One training image is not enough for batch-norm statistics; use --batch-norm frozen.")
        self.recipe, self.train, self.valid, self.context, self.target = recipe, train, valid, context, target
        self.group = context.processes
        if target is not None and self.group.n > 1:
            raise UsageError("Adapting a network runs in a single process; start it without a launcher.")
        self.net = TrainableNetwork(network, recipe, train, self.group.device, self.group)
        self.loss = Loss(recipe, self.net.device)
        self.n_batches = len(batches_of(np.arange(len(train.labels)), recipe.batch_size))
        self.start = self.net.state()
        self.epoch = self.n_steps = self.n_updates = 0  # n_steps: done in this epoch
        self.micro_batch = recipe.batch_size
        self.sums = [0.0] * 5  # weighted loss, weight, correct, samples, samples times target terms
        self.curve: list[list[float]] = []
        self.history: list[Record] = []
        self.best: list[tuple[int, float, float, State]] = []
        self.ema: State | None = None
        self.seconds_before, self.started = 0.0, time.monotonic()
        self.epoch_seconds, self.epoch_began = 0.0, self.started
        self.notes: list[str] = []
        self.saved_at = self.started
        self.saved_optimizer: State = {}
        self.ended: tuple[Ending, str] | None = None

    # ---- phases and epochs

    def restore_or_begin(self) -> None:
        """Continues from the checkpoint, or saves the first one."""
        if not (self.context.resume and self._restore()):
            self._save(with_optimizer=False)

    def begin_phase(self, phase: Phase) -> None:
        """Sets trainable parameters and creates the optimizer, or restores it."""
        if self.ended is not None:
            raise _Ended(*self.ended)
        self.optimizer = start_phase(self.net.core, self.recipe, phase)
        if self.saved_optimizer:
            restore_optimizer(self.optimizer, self.saved_optimizer)
            self.saved_optimizer = {}

    def batches(self, epochs: range) -> Iterator[tuple[NDArray[np.int64], Any, float]]:
        """Yields (rows, loaded images, position in the phase) of the remaining steps of this epoch, for this process."""
        self.epoch_began = time.monotonic()
        order = epoch_order(
            len(self.train.labels), self.recipe.seed, self.epoch, self.recipe.draw_weights(self.train.labels)
        )
        batches = batches_of(order, self.recipe.batch_size)
        shares = [self.group.share(rows) for rows in batches[self.n_steps :]]
        n_steps = len(batches) * len(epochs)
        with closing(ahead(lambda rows: self.train.load(rows, self.epoch) if len(rows) else None, shares)) as loading:
            for rows, images in loading:
                if self.group.any(self.context.stop is not None and self.context.stop()):
                    self._save()
                    raise _Ended("interrupted", f"Stopped in epoch {self.epoch + 1}; --resume continues.")
                position = (self.epoch - epochs.start) * len(batches) + self.n_steps
                yield rows, images, position / max(1, n_steps - 1)

    def end_epoch(self, phase: Phase, epochs: range) -> None:
        """Evaluates on valid, records the epoch, keeps its weights if they are good, and stops early if needed."""
        if phase.batch_norm == "train":
            self.group.average(self.net.core.buffers())
        loss_sum, weight, correct, n, of_target = self.sums
        seconds = self._epoch_seconds()
        record: Record = {
            "epoch": self.epoch + 1,
            "phase": phase.name,
            "train_loss": loss_sum / weight,
            "train_accuracy": correct / n,
            "rates": dict(phase.rates),
            "curve": self.curve,
            "images_per_second": n / max(seconds, 1e-9),
        }
        if self.target is not None:
            record["target_loss"] = of_target / n
        rank = (-float(self.epoch), 0.0)  # without valid the last epoch is the best
        with self._averaged():
            if self.valid is not None:
                found = evaluate(self.net, self.valid, self.recipe, self.group)
                self._require_finite(found.loss)
                record |= {
                    "valid_loss": found.loss,
                    "valid_calibrated_loss": found.calibrated_loss,
                    "valid_accuracy": found.accuracy,
                }
                rank = found.rank(self.recipe.monitor)
            record["best"] = self._keep(rank)
        record["seconds"] = seconds = self._epoch_seconds()
        self.history.append(record)
        self.epoch, self.n_steps, self.sums, self.curve, self.epoch_seconds = self.epoch + 1, 0, [0.0] * 5, [], 0.0
        if self.group.is_main:
            self.context.reporter.epoch(record)
            if self.context.on_epoch:
                self.context.on_epoch(record)
        if self.epoch < self.recipe.n_epochs:
            self._save(with_optimizer=self.epoch < epochs.stop)
            self._end_if_enough(seconds)

    def _keep(self, rank: tuple[float, float]) -> bool:
        """Keeps the weights of the best epochs; returns True for a new best one."""
        is_best = not self.best or rank < self.best[0][1:3]
        n_kept = self.recipe.average_best or 1
        if is_best or len(self.best) < n_kept or rank < self.best[-1][1:3]:
            self.best.append((self.epoch + 1, *rank, self.net.state()))
            self.best.sort(key=lambda kept: kept[1:3])
            self.best = self.best[:n_kept]
        return is_best

    def _end_if_enough(self, epoch_seconds: float) -> None:
        patience, budget = self.recipe.patience, self.recipe.time_budget_seconds
        since = self.epoch - max((r["epoch"] for r in self.history if r["best"]), default=0)
        if patience is not None and since >= patience:
            better = f"Stopped early: no improvement in {since}; the best was epoch {self.best[0][0]}."
            self.finish("patience", better)
        spent = self.seconds_before + time.monotonic() - self.started
        over = budget is not None and spent + epoch_seconds > budget
        if self.group.any(over and self.group.is_main):
            self.finish("time budget", f"Stopped after {spent:.0f} s: another epoch would exceed {budget:.0f} s.")

    def finish(self, ending: Ending, message: str) -> NoReturn:
        """Records the ending in the checkpoint, so that resuming a finished run does nothing, and ends."""
        if self.ended is None:
            self.ended = ending, message
            self._save(with_optimizer=False)
        raise _Ended(*self.ended)

    def result(self, ending: Ending, message: str) -> TrainingResult:
        """The result, under the network's own names."""
        last = self.net.state()
        best = [(epoch, value, self.net.original(state)) for epoch, value, _, state in self.best]
        if not best and ending == "loss not finite":
            raise TopworkError(message)
        if not best:
            best = [(0, math.nan, self.net.original(last))]
        return TrainingResult(
            best=best[0][2],
            last=self.net.original(last),
            start=self.net.original(self.start),
            end=self.net.original(self.ema or last),
            best_epoch=best[0][0],
            history=self.history,
            ending=ending,
            message=message,
            best_epochs=tuple(best),
            notes=tuple(self.notes),
        )

    # ---- one step

    def step(self, rows: NDArray[np.int64], loaded: Any) -> float:
        """Trains on one batch, with gradient accumulation if memory runs out; returns its loss."""
        while True:
            try:
                self.optimizer.zero_grad()
                loss = self._backward(rows, loaded)
                break
            except (MemoryError, RuntimeError) as error:
                if not _out_of_memory(error) or self.group.n > 1:
                    raise
                self._halve()
        self._require_finite(loss)
        self._require_finite(
            float(nn.utils.clip_grad_norm_(self.net.core.parameters(), self.recipe.clip_norm or math.inf))
        )
        self.optimizer.step()
        return loss

    def _backward(self, rows: NDArray[np.int64], loaded: Any) -> float:
        seeds = (self.recipe.seed, self.epoch, self.n_steps)
        targets = self.loss.targets(self.train.labels[rows])
        images = None if loaded is None else self.net.inputs(loaded)
        if images is not None:
            images, targets = mix(images, targets, self.recipe, np.random.default_rng([*seeds, 1]))
        weight = self.group.total([float(self.loss.weights(targets).sum())])[0]
        loss, correct = 0.0, 0.0
        share = max(1, math.ceil(self.micro_batch / self.group.n))
        for start in range(0, len(rows), share):
            # for dropout: depends on the position, so that a resumed run draws the same
            torch.manual_seed(_seed(*seeds, self.group.rank, start))
            part = slice(start, start + share)
            logits = self.net.logits(images[part])  # type: ignore[index]  # rows are images
            part_loss = self.loss(logits, targets[part]).sum() / weight
            part_loss.backward()  # type: ignore[no-untyped-call]
            loss += float(part_loss.detach())
            correct += float(self.loss.correct(logits.detach(), targets[part]).sum())
        of_target = self._target_backward()
        self.group.add_gradients(self.net.core.parameters())
        loss, correct, n = self.group.total([loss, correct, float(len(rows))])
        for place, value in enumerate((loss * weight, weight, correct, n, of_target * n)):
            self.sums[place] += value
        return loss + of_target

    def _target_backward(self) -> float:
        """Adds the gradients of the target terms; returns their value."""
        if self.target is None:
            return 0.0
        seeds = (self.recipe.seed, self.epoch, self.n_steps)
        rows = self.target.rows(*seeds)
        torch.manual_seed(_seed(*seeds, self.group.rank, self.recipe.batch_size))
        images = self.net.inputs(self.target.images.load(rows, self.epoch))
        terms = self.target.loss(self.net.logits(images), rows)
        terms.backward()  # type: ignore[no-untyped-call]
        return float(terms.detach())

    def _halve(self) -> None:
        if self.micro_batch <= 1:
            raise TopworkError("Out of memory with one image at a time. Use a smaller --size or --backbone.")
        self.micro_batch = math.ceil(self.micro_batch / 2)
        if self.net.device.startswith("cuda"):
            torch.cuda.empty_cache()
        self.notes.append(
            f"Out of memory: batches of {self.recipe.batch_size} are now computed {self.micro_batch} images at a time, with "
            "gradient accumulation, so the learning rate stays the same."
        )

    def after_step(self, loss: float, factor: float) -> None:
        """Records the step, updates the moving average, and saves a long epoch in between."""
        n_batches = self.n_batches
        if self.n_steps % max(1, n_batches // CURVE_POINTS) == 0:
            self.curve.append([self.epoch + self.n_steps / n_batches, loss, factor])
        self.n_steps += 1
        self.n_updates += 1
        self._update_average()
        n = len(self.train.labels)
        self.context.reporter.progress(self.epoch * n + n * self.n_steps // n_batches, self.recipe.n_epochs * n)
        # the clock of one process decides, because all save together
        due = self.n_steps < n_batches and time.monotonic() - self.saved_at > self.context.checkpoint_seconds
        if self.context.folder is not None and self.group.any(due and self.group.is_main):
            self._save()

    def _update_average(self) -> None:
        if self.recipe.ema is None:
            return
        if self.ema is None:
            self.ema = self.net.state()
            return
        state = dict(self.net.changing_values())
        # a faster decay at the start, so that the initial weights are forgotten
        decay = min(self.recipe.ema, (1 + self.n_updates) / (10 + self.n_updates))
        averaged = [name for name, value in state.items() if value.is_floating_point()]
        averages, values = ([some[name] for name in averaged] for some in (self.ema, state))
        torch._foreach_lerp_(averages, values, 1 - decay)
        for name, value in state.items():
            if not value.is_floating_point():
                self.ema[name].copy_(value)

    def _require_finite(self, value: float) -> None:
        if not math.isfinite(value):
            raise _Ended(
                "loss not finite",
                f"The loss became NaN or infinite in epoch {self.epoch + 1}, step {self.n_steps + 1}. Try a lower --lr (the highest "
                f"rate was {max(group['peak'] for group in self.optimizer.param_groups):g}) or --precision f32.",
            )

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The network with the moving average of its weights."""
        if self.ema is None:
            yield
            return
        raw = self.net.state()
        self.net.load(self.ema)
        try:
            yield
        finally:
            self.net.load(raw)

    # ---- on disk

    def _epoch_seconds(self) -> float:
        return self.epoch_seconds + time.monotonic() - self.epoch_began

    def _save(self, *, with_optimizer: bool = True) -> None:
        folder = self.context.folder
        if folder is None:
            return
        if self.group.is_main:
            self._write(folder, with_optimizer)
        self.group.wait()
        self.saved_at = time.monotonic()

    def _write(self, folder: Path, with_optimizer: bool) -> None:
        states = {"start": self.start, "model": self.net.state(), "ema": self.ema or {}}
        states |= {f"best{epoch}": state for epoch, _, _, state in self.best}
        if with_optimizer:
            moments = self.optimizer.state_dict()["state"].items()
            states["optimizer"] = {f"{number}.{key}": value for number, by in moments for key, value in by.items()}
        values = {
            "recipe": asdict(self.recipe),
            "best": [[epoch, first, second] for epoch, first, second, _ in self.best],
            "seconds": self.seconds_before + time.monotonic() - self.started,
            "epoch_seconds": self._epoch_seconds() if self.n_steps else 0.0,
            "ended": list(self.ended) if self.ended else None,
        }
        values |= {name: getattr(self, name) for name in _PLAIN}
        tensors = {f"{prefix}/{name}": value for prefix, state in states.items() for name, value in state.items()}
        save_checkpoint(folder, tensors, values)

    def _restore(self) -> bool:
        """Restores everything from the checkpoint; False if there is none."""
        saved = load_checkpoint(self.context.folder) if self.context.folder is not None else None
        if saved is None:
            return False
        values = saved.values
        if not self.recipe.is_written_as(values.get("recipe", {})):
            raise UsageError(f"{self.context.folder}: its checkpoint is from a different recipe. Use another folder.")

        def state(prefix: str) -> State:
            found = ((name.partition("/"), value) for name, value in saved.tensors.items())
            return {name: value.to(self.net.device) for (owner, _, name), value in found if owner == prefix}

        self.start = state("start")
        self.net.load(state("model"))
        self.ema = state("ema") or None
        self.best = [(e, a, b, state(f"best{e}")) for e, a, b in values["best"]]
        self.saved_optimizer = state("optimizer")
        self.seconds_before, self.epoch_seconds = values["seconds"], values["epoch_seconds"]
        self.ended = tuple(values["ended"]) if values["ended"] else None
        for name in _PLAIN:
            setattr(self, name, values[name])
        return True


_PLAIN = ("epoch", "n_steps", "n_updates", "micro_batch", "sums", "curve", "history", "notes")


# ---- evaluation


def evaluate(net: TrainableNetwork, data: Dataset, recipe: Recipe, group: Processes | None = None) -> EvalResult:
    """Loss and accuracy on a dataset, the same for any number of processes."""
    loss = Loss(recipe)
    logits, targets = predict(net, data, group), loss.targets(data.labels)
    tensor, weights = torch.from_numpy(logits), _numpy(loss.weights(targets))
    correct = _numpy(loss.correct(tensor, targets))
    labels, scores = data.labels, logits.astype(np.float64)
    if recipe.outputs == "binary":
        scores = np.concatenate([np.zeros_like(scores), scores], 1)  # sigmoid(z) = softmax(0, z)
    elif recipe.outputs == "multilabel":
        labels = labels.astype(np.bool_)
    if labels.dtype != np.bool_ and labels.ndim == 2:
        labels = labels.argmax(1)
    if not np.isfinite(scores).all():
        return EvalResult(math.nan, 0.0, math.nan, weights, correct, weights)
    losses = cross_entropies(scores / fit_temperature(scores, labels, weights), labels)
    losses /= scores.shape[1] if recipe.outputs == "multilabel" else 1
    return EvalResult(
        float(loss.mean(tensor, targets)),
        float(correct.mean()),
        float((weights * losses).sum() / weights.sum()),
        losses,
        correct,
        weights,
    )


def predict(net: TrainableNetwork, data: Dataset, group: Processes | None = None) -> NDArray[np.float32]:
    """(N, C) logits in eval mode; each process computes its share, and all get all."""
    group = group or Processes()
    was_training = [(module, module.training) for module in net.core.modules()]
    net.core.eval()
    rows = group.share(np.arange(len(data.labels)))
    batches = [rows[start : start + EVALUATION_BATCH] for start in range(0, len(rows), EVALUATION_BATCH)]
    found: dict[int, NDArray[np.float32]] = {}
    with torch.no_grad(), closing(ahead(lambda chosen: data.load(chosen, None), batches)) as loading:
        for chosen, images in loading:
            found |= zip(chosen.tolist(), _numpy(net.logits(net.inputs(images))), strict=True)
    for module, training in was_training:
        module.training = training
    n_outputs = int(group.total([float(len(found[0]) if 0 in found else 0)])[0])
    logits = np.zeros((len(data.labels), n_outputs))
    for row, values in found.items():
        logits[row] = values
    return group.sum(logits).astype(np.float32)


def _numpy(values: Tensor) -> NDArray[np.float64]:
    return np.asarray(values.detach().cpu().double().numpy())


def _seed(*numbers: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def _out_of_memory(error: BaseException) -> bool:
    text = str(error)
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "DefaultCPUAllocator" in text
        or "out of memory" in text
    )


class Interruption:
    """Context manager for SIGINT and SIGTERM: the first one is noted, for the loop to save and end; a second ends at once.

    ``stopped`` is :attr:`TrainerContext.stop`; ``signal`` gives the exit status 128 + n.
    """

    kinds = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def stopped(self) -> bool:
        """Whether a signal was received."""
        return self.signal is not None

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # handlers can only be set in the main thread
            self._before = {kind: signal.signal(kind, self._note) for kind in self.kinds}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for kind, handler in self._before.items():
            signal.signal(kind, handler)
        self._before = {}
