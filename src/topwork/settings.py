"""What may be asked: every setting once, with its type, default and help.

The command line, the documentation and ``settings.json`` are made from these dataclasses. Nothing is decided here:
a value may be "auto"; ``run.py`` turns what was asked into what is done and records both.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from topwork.errors import UsageError

Mode = Literal["probe", "tune", "auto"]
HeadKind = Literal["auto", "plain", "extended", "cosine"]
Pooling = Literal["avg", "max", "avgmax", "catavgmax"]
ScheduleName = Literal["one-cycle", "flat", "cosine", "step"]
Strategy = Literal["head", "last", "all", "lp-ft", "gradual", "scratch"]
OptimizerName = Literal["adamw", "adam", "sgd"]
BatchNorm = Literal["folded", "frozen", "train"]
Outputs = Literal["softmax", "binary", "multilabel"]


AUGMENT_HELP = (
    "none; light (mild crops, mirror images); standard (crops, mirror images, color); trivial (TrivialAugment); geometric "
    "(mild crops, flips both ways, quarter turns); or parts joined by +: random-resized-crop, mild-crop, flip, "
    "vertical-flip, quarter-turns, rotation, color-jitter."
)


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class DataSettings:
    """Which images, and how they are divided."""

    root: str | None = _setting(None, "Folder that the paths in a table are relative to [default: the table's own].")
    path_column: str | None = _setting(None, "Table column with the image file [default: found by name and content].")
    label_column: str | None = _setting(None, "Table column with the label [default: found by name and content].")
    split_column: str | None = _setting(None, "Table column with train, valid or test [default: found by name].")
    encoding: str | None = _setting(None, "Text encoding of a table, such as cp1252 [default: the first that fits].")
    class_names: str | None = _setting(
        None, "Text or JSON file with the name of each class number [default: looked for beside the table]."
    )
    label_regex: str | None = _setting(
        None, "Takes the label from each file name: group 1, the group 'label', or the name of the group that matches."
    )
    multi_label: bool = _setting(
        False, "Images may have several labels: in one cell, in rows, or in columns of 0 and 1."
    )
    label_separator: str | None = _setting(
        None, "Separates several labels in one cell, with --multi-label [default: found by content]."
    )
    group_by: str | None = _setting(
        None,
        "Keeps images together in a split (same patient, same burst): a column, or a regular expression on the path.",
    )
    domain_by: str | None = _setting(
        None, "Source of an image (camera, hospital, style): a regular expression on the path; tables have a column."
    )
    limit_per_class: int | None = _setting(None, "Use at most this many images per class, drawn by --seed.")
    corrections: str | None = _setting(
        None,
        "CSV of corrected labels (path,label), such as topwork review writes; replaces the labels of those images.",
    )
    valid_fraction: float = _setting(0.2, "Fraction held out for validation if the data has no split.")
    test_fraction: float = _setting(
        0.2, "Fraction held out for the test if the data has no split or only a train part; 0: none."
    )
    max_reject_fraction: float = _setting(0.1, "Exit with status 3 if a larger fraction of the files was rejected.")
    workers: int | None = _setting(None, "Threads that read and decode images [default: one per core].")
    seed: int = _setting(0, "Random seed: split, cross-validation folds and every other random choice.")


@dataclass(frozen=True)
class ScanSettings(DataSettings):
    """What ``topwork scan`` may be asked, beyond the data."""

    quick: bool = _setting(
        False, "Only read and check the files; near duplicates, which need the network, are left out."
    )
    backbone: str = _setting("auto", "The network whose features near duplicates are looked for with.")
    augment: str = _setting("standard", f"Random changes that the page shows. {AUGMENT_HELP}")


@dataclass(frozen=True)
class TuneSettings:
    """What fine-tuning may be asked."""

    strategy: Literal["auto", Strategy] = _setting(
        "auto",
        "head: only the new head; last: also the last --last-stages stages; all: everything at once; lp-ft: everything, "
        "starting from the probe's head; gradual: one more stage at a time; scratch: from random weights. auto: lp-ft.",
    )
    last_stages: int = _setting(2, "Stages that --strategy last trains beside the head.")
    epochs: int | None = _setting(None, "Passes over the training images; by default chosen from their number.")
    time_budget: str | None = _setting(
        None,
        "Such as 60s, 10min or 1h. Tuning takes no longer, with fewer epochs if need be; a probe spends what is left of it on "
        "mirror images and other scales of the training images, and keeps them where cross-validation is better for it.",
    )
    lr: str = _setting(
        "auto", "Learning rate: one number, or LOW:HIGH for a spread from the first stage to the head (1e-6:1e-4)."
    )
    lr_spread: Literal["geometric", "linear"] = _setting("geometric", "How LOW:HIGH is spread over the stages.")
    lr_decay: float | None = _setting(
        None, "With a single --lr: each stage gets this share of the rate of the one after it, 0 to 1."
    )
    schedule: ScheduleName = _setting("one-cycle", "one-cycle, flat, cosine (with warm-up) or step.")
    warmup: float = _setting(0.25, "Share of a phase in which the rate rises (one-cycle, cosine).")
    optimizer: OptimizerName = _setting("adamw", "adamw, adam or sgd (with momentum).")
    weight_decay: float = _setting(0.01, "Weight decay; norms and biases get none.")
    batch_size: int | None = _setting(None, "Images a step; by default 32, less for few images, more on a GPU.")
    batch_norm: Literal["auto", BatchNorm] = _setting(
        "auto", "frozen: pretrained statistics are kept; folded: the same, faster; train: statistics move as well."
    )
    augment: str = _setting(
        "auto",
        "Random changes to training images; auto: none for the probe, for tuning what the images allow. "
        + AUGMENT_HELP,
    )
    outputs: Literal["auto", Outputs] = _setting("auto", "softmax; binary: one sigmoid for two classes; multilabel.")
    label_smoothing: float = _setting(0.0, "Share of each label spread over all classes.")
    mixup: float | None = _setting(None, "Strength alpha of mixup (0.2 is usual).")
    cutmix: float | None = _setting(None, "Strength alpha of cutmix (1.0 is usual).")
    clip_norm: float | None = _setting(1.0, "Longer gradients are shortened to this length; 0: never.")
    ema: float | None = _setting(0.99, "Decay of the moving average of the weights that is judged and kept; 0: none.")
    balance: Literal["auto", "none", "weights", "sampler"] = _setting(
        "auto",
        "Classes of unequal size: weights inverse to the class counts, or a sampler that draws every class equally often (the "
        "same for a probe, which sees all images at once); auto: weights if one class is more than 3 times another.",
    )
    monitor: Literal["loss", "accuracy"] = _setting(
        "loss",
        "What decides on valid which epoch is best. The loss is taken at its best temperature, as answers are given.",
    )
    patience: int | None = _setting(None, "Epochs without a better one after which training stops.")
    interpolate: bool = _setting(
        True, "Try mixtures of the starting and the tuned weights on valid; one is kept where it is clearly better."
    )
    average_best: int | None = _setting(None, "Average the weights of this many best epochs if valid agrees.")
    tta: bool = _setting(
        False,
        "Test-time augmentation: every answer of the model rests on the image and its mirror image (twice the work); with "
        "vertical-flip in --augment also on both upside down (four times).",
    )
    precision: Literal["auto", "bf16", "f32"] = _setting(
        "auto", "Of training features; auto: bf16 if the processor has it. Answers are computed in f32."
    )
    track: Literal["tensorboard", "mlflow", "wandb", "trackio"] | None = _setting(
        None, "Also send the epochs to this tracker (its package must be installed); its files go to RUN/tracking."
    )
    compile: bool = _setting(False, "Compile the network first (torch.compile); pays in long runs on a GPU.")

    @property
    def time_budget_seconds(self) -> float | None:
        """The time budget in seconds; raises UsageError when it cannot be read."""
        return None if self.time_budget is None else seconds_of(self.time_budget)


@dataclass(frozen=True)
class NetworkSettings:
    """The backbone, its input and the kind of head."""

    backbone: str = _setting(
        "auto",
        "auto, lite0, lite1, lite2, random, any timm name, or a local weights file as NAME=FILE. Several, joined by "
        "commas, are compared on a few training images, and the best for its cost is taken.",
    )
    head: HeadKind = _setting(
        "auto",
        "plain: last features only, a timm model; extended: more stages and transforms (probe); cosine: by the angle "
        "between features and class (tune); auto: what pays.",
    )
    hidden: str | None = _setting(
        None, "Hidden layers of the head that tuning trains, WIDTH:DROPOUT or WIDTH: 256:0.4,128:0.2."
    )
    pooling: Pooling | None = _setting(None, "How the last map is pooled; by default as the weights were trained.")
    drop_hidden: bool = _setting(False, "Without the hidden layers that VGG has before its last one.")
    resize: Literal["auto", "squash", "crop", "pad"] = _setting("auto", "Resize mode.")
    size: int | None = _setting(None, "Input side in pixels; by default the one the weights were trained at.")
    engine: Literal["auto", "openvino", "torch"] = _setting("auto", "What runs the network.")


@dataclass(frozen=True)
class AnswerSettings:
    """When a model answers with a label, ``ambiguous`` or ``unknown``."""

    coverage: float = _setting(
        0.975,
        "Share of images whose true class must be among those not ruled out; where that takes several, the answer is "
        "ambiguous.",
    )
    target_precision: float | None = _setting(
        None, "Instead: answer only where the answers are right this often (such as 0.99); the rest is ambiguous."
    )
    unknown_false_alarms: float = _setting(0.01, "Share of images of known classes that may be called unknown.")


@dataclass(frozen=True)
class FitSettings(AnswerSettings, TuneSettings, NetworkSettings, DataSettings):
    """What ``topwork fit`` may be asked, beyond the data."""

    split_of: str | None = _setting(
        None, "A run folder: divide the images as that run did; images that it did not have are for training."
    )
    mode: Mode = _setting(
        "probe", "probe: a head on frozen features; tune: then move the network too; auto: tune where it should pay."
    )
    leave_out: str | None = _setting(
        None, "Train on all domains but this one, and make it the test part: how well does it do on a new domain?"
    )
    near_duplicates: bool = _setting(True, "Look for near duplicates and keep them on one side of the split.")
    views: int = _setting(2, "Augmented views of each training image for the probe, when --augment is not none.")


@dataclass(frozen=True)
class StudySettings(DataSettings):
    """What ``topwork study`` may be asked, beyond the data."""

    quick: bool = _setting(False, "A rough answer within a minute: few images, small inputs, short training.")
    backbone: str = _setting("auto", "The pretrained network that is studied; as for fit.")
    size: int | None = _setting(None, "Input side in pixels, for training and features; by default the study's own.")
    n_images: int | None = _setting(None, "Use at most this many images, evenly of all classes; by default all.")
    test_fraction: float = _setting(0.25, "Share of the images kept to judge on when the data has no split.")


@dataclass(frozen=True)
class ModelSettings:
    """What the table of ``topwork models NAME`` may be asked: the head and what would move."""

    n_classes: int | None = _setting(None, "Classes of the new head; by default the classifier that the weights have.")
    strategy: Strategy = _setting("head", "What would move: head (as a probe), last, all, lp-ft, gradual or scratch.")
    last_stages: int = _setting(2, "Stages that --strategy last moves beside the head.")
    lr: str = _setting("auto", "Learning rate: one number, or LOW:HIGH for a spread from the first stage to the head.")
    lr_spread: Literal["geometric", "linear"] = _setting("geometric", "How LOW:HIGH is spread over the stages.")
    lr_decay: float | None = _setting(None, "With a single --lr: the share of the rate that an earlier stage gets.")
    hidden: str | None = _setting(None, "Hidden layers of the new head, such as 256:0.4,128:0.2.")
    outputs: Literal["softmax", "binary"] = _setting("softmax", "softmax; binary: one sigmoid for two classes.")
    pooling: Pooling | None = _setting(None, "How the last map is pooled.")
    drop_hidden: bool = _setting(False, "Without the hidden layers that VGG has before its last one.")


@dataclass(frozen=True)
class AdaptSettings(DataSettings):
    """What ``topwork adapt`` may be asked, beyond the data."""

    labels: str | None = _setting(
        None, "CSV with the columns path and label for some images of the target; rows without a label are skipped."
    )
    unlabeled: bool = _setting(
        False, "The folders of the target are not classes; by default their names are used to report, never to adapt."
    )
    mode: Literal["features", "batch-norm", "tune"] = _setting(
        "features",
        "What may move. features: the head alone, in seconds; tune: then the whole network, on the labels of the source and on "
        "the adapted answers that the methods agree on; batch-norm: its statistics, taken again over both domains. A moved "
        "network is kept only where it is believed without labels.",
    )
    epochs: int = _setting(4, "Passes over the source's images with --mode tune.")
    ask: int = _setting(0, "Name this many images most worth labeling, in a CSV to fill in for --labels.")
    time_budget: str | None = _setting(
        None, "Time that choosing a method may take once the images are embedded, such as 20s; fewer images are used."
    )

    @property
    def time_budget_seconds(self) -> float | None:
        """The time budget in seconds; raises UsageError when it cannot be read."""
        return None if self.time_budget is None else seconds_of(self.time_budget)


@dataclass(frozen=True)
class ServeSettings:
    """What ``topwork serve`` may be asked."""

    host: str = _setting("127.0.0.1", "Address to listen on; 0.0.0.0 lets other machines in.")
    port: int = _setting(8000, "Port to listen on; 0 takes a free one.")
    workers: int | None = _setting(None, "Threads that decode images; by default one a core.")
    max_body_mb: float = _setting(20.0, "Largest request in MB; larger ones get 413.")
    max_images: int = _setting(64, "Most images in one request; more get 413.")
    max_queue: int = _setting(1024, "Most images that wait for an answer; beyond it, 503.")
    max_held_mb: float = _setting(512.0, "Most MB of requests in memory at a time; beyond it, 503.")
    header_seconds: float = _setting(10.0, "Time a client has for the head of a request.")
    body_seconds: float = _setting(30.0, "Time a client has for the body; then 408.")
    request_seconds: float = _setting(60.0, "Time after which a request that is not answered gets 504.")


def as_dict(settings: DataSettings) -> dict[str, Any]:
    """Settings as plain JSON values, in their order of definition."""
    return asdict(settings)


def fit_command(path: str, out: str, asked: Mapping[str, Any]) -> str:
    """``topwork fit`` for a shell, with every setting that is not the default, and the seed always.

    Args:
        asked: values of :class:`FitSettings` by name.
    """
    words = ["topwork", "fit", path, "--out", out]
    defaults = {item.name: item.default for item in fields(FitSettings)}
    for name, value in asked.items():
        flag = "--" + name.replace("_", "-")
        if value is None or (value == defaults.get(name, MISSING) and name != "seed"):
            continue
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [flag, str(value)]
    return " ".join(quote(word) for word in words)


def quote(word: str) -> str:
    """A word for a POSIX shell; with control characters or undecodable bytes in the ``$'...'`` form of bash."""
    if word.isprintable():
        import shlex

        return shlex.quote(word)
    escaped = re.sub(r"[\\']", lambda found: "\\" + found[0], word)
    encoded = "".join(c if c.isprintable() else _octal(c) for c in escaped)
    return f"$'{encoded}'"


def _octal(character: str) -> str:
    return "".join(f"\\{byte:03o}" for byte in character.encode("utf-8", "surrogateescape"))


def help_of(kind: type[DataSettings]) -> dict[str, str]:
    """The help line of every setting of a kind, by name."""
    return {item.name: item.metadata["help"] for item in fields(kind)}


def seconds_of(text: str) -> float:
    """Seconds of ``60``, ``60s``, ``10min``, ``1.5h``.

    Raises:
        UsageError: anything else.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(s|sec|m|min|h)?\s*", text)
    if match is None or not float(match[1]):
        raise UsageError(f"{text}: not a time; write 60s, 10min or 1h.")
    return float(match[1]) * {"m": 60.0, "min": 60.0, "h": 3600.0}.get(match[2] or "s", 1.0)


