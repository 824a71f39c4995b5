"""Atomic checkpoints, verified before use, without executable code.

In: named tensors and a JSON value. Out: the same values, bit for bit. Tensors are in one safetensors file; a small JSON
file next to it contains its name and digest and everything else. The JSON is replaced last and atomically, so after a
kill at any time it names a complete file; older files are deleted afterwards.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from topwork.errors import ModelError, TopworkError
from topwork.files import atomic_file, error_reason, remove_partial

FORMAT = 1
INDEX = "checkpoint.json"


@dataclass(frozen=True)
class Checkpoint:
    """Saved tensors by name, and plain values."""

    tensors: dict[str, torch.Tensor]
    values: dict[str, Any]


def save_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
    """Replaces the checkpoint in a folder.

    Raises:
        TopworkError: it could not be written; the previous one is unchanged.
    """
    from safetensors.torch import save

    # one storage per tensor: safetensors refuses views of a shared one
    data = save({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()})
    number = 1 + max((_number(path) for path in folder.glob("weights-*.safetensors")), default=0)
    final = folder / f"weights-{number:06d}.safetensors"
    body = {"format": FORMAT, "weights": final.name, "sha256": hashlib.sha256(data).hexdigest(), "values": values}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(final) as partial:
            partial.write_bytes(data)
        with atomic_file(folder / INDEX) as partial:
            partial.write_text(json.dumps(body | {"digest": _digest(body)}))
        _remove_older(folder, final)
    except OSError as error:
        raise TopworkError(
            f"{folder}: the checkpoint could not be saved: {error_reason(error)}. The last one is intact."
        ) from None


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint, or None.

    Raises:
        ModelError: it is damaged, modified or from a newer version.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    index = folder / INDEX
    if not index.is_file():
        return None
    try:
        body = json.loads(index.read_text())
        digest, sha256, name = body.pop("digest"), body["sha256"], body["weights"]
        version, values = body["format"], body["values"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{index}: not a checkpoint, or damaged. Remove {folder} to start over.") from None
    if version != FORMAT:
        raise ModelError(f"{index}: format {version}; this version of topwork reads format {FORMAT}.")
    if digest != _digest(body) or Path(name).name != name:
        raise ModelError(f"{index}: modified since it was written. Remove {folder} to start over.")
    try:
        data = (folder / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ModelError(f"{folder / name}: damaged: its digest does not match.")
        return Checkpoint(load(data), values)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder / name}: cannot be read: {error}") from None


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimizer's state as named tensors and plain values."""
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, Any] = {}
    for number, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{number}.{key}"] = value
            else:
                plain[f"{number}.{key}"] = value
    return tensors, plain


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], plain: dict[str, Any]
) -> None:
    """Restores the state from :func:`flatten_optimizer` into an optimizer for the same recipe and phase.

    Moments get the memory layout of their parameter: files do not store it, and torch's fused optimizers ignore it, so
    a contiguous moment for a channels-last weight would silently be misread.
    """
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *plain.items()]:
        number, _, key = name.partition(".")
        parameter = parameters[int(number)]
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
            moment = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
            moment.copy_(value)
            state.setdefault(int(number), {})[key] = moment
        else:
            state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def joined(states: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """All tensors of several states, with names prefixed by ``STATE/``."""
    return {f"{prefix}/{name}": value for prefix, state in states.items() for name, value in state.items()}


def below_prefix(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state that :func:`joined` stored under a prefix."""
    start = f"{prefix}/"
    return {name[len(start) :]: value for name, value in tensors.items() if name.startswith(start)}


def _number(path: Path) -> int:
    digits = path.stem.rpartition("-")[2]
    return int(digits) if digits.isdigit() else 0


def _remove_older(folder: Path, current: Path) -> None:
    for path in folder.glob("weights-*.safetensors"):
        if path != current:
            path.unlink(missing_ok=True)
    remove_partial(folder)


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
