"""The training loop: one, plain, for every recipe.

In: a network, a :class:`Recipe`, streams of training and validation samples. Out: :class:`Tuned`: best, last and
starting weights under the network's own names, and the history as plain records. Where pixels come from is in
``streams.py``, what moves at which rate in ``optimizer.py``, what is done with the weights afterwards in ``average.py``.

A run can be cut short anywhere. Every random choice follows from (seed, epoch, step or sample), so a checkpoint holds
weights, optimizer, sums and a position, and a run continued from it computes the same bits on a CPU.

When memory runs out, a step is done in halves, quarters... whose gradients are added: the batch, and so the learning
rate, stays what it was.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from topwork.errors import TopworkError, UsageError
from topwork.training import checkpoint as disk
from topwork.training.batches import Stream, ahead, batches_of, epoch_order
from topwork.training.depthwise import use_fast_depthwise
from topwork.training.distributed import Processes, own_part, processes, shared_like, whole, whole_state
from topwork.training.folding import Folding, State, fold_batch_norm
from topwork.training.losses import TargetTerms
from topwork.training.optimizer import clip_gradients, freeze, make_optimizer, set_rates, stages_of, train_mode
from topwork.training.recipe import Phase, Recipe

Record = dict[str, Any]
Ending = Literal["finished", "patience", "time budget", "interrupted", "loss not finite"]
CURVE_POINTS = 20  # of loss and rate kept for each epoch
JUDGE_BATCH = 64
TEMPERATURES = tuple(2 ** (step / 4) for step in range(-8, 17))  # a quarter to sixteen


@dataclass(frozen=True)
class Surroundings:
    """What a run needs beside recipe and data.

    Attributes:
        folder: where checkpoints go; None keeps nothing on disk.
        resume: continue from the checkpoint in ``folder`` where there is one.
        on_stages: called with the table of stages before training begins (see ``finetune.tune``).
        on_epoch: called with the record of each finished epoch.
        on_progress: called with (training images done, training images in all).
        stop: asked before each step; True saves and ends.
        checkpoint_seconds: a long epoch is saved this often.
    """

    folder: Path | None = None
    resume: bool = False
    on_stages: Callable[[list[Record]], None] | None = None
    on_epoch: Callable[[Record], None] | None = None
    on_progress: Callable[[int, int], None] | None = None
    stop: Callable[[], bool] | None = None
    checkpoint_seconds: float = 600.0
    processes: Processes = field(default_factory=processes)


@dataclass(frozen=True)
class Tuned:
    """The result of a run.

    Attributes:
        best, last, start: state dicts with the names and shapes of the network that was given.
        end: what the last epoch was judged with: ``last``, or the moving average where there is one.
        best_epochs: (epoch, value of the monitor, state), best first, as many as the recipe averages.
        ending: why it ended; ``message`` says it in a sentence.
        notes: what happened on the way that the user should know.
    """

    best: State
    last: State
    start: State
    best_epoch: int
    history: list[Record]
    ending: Ending
    message: str
    best_epochs: tuple[tuple[int, float, State], ...] = ()
    notes: tuple[str, ...] = ()
    end: State = field(default_factory=dict)


@dataclass(frozen=True)
class Judged:
    """Loss (mean, weighted as in training) and accuracy on a stream.

    Attributes:
        calibrated_loss: the loss at the temperature that is best for it, of :data:`TEMPERATURES`. Networks grow too sure
            before they stop getting better, and probabilities are temperature-scaled after training anyway, so this is
            what tells which weights are best (Berta et al. 2025, arXiv 2501.19195).
        by_image: (n, 2) weighted loss at that temperature and weight of each image of this process's share.
    """

    loss: float
    accuracy: float
    calibrated_loss: float
    by_image: NDArray[np.float64] = field(repr=False, compare=False)

    def rank(self, monitor: Literal["loss", "accuracy"]) -> tuple[float, float]:
        """Lower is better; the other figure decides between equals."""
        keys = (self.calibrated_loss, -self.accuracy)
        return keys if monitor == "loss" else keys[::-1]


def fit(
    network: nn.Module,
    recipe: Recipe,
    train: Stream,
    valid: Stream | None = None,
    around: Surroundings | None = None,
    target: TargetTerms | None = None,
) -> Tuned:
    """Trains a network by a recipe.

    Args:
        network: from images to logits; its weights are used up.
        valid: decides which epoch is best; without it the last one is.
        target: further terms of the loss, on images of another domain.

    Raises:
        TopworkError: the loss is not finite before any epoch was finished, or a checkpoint cannot be written.
        UsageError: one training image and moving batch-norm statistics; several processes and a target.
    """
    with torch.random.fork_rng(devices=[]):
        return _Run(network, recipe, train, valid, around or Surroundings(), target).run()


class Prepared:
    """A network made ready for speed: folded, channels-last, on its device; and the way back to its own names."""

    def __init__(
        self, network: nn.Module, recipe: Recipe, stream: Stream, device: str, group: Processes | None = None
    ) -> None:
        self.device = device
        self.core = network
        self.folding: Folding | None = fold_batch_norm(network, stream.shape) if recipe.folds else None
        if device == "cpu":
            use_fast_depthwise(network)
        self.is_sharded = recipe.fsdp and group is not None and group.n > 1
        # FSDP takes contiguous parameters only
        layout = torch.contiguous_format if self.is_sharded else torch.channels_last
        network.to(device, memory_format=layout)  # type: ignore[call-overload]
        if group is not None:
            group.broadcast(network.state_dict().values())  # a head that starts at random is one head for all
            if self.is_sharded:
                stages = [stage.module for stage in stages_of(network) if stage.module]
                group.shard(network, [network.get_submodule(name) for name in stages])
        self.outer: nn.Module = stream.wrap(network).to(device)
        self.call: Callable[[Tensor], Tensor] = torch.compile(self.outer) if recipe.compile else self.outer
        self.kind = torch.bfloat16 if recipe.precision == "bf16" else torch.float32

    def logits(self, inputs: NDArray[Any]) -> Tensor:
        """(B, C) float32."""
        tensor = torch.from_numpy(inputs).to(self.device, non_blocking=True)
        with torch.autocast(self.device.split(":")[0], self.kind, enabled=self.kind != torch.float32):
            return self.call(tensor).float()

    def state(self) -> State:
        """A copy of the weights as they are in training."""
        return {name: value.detach().clone() for name, value in self.core.state_dict().items()}

    def load(self, state: State) -> None:
        """Weights as :meth:`state` gave them."""
        self.core.load_state_dict(state)

    def shared(self, state: State) -> State:
        """Whole weights as :meth:`state` would give them: each process's part of them, where they are sharded."""
        own = self.core.state_dict()
        return {name: shared_like(value, own[name]) for name, value in state.items()}

    def outside(self, state: State) -> State:
        """The weights under the names of the network that was given."""
        state = whole_state(state)
        state = self.folding.unfold(state) if self.folding else state
        return {name: value.detach().cpu().contiguous() for name, value in state.items()}


