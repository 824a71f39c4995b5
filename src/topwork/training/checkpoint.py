"""Checkpoints of training, verified before use, without executable code.

In: named tensors and a JSON value. Out: the same values, bit for bit. Both are in one safetensors file, which is replaced
atomically: after a kill at any time it is the last complete one. Its digest covers names, tensors and values.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from topwork.errors import ModelError
from topwork.files import atomic_file, remove_partial, writing
from topwork.models.backbone import weights_digest

FORMAT = "2"
FILE = "checkpoint.safetensors"


class Checkpoint(NamedTuple):
    """Saved tensors by name, and plain values."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


def save_checkpoint(folder: Path, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Replaces the checkpoint in a folder.

    Raises:
        TopworkError: it could not be written; the previous one is unchanged.
    """
    from safetensors.torch import save

    # one storage per tensor: safetensors refuses views of a shared one
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    text = json.dumps(values)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        remove_partial(folder)
    with atomic_file(folder / FILE) as partial:
        partial.write_bytes(save(tensors, {"format": FORMAT, "values": text, "digest": _digest(tensors, text)}))


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The last complete checkpoint, or None.

    Raises:
        ModelError: it is damaged, modified or from another version.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: damaged ({error}). Remove {folder} to start over.") from None
    if metadata.get("format") != FORMAT:
        raise ModelError(f"{path}: not a checkpoint of this version of topwork. Remove {folder} to start over.")
    text = metadata.get("values", "")
    if metadata.get("digest") != _digest(tensors, text):
        raise ModelError(f"{path}: damaged or modified (its digest does not match). Remove {folder} to start over.")
    return Checkpoint(tensors, json.loads(text))


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restores an optimizer for the same recipe and phase from tensors named ``PARAMETER.KEY``.

    Moments get the memory layout of their parameter: files do not store it, and torch's fused optimizers ignore it, so
    a contiguous moment for a channels-last weight would silently be misread.
    """
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, _, key = name.partition(".")
        parameter = parameters[int(number)]
        if value.shape == parameter.shape:
            moment = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
            value = moment.copy_(value)  # noqa: PLW2901
        state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def _digest(tensors: dict[str, Tensor], text: str) -> str:
    of_tensors = weights_digest({name: value.numpy() for name, value in tensors.items()})
    return hashlib.sha256(f"{of_tensors} {text}".encode()).hexdigest()
