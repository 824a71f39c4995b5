"""Several processes that train as one. Only this file knows about ranks.

In: the environment that ``accelerate launch`` or ``torchrun`` sets. Out: :class:`Processes`, with which the loop shares
a batch, adds gradients and agrees on when to stop. Each process takes every n-th row of the same global batch, and
gradients are sums divided by the weight of the whole batch, so the result is that of one process up to the order of
summation. Sums over samples are exact: no sample is padded or counted twice, whatever the number of processes.

Every process holds all weights (DDP's way), or with ``Recipe.fsdp`` its part of them (FSDP: Zhao et al. 2023, arXiv
2304.11277): :meth:`Group.shard` cuts each stage, and the loop's weights, moments and averages are DTensors from then on,
made whole where they leave it. Batch norms with moving statistics (training from scratch) see their own process's share
of the batch; their statistics are averaged after each epoch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from topwork.errors import TopworkError
from topwork.settings import is_launched


class Processes:
    """One process alone; :class:`Group` overrides what several have to do."""

    rank = 0
    n = 1
    device = "cpu"

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def share(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """This process's part of a global batch."""
        return rows[self.rank :: self.n]

    def total(self, values: list[float]) -> list[float]:
        """Element-wise sums over all processes, in float64."""
        return values

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        return self.total([float(flag)])[0] > 0

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces every gradient by its sum over the processes."""

    def average(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replaces every tensor by its mean over the processes."""

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replaces every tensor by the first process's."""

    def shard(self, network: nn.Module, parts: Iterable[nn.Module]) -> None:
        """Leaves each process its part of the parameters."""

    def agree(self, value: Any) -> Any:
        """The first process's value, for everyone."""
        return value

    def wait(self) -> None:
        """Returns when every process has come here."""


class Group(Processes):
    """The processes of a running torch.distributed group."""

    def __init__(self) -> None:
        from datetime import timedelta

        from accelerate import PartialState

        # one process reads and embeds the images while the others wait, however long that takes
        patience = {"timeout": timedelta(days=7)}
        # accelerate makes no group of CPU processes unless it is told that CPUs are meant
        has_accelerator = torch.cuda.is_available() or torch.xpu.is_available()
        self._state: Any = PartialState(cpu=not has_accelerator, **patience)
        self.rank, self.n = int(self._state.process_index), int(self._state.num_processes)
        if self.n < 2:
            raise TopworkError(
                "Several processes were started, but they found no group; start them with accelerate launch."
            )
        self.device = str(self._state.device)

    def total(self, values: list[float]) -> list[float]:
        """Summed by the group."""
        kind = torch.float32 if self.device.startswith("mps") else torch.float64
        tensor = torch.tensor(values, dtype=kind, device=self.device)
        torch.distributed.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Summed by the group; a process with an empty share takes part with zeros."""
        gradients = []
        for value in parameters:
            if not value.requires_grad:
                continue
            if value.grad is None:  # a process with an empty share takes part with zeros
                value.grad = torch.zeros_like(value)
            if is_shared(value):
                value.grad.mul_(self.n)  # FSDP has taken the mean
            else:
                gradients.append(value.grad)
        self._sum_in_place(gradients)

    def average(self, tensors: Iterable[torch.Tensor]) -> None:
        """Averaged by the group."""
        chosen = [tensor for tensor in tensors if tensor.is_floating_point()]
        self._sum_in_place(chosen)
        for tensor in chosen:
            tensor.div_(self.n)

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Process 0 sends."""
        for tensor in tensors:
            torch.distributed.broadcast(tensor, src=0)

    def shard(self, network: nn.Module, parts: Iterable[nn.Module]) -> None:
        """FSDP over the group, part by part."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.split(":")[0], (self.n,))
        for module in [*parts, network]:
            fully_shard(module, mesh=mesh)

    def agree(self, value: Any) -> Any:
        """Process 0 decides."""
        held = [value]
        torch.distributed.broadcast_object_list(held, src=0)
        return held[0]

    def wait(self) -> None:
        """A barrier."""
        self._state.wait_for_everyone()

    @staticmethod
    def _sum_in_place(tensors: list[torch.Tensor]) -> None:
        """One message for all: latency, not bandwidth, limits small networks."""
        if not tensors:
            return
        flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
        torch.distributed.all_reduce(flat)
        start = 0
        for tensor in tensors:
            tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
            start += tensor.numel()


def is_shared(tensor: torch.Tensor) -> bool:
    """Whether each process holds a part of it: a DTensor, whose import alone takes as long as a small training step."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> torch.Tensor:
    """All of a tensor of which each process may hold a part; every process has to ask."""
    gathered: torch.Tensor = tensor.full_tensor() if is_shared(tensor) else tensor
    return gathered


def whole_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All tensors whole, asked for in the order of their names: that of a dict that was read from a file is chance."""
    return {name: whole(state[name]) for name in sorted(state)}


def own_part(tensor: Any) -> torch.Tensor:
    """What this process holds of a tensor; it shares memory with it."""
    part: torch.Tensor = tensor.to_local() if is_shared(tensor) else tensor
    return part


def shared_like(tensor: torch.Tensor, like: Any) -> torch.Tensor:
    """The inverse of :func:`whole`: a whole tensor cut as another of its shape is."""
    if not is_shared(like) or is_shared(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def launched() -> Processes | None:
    """The group that a launcher started; None for one process alone."""
    return Group() if is_launched() else None


def processes() -> Processes:
    """The group that a launcher started, or one process alone on the best device."""
    group = launched()
    if group is not None:
        return group
    alone = Processes()
    alone.device = "cuda" if torch.cuda.is_available() else "cpu"
    return alone
