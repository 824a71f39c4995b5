"""Training with several processes. Only this file knows about ranks.

In: the environment that ``torchrun`` (or ``accelerate launch``) sets. Out: :class:`Processes`, which the loop uses to
split batches, add gradients and agree on when to stop. Each process takes every n-th row of the same global batch, and
gradients are divided by the weight of the whole batch, so the result is that of one process up to the order of
summation. Samples are never padded or counted twice.

Every process has all weights. Trainable batch norms (training from scratch) use their process's share of the batch;
their statistics are averaged after each epoch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from topwork.errors import TopworkError
from topwork.features.engine import best_device
from topwork.settings import is_launched

# one process reads and embeds the images while the others wait, possibly for long
PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Processes:
    """The processes of a torch.distributed group, or a single one, for which every method is trivial."""

    rank: int = 0
    n: int = 1
    device: str = "cpu"

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def share(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """This process's part of a global batch."""
        return rows[self.rank :: self.n]

    def sum(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Element-wise sums over all processes, in float64."""
        if self.n == 1:
            return values
        tensor = torch.from_numpy(values).to(self.device)
        torch.distributed.all_reduce(tensor)
        return tensor.cpu().numpy()

    def total(self, values: list[float]) -> list[float]:
        """Sums of a few numbers over all processes."""
        return self.sum(np.array(values, np.float64)).tolist() if self.n > 1 else values

    def any(self, flag: bool) -> bool:
        """Whether the value is true in any process."""
        return self.total([float(flag)])[0] > 0

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces every gradient by its sum over the processes."""
        if self.n == 1:
            return
        gradients = []
        for value in parameters:
            if value.requires_grad:
                if value.grad is None:  # a process with an empty share contributes zeros
                    value.grad = torch.zeros_like(value)
                gradients.append(value.grad)
        _sum_in_place(gradients)

    def average(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replaces every tensor of floats by its mean over the processes."""
        if self.n == 1:
            return
        chosen = [tensor for tensor in tensors if tensor.is_floating_point()]
        _sum_in_place(chosen)
        for tensor in chosen:
            tensor.div_(self.n)

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replaces every tensor by that of the first process."""
        for tensor in tensors if self.n > 1 else ():
            torch.distributed.broadcast(tensor, src=0)

    def agree(self, value: Any) -> Any:
        """The value of the first process."""
        held = [value]
        if self.n > 1:
            torch.distributed.broadcast_object_list(held, src=0)
        return held[0]

    def wait(self) -> None:
        """Waits for all processes."""
        if self.n > 1:
            torch.distributed.barrier()


def _sum_in_place(tensors: list[torch.Tensor]) -> None:
    """Sends one message, because latency, not bandwidth, is the limit for small networks."""
    if not tensors:
        return
    flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    start = 0
    for tensor in tensors:
        tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
        start += tensor.numel()


def processes(device: str = "auto") -> Processes:
    """The group started by a launcher, which is joined on first use, or a single process; on the device of ``--device``.

    Raises:
        TopworkError: the processes of the launcher cannot connect.
    """
    device = best_device(device)
    if not is_launched():
        return Processes(device=device)
    if device == "cuda":
        device = f"cuda:{int(os.environ.get('LOCAL_RANK') or 0)}"
        torch.cuda.set_device(device)
    if not torch.distributed.is_initialized():
        try:
            torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=PATIENCE)
        except (ValueError, RuntimeError) as error:
            raise TopworkError(
                f"Several processes were started, but they could not connect ({error}). Start them with torchrun."
            ) from None
    return Processes(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)
