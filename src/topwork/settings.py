"""What may be asked: every setting once, with its type, default and help.

The command line, the documentation and ``settings.json`` are made from these dataclasses. Nothing is decided here:
a value may be "auto"; ``run.py`` turns what was asked into what is done and records both.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

Mode = Literal["probe"]
HeadKind = Literal["auto", "plain", "extended"]


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class DataSettings:
    """Which images, and how they are divided."""

    root: str | None = _setting(None, "Folder that the paths of a CSV or Parquet table are relative to.")
    valid_fraction: float = _setting(0.2, "Share of the images kept for validation when the data has no split.")
    test_fraction: float = _setting(0.2, "Share of the images kept for the test when the data has no split.")
    max_reject_fraction: float = _setting(0.1, "More rejected files than this share end the command with status 3.")
    workers: int | None = _setting(None, "Threads that read and decode images; by default one a core.")
    seed: int = _setting(0, "Fixes the split, the cross-validation folds and every other random choice.")


@dataclass(frozen=True)
class FitSettings(DataSettings):
    """What ``topwork fit`` may be asked, beyond the data."""

    backbone: str = _setting(
        "auto", "auto, lite0, lite1, lite2, random, any timm name, or a local weights file as NAME=FILE."
    )
    mode: Mode = _setting("probe", "probe: a head on frozen features, chosen by cross-validation.")
    head: HeadKind = _setting(
        "auto", "plain: last features only, a timm model; extended: more stages and transforms; auto: what pays."
    )
    fit: Literal["auto", "squash", "crop", "pad"] = _setting("auto", "How an image is brought to the input's shape.")
    size: int | None = _setting(None, "Input side in pixels; by default the one the weights were trained at.")
    engine: Literal["auto", "openvino", "torch"] = _setting("auto", "What runs the network.")
    precision: Literal["auto", "bf16", "f32"] = _setting("auto", "auto: bf16 where the processor has it.")


def as_dict(settings: DataSettings) -> dict[str, Any]:
    """Settings as plain JSON values, in their order of definition."""
    return asdict(settings)


def help_of(kind: type[DataSettings]) -> dict[str, str]:
    """The help line of every setting of a kind, by name."""
    return {item.name: item.metadata["help"] for item in fields(kind)}


def cache_folder() -> Path:
    """Where features and converted weights are kept: ``TOPWORK_CACHE``, else the user's cache folder."""
    chosen = os.environ.get("TOPWORK_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "topwork"