def cache_folder() -> Path:
    """Where features and converted weights are kept: ``TOPWORK_CACHE``, else the user's cache folder."""
    chosen = os.environ.get("TOPWORK_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "topwork"


def is_launched() -> bool:
    """Whether ``torchrun`` or ``accelerate launch`` started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


# ---- help


# What a first-time user needs; the rest is shown by --help-all.
EVERYDAY = frozenset(
    [
        "out",
        "resume",
        "overwrite",
        "open",
        "mode",
        "backbone",
        "size",
        "epochs",
        "time-budget",
        "strategy",
        "label-regex",
        "group-by",
        "multi-label",
        "test-fraction",
        "seed",
        "json",
        "quiet",
        "device",
        "dry-run",
    ]
)
_SUBJECTS: dict[str, Any] = {
    "Data": DataSettings,
    "Model": NetworkSettings,
    "Training": TuneSettings,
    "Answers": AnswerSettings,
}
_COMMON = frozenset({"json", "quiet", "debug"})


def option_group(flag: str) -> tuple[str, bool]:
    """The heading of an option in the help, and whether it is an everyday one.

    Args:
        flag: such as ``--valid-fraction``.
    """
    name = flag.removeprefix("--")
    if name in _COMMON:
        return "Output", name in EVERYDAY
    field_name = name.replace("-", "_")
    for title, kind in _SUBJECTS.items():
        if field_name in {item.name for item in fields(kind)}:
            return title, name in EVERYDAY
    return "Options", name in EVERYDAY