class _Run:
    """What changes while a run goes on. Everything in it but the network's shape is in the checkpoint."""

    def __init__(
        self,
        network: nn.Module,
        recipe: Recipe,
        train: Stream,
        valid: Stream | None,
        around: Surroundings,
        target: TargetTerms | None,
    ) -> None:
        if any(phase.batch_norm == "train" for phase in recipe.phases) and len(train.labels) < 2:
            raise UsageError(
                "One training image is too few for batch norms whose statistics move; use --batch-norm frozen."
            )
        self.recipe, self.train, self.valid, self.around, self.target = recipe, train, valid, around, target
        self.group = around.processes
        if target is not None and self.group.n > 1:
            raise UsageError("Adapting the network to a target is done by one process; start it without a launcher.")
        self.net = Prepared(network, recipe, train, self.group.device, self.group)
        if self.net.is_sharded:
            smallest = min(map(len, batches_of(np.arange(len(train.labels)), recipe.batch_size)))
            if smallest < self.group.n:
                raise UsageError(f"--fsdp: every batch needs an image for each of the {self.group.n} processes.")
        self.loss = Loss(recipe, self.net.device)
        self.start = self.net.state()
        self.epoch = self.step = self.n_updates = 0
        self.micro = recipe.batch_size
        self.sums = [0.0] * 5  # of weighted loss, weight, correct, samples, samples times the terms on the target
        self.curve: list[list[float]] = []
        self.history: list[Record] = []
        self.best: list[tuple[int, float, float, State]] = []
        self.ema: State | None = None
        self.seconds_before, self.started = 0.0, time.monotonic()
        self.epoch_seconds = 0.0
        self.notes: list[str] = []
        self.saved_at = time.monotonic()
        self.optimizer_state: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        self.kept: tuple[Ending, str] | None = None

    # ---- the course of a run

    def run(self) -> Tuned:
        resumed = self.around.resume and self._restore()
        if not resumed:
            self._save(None)
        ending, message = self.kept or self._phases()
        last = self.net.state()
        best = [(epoch, value, self.net.outside(state)) for epoch, value, _, state in self.best]
        if not best and ending == "loss not finite":
            raise TopworkError(message)
        if not best:
            best = [(0, math.nan, self.net.outside(last))]
        return Tuned(
            best=best[0][2],
            last=self.net.outside(last),
            start=self.net.outside(self.start),
            best_epoch=best[0][0],
            history=self.history,
            ending=ending,
            message=message,
            best_epochs=tuple(best),
            notes=tuple(self.notes),
            end=self.net.outside(self.ema or last),
        )

    def _phases(self) -> tuple[Ending, str]:
        first = 0
        for phase in self.recipe.phases:
            end = first + phase.n_epochs
            if self.epoch < end:
                ended = self._phase(phase, first)
                if ended is not None:
                    return ended
            first = end
        return self._finish("finished", f"All {self.recipe.n_epochs} epochs are done.")

    def _phase(self, phase: Phase, first: int) -> tuple[Ending, str] | None:
        freeze(self.net.core, phase)
        optimizer = make_optimizer(self.net.core, self.recipe, phase)
        if self.optimizer_state is not None:
            disk.restore_optimizer(optimizer, *self.optimizer_state)
            self.optimizer_state = None
        while self.epoch < first + phase.n_epochs:
            began = time.monotonic()
            ended = self._epoch(phase, first, optimizer)
            if ended is not None:
                return ended
            at_phase_end = self.epoch == first + phase.n_epochs
            if self.epoch < self.recipe.n_epochs:
                self._save(None if at_phase_end else optimizer)
            ended = self._enough(time.monotonic() - began)
            if ended is not None:
                return ended
        return None

    def _epoch(self, phase: Phase, first: int, optimizer: torch.optim.Optimizer) -> tuple[Ending, str] | None:
        """One pass over the training samples from the present step on, then the judgement."""
        train_mode(self.net.core, phase)
        began = time.monotonic()
        order = epoch_order(len(self.train.labels), self.recipe.seed, self.epoch)
        batches = batches_of(order, self.recipe.batch_size)
        n_steps = len(batches) * phase.n_epochs
        shares = [self.group.share(rows) for rows in batches[self.step :]]
        loading = ahead(lambda rows: self.train.load(rows, self.epoch) if len(rows) else None, shares)
        try:
            for rows, inputs in loading:
                if self.group.any(self.around.stop is not None and self.around.stop()):
                    self._save(optimizer, began)
                    return "interrupted", f"Stopped in epoch {self.epoch + 1}; --resume continues."
                position = ((self.epoch - first) * len(batches) + self.step) / max(1, n_steps - 1)
                factor = set_rates(optimizer, self.recipe, phase, position)
                loss = self._update(rows, inputs, optimizer, len(batches[self.step]))
                if not math.isfinite(loss):
                    return self._not_finite(phase)
                self._after_step(loss, factor, len(batches), began, optimizer)
        finally:
            loading.close()  # type: ignore[attr-defined]
        return self._judge_epoch(phase, began)

    def _after_step(
        self, loss: float, factor: float, n_batches: int, began: float, optimizer: torch.optim.Optimizer
    ) -> None:
        if self.step % max(1, n_batches // CURVE_POINTS) == 0:
            self.curve.append([self.epoch + self.step / n_batches, loss, factor])
        self.step += 1
        self.n_updates += 1
        self._move_average()
        if self.around.on_progress:
            n = len(self.train.labels)
            done = self.epoch * n + n * self.step // n_batches
            self.around.on_progress(done, self.recipe.n_epochs * n)
        # one process's clock decides for all, because saving is done together
        due = self.step < n_batches and time.monotonic() - self.saved_at > self.around.checkpoint_seconds
        if self.around.folder is not None and self.group.any(due and self.group.is_main):
            self._save(optimizer, began)

    # ---- one step

    def _update(self, rows: NDArray[np.int64], inputs: Any, optimizer: torch.optim.Optimizer, n_batch: int) -> float:
        """Moves the weights by one batch; returns its loss."""
        while True:
            try:
                optimizer.zero_grad()
                loss = self._gradients(rows, inputs, n_batch)
                break
            except (MemoryError, RuntimeError) as error:
                if not _out_of_memory(error) or self.group.n > 1:
                    raise
                self._halve()
        if math.isfinite(loss):
            length = float(whole(clip_gradients(self.net.core.parameters(), self.recipe.clip_norm)))
            if not math.isfinite(length):
                return math.nan
            optimizer.step()
        return loss

    def _gradients(self, rows: NDArray[np.int64], inputs: Any, n_batch: int) -> float:
        mixing = np.random.default_rng([self.recipe.seed, self.epoch, self.step, 1])
        inputs, targets = mix(inputs, self.loss.targets(self.train.labels[rows]), self.recipe, mixing)
        weight = self.group.total([float(self.loss.weights(targets).sum())])[0]
        loss, correct = 0.0, 0.0
        share = max(1, math.ceil(self.micro / self.group.n))
        for start in range(0, len(rows), share):
            # dropout's stream: a function of the position, so that a resumed run draws the same
            torch.manual_seed(_stream(self.recipe.seed, self.epoch, self.step, self.group.rank, start))
            part = slice(start, start + share)
            logits = self.net.logits(inputs[part])
            part_loss = self.loss(logits, targets[part]).sum() / weight
            part_loss.backward()  # type: ignore[no-untyped-call]
            loss += float(part_loss.detach())
            correct += self.loss.n_correct(logits, targets[part])
        of_target = self._target_gradients()
        self.group.add_gradients(self.net.core.parameters())
        loss, correct = self.group.total([loss, correct])
        for place, value in enumerate((loss * weight, weight, correct, float(n_batch), of_target * n_batch)):
            self.sums[place] += value
        return loss + of_target

    def _target_gradients(self) -> float:
        """Adds the gradients of the terms on the target; returns their value."""
        if self.target is None:
            return 0.0
        rows = self.target.rows(self.recipe.seed, self.epoch, self.step)
        torch.manual_seed(_stream(self.recipe.seed, self.epoch, self.step, self.group.rank, self.recipe.batch_size))
        terms = self.target.loss(self.net.logits(self.target.stream.load(rows, self.epoch)), rows)
        terms.backward()  # type: ignore[no-untyped-call]
        return float(terms.detach())

    def _halve(self) -> None:
        if self.micro <= 1:
            raise TopworkError("Out of memory with one image at a time. Use a smaller --size or --backbone.")
        self.micro = math.ceil(self.micro / 2)
        if self.net.device.startswith("cuda"):
            torch.cuda.empty_cache()
        self.notes.append(
            f"Out of memory: batches of {self.recipe.batch_size} are now done {self.micro} images at a time, with their "
            "gradients added, so the learning rate stays as it is."
        )

    def _move_average(self) -> None:
        if self.recipe.ema is None:
            return
        state = self.net.core.state_dict()
        if self.ema is None:
            self.ema = {name: value.detach().clone() for name, value in state.items()}
            return
        # young averages forget faster, so that the starting weights do not linger
        decay = min(self.recipe.ema, (1 + self.n_updates) / (10 + self.n_updates))
        moving = [name for name, value in state.items() if value.is_floating_point()]
        averages, values = ([own_part(some[name]) for name in moving] for some in (self.ema, state))
        torch._foreach_lerp_(averages, values, 1 - decay)
        for name, value in state.items():
            if not value.is_floating_point():
                self.ema[name].copy_(value)

    # ---- the end of an epoch

    def _judge_epoch(self, phase: Phase, began: float) -> tuple[Ending, str] | None:
        if phase.batch_norm == "train":
            self.group.average(self.net.core.buffers())
        loss_sum, weight, correct, n, of_target = self.sums
        train_seconds = self.epoch_seconds + time.monotonic() - began
        record: Record = {
            "epoch": self.epoch + 1,
            "phase": phase.name,
            "train_loss": loss_sum / weight,
            "train_accuracy": correct / n,
            "rates": dict(phase.rates),
            "curve": self.curve,
            "images_per_second": n / max(train_seconds, 1e-9),
        }
        if self.target is not None:
            record["target_loss"] = of_target / n
        rank = (-float(self.epoch), 0.0)  # without valid the last epoch is the best
        with self._averaged():
            if self.valid is not None:
                judged = judge(self.net, self.valid, self.recipe, self.group, self.loss)
                if not math.isfinite(judged.loss):
                    return self._not_finite(phase)
                record |= {
                    "valid_loss": judged.loss,
                    "valid_calibrated_loss": judged.calibrated_loss,
                    "valid_accuracy": judged.accuracy,
                }
                rank = judged.rank(self.recipe.monitor)
            record["best"] = self._keep(rank)
        record["seconds"] = self.epoch_seconds + time.monotonic() - began
        self.history.append(record)
        self.epoch, self.step, self.sums, self.curve, self.epoch_seconds = self.epoch + 1, 0, [0.0] * 5, [], 0.0
        if self.around.on_epoch and self.group.is_main:
            self.around.on_epoch(record)
        return None

    def _keep(self, rank: tuple[float, float]) -> bool:
        """Remembers the weights of the best epochs; True for a new best one."""
        is_best = not self.best or rank < self.best[0][1:3]
        n_kept = self.recipe.average_best or 1
        if is_best or len(self.best) < n_kept or rank < self.best[-1][1:3]:
            self.best.append((self.epoch + 1, *rank, self.net.state()))
            self.best.sort(key=lambda kept: kept[1:3])
            self.best = self.best[:n_kept]
        return is_best

    def _enough(self, epoch_seconds: float) -> tuple[Ending, str] | None:
        patience, budget = self.recipe.patience, self.recipe.time_budget_seconds
        since = self.epoch - max((r["epoch"] for r in self.history if r["best"]), default=0)
        if patience is not None and since >= patience and self.epoch < self.recipe.n_epochs:
            return self._finish("patience", f"No better epoch in {since}; the best was epoch {self.best[0][0]}.")
        spent = self.seconds_before + time.monotonic() - self.started
        over = budget is not None and spent + epoch_seconds > budget and self.epoch < self.recipe.n_epochs
        if self.group.any(over and self.group.is_main):
            return self._finish("time budget", f"Ended after {spent:.0f} s: another epoch would pass {budget:.0f} s.")
        return None

    def _finish(self, ending: Ending, message: str) -> tuple[Ending, str]:
        """Notes the ending in the checkpoint, so that resuming a finished run does no more work."""
        self.kept = ending, message
        self._save(None)
        return ending, message

    def _not_finite(self, phase: Phase) -> tuple[Ending, str]:
        highest = max(rate for _, rate in phase.rates)
        return "loss not finite", (
            f"The loss is not finite in epoch {self.epoch + 1}, step {self.step + 1}. "
            f"Try a lower --lr (the highest rate was {highest:g}) or --precision f32."
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

    def _save(self, optimizer: torch.optim.Optimizer | None, epoch_began: float | None = None) -> None:
        folder = self.around.folder
        if folder is None:
            return
        if self.net.is_sharded or self.group.is_main:  # parts are gathered from all
            tensors, plain = self._tensors(optimizer)
            if self.group.is_main:
                self._write(folder, tensors, plain, epoch_began)
        self.group.wait()
        self.saved_at = time.monotonic()

    def _tensors(self, optimizer: torch.optim.Optimizer | None) -> tuple[State, dict[str, Any] | None]:
        """All tensors of a checkpoint, whole, and the optimizer's plain values, None without one."""
        states = {"start": self.start, "model": self.net.state(), "ema": self.ema or {}}
        states |= {f"best{epoch}": state for epoch, _, _, state in self.best}
        plain = None
        if optimizer is not None:
            states["optimizer"], plain = disk.flatten_optimizer(optimizer)
        tensors: State = {}
        for prefix, state in states.items():
            tensors |= disk.with_prefix(prefix, whole_state(state))
        return tensors, plain

    def _write(self, folder: Path, tensors: State, optimizer: dict[str, Any] | None, epoch_began: float | None) -> None:
        now = time.monotonic()
        values = {
            "recipe": self.recipe.as_dict(),
            "optimizer": optimizer,
            "best": [[epoch, first, second] for epoch, first, second, _ in self.best],
            "seconds": self.seconds_before + now - self.started,
            "epoch_seconds": self.epoch_seconds + (now - epoch_began if epoch_began is not None else 0.0),
            "ending": list(self.kept) if self.kept else None,
        }
        values |= {name: getattr(self, name) for name in _PLAIN}
        disk.save_checkpoint(folder, tensors, values)

    def _restore(self) -> bool:
        """Takes everything from the checkpoint; False when there is none."""
        saved = disk.load_checkpoint(self.around.folder) if self.around.folder is not None else None
        if saved is None:
            return False
        values, tensors = saved.values, saved.tensors
        if not self.recipe.is_written_as(values["recipe"]):
            raise UsageError(f"{self.around.folder}: its checkpoint is of another recipe. Use another folder.")
        device = self.net.device
        tensors = {name: value.to(device) for name, value in tensors.items()}

        def state(prefix: str) -> State:
            return self.net.shared(disk.below_prefix(prefix, tensors))

        self.start = state("start")
        self.net.load(state("model"))
        self.ema = state("ema") or None
        self.best = [(e, a, b, state(f"best{e}")) for e, a, b in values["best"]]
        if values["optimizer"] is not None:
            self.optimizer_state = disk.below_prefix("optimizer", tensors), values["optimizer"]
        self.seconds_before, self.epoch_seconds = values["seconds"], values["epoch_seconds"]
        self.kept = tuple(values["ending"]) if values["ending"] else None
        for name in _PLAIN:
            setattr(self, name, values[name])
        return True


_PLAIN = ("epoch", "step", "n_updates", "micro", "sums", "curve", "history", "notes")


# ---- loss and judgement


class Loss:
    """The loss of a recipe, sample by sample, with class weights; ``sum of losses / sum of weights`` is the mean."""

    def __init__(self, recipe: Recipe, device: str = "cpu") -> None:
        self.outputs, self.smoothing = recipe.outputs, recipe.label_smoothing
        weights = recipe.class_weights
        self.class_weights = None if weights is None else torch.tensor(weights, device=device)
        self.n_classes = recipe.n_classes
        self.device = device

    def targets(self, labels: NDArray[Any]) -> Tensor:
        """(B, C) probabilities from (B,) classes or (B, C) zeros and ones; (B, 1) where a sigmoid tells two apart."""
        tensor = torch.from_numpy(np.asarray(labels)).to(self.device)
        if self.outputs == "softmax" and tensor.ndim == 1:
            return F.one_hot(tensor.long(), self.n_classes).float()
        return (tensor[:, None] if tensor.ndim == 1 else tensor).float()

    def weights(self, targets: Tensor) -> Tensor:
        """(B,) weight of each sample."""
        if self.class_weights is None:
            return torch.ones(len(targets), device=self.device)
        if self.outputs == "binary":
            return self.class_weights[0] + (self.class_weights[1] - self.class_weights[0]) * targets[:, 0]
        return (targets * self.class_weights).sum(1)

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(B,) losses times weights."""
        if self.outputs == "softmax":
            p = targets * (1 - self.smoothing) + self.smoothing / logits.shape[1]
            losses = -(p * logits.log_softmax(1)).sum(1)
        else:
            p = targets * (1 - self.smoothing) + self.smoothing / 2
            losses = F.binary_cross_entropy_with_logits(logits, p, reduction="none").mean(1)
        return losses * self.weights(targets)

    def n_correct(self, logits: Tensor, targets: Tensor) -> float:
        """How many samples are right; with many labels, the sum of the shares that are."""
        logits = logits.detach()
        if self.outputs == "softmax":
            return float((logits.argmax(1) == targets.argmax(1)).sum())
        return float(((logits > 0) == (targets > 0.5)).float().mean(1).sum())


def mix(inputs: Any, targets: Tensor, recipe: Recipe, rng: np.random.Generator) -> tuple[Any, Tensor]:
    """Mixup (Zhang et al. 2017, arXiv 1710.09412) or cutmix (Yun et al. 2019, arXiv 1905.04899), or neither.

    With both asked for, each batch gets one of them.
    """
    kinds = [kind for kind in ("mixup", "cutmix") if getattr(recipe, kind)]
    if not kinds or len(targets) < 2 or recipe.outputs == "multilabel":
        return inputs, targets
    kind = kinds[int(rng.integers(len(kinds)))]
    share = float(rng.beta(*(getattr(recipe, kind),) * 2))
    other = rng.permutation(len(inputs))
    if kind == "mixup":
        mixed = (inputs * np.float32(share) + inputs[other] * np.float32(1 - share)).astype(np.float32)
    else:
        mixed, share = _cut(inputs, inputs[other], share, rng)
    return mixed, share * targets + (1 - share) * targets[torch.from_numpy(other)]


def _cut(inputs: Any, others: Any, share: float, rng: np.random.Generator) -> tuple[Any, float]:
    height, width = inputs.shape[1:3]
    side = math.sqrt(1 - share)
    y, x = rng.integers(height), rng.integers(width)
    top, bottom = (int(np.clip(y + sign * side * height / 2, 0, height)) for sign in (-1, 1))
    left, right = (int(np.clip(x + sign * side * width / 2, 0, width)) for sign in (-1, 1))
    mixed = inputs.copy()
    mixed[:, top:bottom, left:right] = others[:, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def judge(
    net: Prepared, stream: Stream, recipe: Recipe, group: Processes | None = None, loss: Loss | None = None
) -> Judged:
    """Loss and accuracy on a stream, exact for any number of processes."""
    group, loss = group or Processes(), loss or Loss(recipe, net.device)
    at_temperatures, weights, sums = [np.zeros((0, len(TEMPERATURES)))], [np.zeros(0)], np.zeros(2)
    for rows, logits in predict(net, stream, group):
        targets = loss.targets(stream.labels[rows])
        sums += float(loss(logits, targets).sum()), loss.n_correct(logits, targets)
        at_temperatures.append(_numpy(torch.stack([loss(logits / t, targets) for t in TEMPERATURES], 1)))
        weights.append(_numpy(loss.weights(targets)))
    losses, weight = np.concatenate(at_temperatures), np.concatenate(weights)
    total, correct, all_weight, *by_temperature = group.total(
        [*sums.tolist(), float(weight.sum()), *losses.sum(0).tolist()]
    )
    all_weight = max(all_weight, 1e-12)
    best = int(np.argmin(by_temperature))
    return Judged(
        total / all_weight,
        correct / max(1, len(stream.labels)),
        by_temperature[best] / all_weight,
        np.stack([losses[:, best], weight], 1),
    )


def _numpy(values: Tensor) -> NDArray[np.float64]:
    return np.asarray(values.detach().double().cpu().numpy())


def predict(
    net: Prepared, stream: Stream, group: Processes | None = None
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """(rows, logits) of this process's share of a stream, in eval mode."""
    was_training = [(module, module.training) for module in net.core.modules()]
    net.core.eval()
    group = group or Processes()
    rows = group.share(np.arange(len(stream.labels)))
    batches = [rows[start : start + JUDGE_BATCH] for start in range(0, len(rows), JUDGE_BATCH)]
    try:
        with torch.no_grad():
            for chosen, inputs in ahead(lambda chosen: stream.load(chosen, None), batches):
                yield chosen, net.logits(inputs)
            # each pass gathers shared weights, so all processes take part in as many as the first one, with most rows
            n_passes = math.ceil(math.ceil(len(stream.labels) / group.n) / JUDGE_BATCH)
            if net.is_sharded and len(batches) < n_passes:
                net.logits(stream.load(np.zeros(1, np.int64), None))
    finally:
        for module, training in was_training:
            module.training = training


def _stream(*numbers: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def _out_of_memory(error: BaseException) -> bool:
    text = str(error)
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "DefaultCPUAllocator" in text
        or "out of memory" in text
    )
