"""All settings, with type, default and help.

The command line, the documentation and ``settings.json`` are generated from these dataclasses. Values may be "auto";
``recipe.json`` records what they were resolved to.
"""

from __future__ import annotations

import difflib
import importlib.util
import math
import operator
import os
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from topwork.errors import UsageError
from topwork.files import writable_folder

Mode = Literal["probe", "tune", "auto"]
HeadKind = Literal["auto", "plain", "extended", "cosine"]
Pooling = Literal["avg", "max", "avgmax", "catavgmax", "token", "both"]
ScheduleName = Literal["one-cycle", "flat", "cosine", "step"]
Strategy = Literal["head", "last", "all", "lp-ft", "lora", "gradual", "scratch"]
OptimizerName = Literal["adamw", "adam", "sgd"]
BatchNorm = Literal["folded", "frozen", "train"]
Outputs = Literal["softmax", "binary", "multilabel"]


AUGMENT_HELP = (
    "none; light (mild crops, flips); standard (crops, flips, color jitter); trivial (TrivialAugment); geometric (mild crops, "
    "horizontal and vertical flips, 90-degree rotations); or several joined by +: random-resized-crop, mild-crop, flip, "
    "vertical-flip, quarter-turns, rotation, color-jitter."
)


ANY = ("...",)  # any value of the other setting
TUNING: dict[str, tuple[str, ...]] = {"mode": ("tune", "auto")}  # for settings that only fine-tuning uses


def _setting(
    default: Any,
    help: str,
    *,
    needs: Mapping[str, tuple[str, ...]] | None = None,
    parse: Callable[[str], Any] | None = None,
    packages: Mapping[str, str] | None = None,
    **limits: float,
) -> Any:
    """A field with its help text and what :func:`check` verifies.

    Args:
        needs: values of other settings, the usual one first, without which this setting has no effect.
        parse: raises UsageError for text it cannot parse.
        packages: the optional package that each value needs, with the extra that installs it; ``*`` for any value.
        limits: of a number: ``at_least``, ``above``, ``at_most``, ``below``.
    """
    asks = {"needs": needs or {}, "limits": limits, "parse": parse, "packages": packages or {}}
    return field(default=default, metadata={"help": help, **asks})


_tuning = partial(_setting, needs=TUNING)  # has no effect without fine-tuning
_WITHIN = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}


def check(settings: Any) -> None:
    """Rejects invalid values, and options that have no effect in combination with the others.

    Raises:
        UsageError: names the option and what to do.
    """
    for item in fields(settings):
        value = getattr(settings, item.name)
        if value is None or value == item.default:
            continue
        option, limits = option_of(item.name, value), item.metadata.get("limits", {})
        if not all(_WITHIN[name](value, limit) for name, limit in limits.items()):
            allowed = " and ".join(f"{name.replace('_', ' ')} {limit:g}" for name, limit in limits.items())
            raise UsageError(f"{option}: must be {allowed}.")
        if item.metadata.get("parse"):
            item.metadata["parse"](value)
        for other, values in item.metadata.get("needs", {}).items():
            asked = getattr(settings, other, None)
            if hasattr(settings, other) and (asked is None if values == ANY else asked not in values):
                raise UsageError(f"{option} has no effect without {option_of(other, values[0])}.")
        packages = item.metadata.get("packages", {})
        package, _, extra = (packages.get(value) or packages.get("*") or "").partition(" ")
        if package and importlib.util.find_spec(package) is None:
            install = f"'topwork[{extra}]'" if extra else package
            raise UsageError(f"{option}: the package {package} is not installed (pip install {install}).")


def option_of(name: str, value: Any) -> str:
    """A setting as typed on the command line: ``--batch-size 8``, ``--no-interpolate``."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {value}"


@dataclass(frozen=True)
class DataSettings:
    """Which images to use, and how to split them."""

    root: str | None = _setting(None, "Folder that paths in a table are relative to [default: the table's folder].")
    path_column: str | None = _setting(None, "Table column with the image path [default: detected].")
    label_column: str | None = _setting(None, "Table column with the label [default: detected].")
    split_column: str | None = _setting(None, "Table column with train, valid or test [default: detected].")
    encoding: str | None = _setting(None, "Text encoding of a table, such as cp1252 [default: detected].")
    class_names: str | None = _setting(
        None, "Text or JSON file that maps class numbers to names [default: one found next to the table]."
    )
    label_regex: str | None = _setting(
        None,
        "Regular expression that extracts the label from each path: group 1, a group named label, or the name of the group that "
        "matches.",
    )
    multi_label: bool = _setting(
        False, "Allow several labels per image: in one cell, in several rows, or in columns of 0 and 1."
    )
    label_separator: str | None = _setting(
        None, "Separator between labels in one cell, with --multi-label [default: detected]."
    )
    group_by: str | None = _setting(
        None,
        "Keep related images (same patient, same burst) on one side of the split: a table column, or a regular expression on the "
        "path.",
    )
    domain_by: str | None = _setting(
        None,
        "Domain of each image (camera, hospital, style): a regular expression on the path. Tables use the column domain.",
    )
    bands: str | None = _setting(
        None,
        "Bands of a multispectral TIFF to use as red, green and blue, counted from 1, such as 3,2,1 [default: the model's].",
        parse=lambda text: band_numbers(text),
        packages={"*": "tifffile tiff"},
    )
    limit_per_class: int | None = _setting(
        None, "Use at most this many images per class, chosen at random (--seed).", at_least=1
    )
    corrections: str | None = _setting(
        None,
        "CSV of corrected labels (path,label), for example from topwork review.",
    )
    valid_fraction: float | None = _setting(
        None,
        "Fraction held out for validation if the data has no split [default: 0.2 for fine-tuning; 0 for a probe, which uses "
        "cross-validation].",
        at_least=0,
        below=1,
    )
    test_fraction: float = _setting(
        0.2,
        "Fraction held out for testing if the data has no split or only a train part; 0 for none.",
        at_least=0,
        below=1,
    )
    max_reject_fraction: float = _setting(
        0.1, "Exit with status 3 if a larger fraction of the files is rejected.", at_least=0, at_most=1
    )
    workers: int | None = _setting(None, "Threads that read and decode images [default: one per core].", at_least=1)
    seed: int = _setting(
        0,
        "Random seed for the split, the cross-validation folds and everything else that is random.",
        at_least=0,
    )


@dataclass(frozen=True)
class ClusterSettings:
    """Where images are read and embedded."""

    ray: str | None = _setting(
        None,
        "Read and embed images with Ray: --ray alone uses this machine; --ray auto or --ray ray://HOST:10001 connects to a "
        "running cluster.",
        packages={"*": "ray cluster"},
    )
    num_cpus_per_worker: float = _setting(1.0, "CPUs per Ray worker.", needs={"ray": ANY}, above=0)
    num_gpus_per_worker: float = _setting(
        0.0, "GPUs per Ray worker; with 0.5, two workers share one.", needs={"ray": ANY}, at_least=0
    )


HERE = ClusterSettings()  # no cluster: threads in this process


@dataclass(frozen=True)
class ScanSettings(ClusterSettings, DataSettings):
    """Settings of ``topwork scan``."""

    quick: bool = _setting(False, "Only read and check the files; skip near duplicates, which need the network.")
    backbone: str = _setting("auto", "Network whose features are used to find near duplicates.")
    augment: str = _setting("standard", f"Augmentation that the page previews. {AUGMENT_HELP}")


@dataclass(frozen=True)
class TuneSettings:
    """Settings of fine-tuning."""

    strategy: Literal["auto", Strategy] = _tuning(
        "auto",
        "Layers to fine-tune. head: the new head; last: also the last --last-stages stages; all: everything; lp-ft: everything, "
        "starting from the probe's head; lora: low-rank adapters and the head; gradual: unfreeze one stage at a time; scratch: "
        "everything, from random weights; auto: lp-ft.",
        packages={"lora": "peft"},
    )
    lora_rank: int = _setting(8, "Rank of the LoRA adapters.", needs=TUNING | {"strategy": ("lora",)}, at_least=1)
    last_stages: int = _setting(
        2,
        "Number of stages that --strategy last trains in addition to the head.",
        needs=TUNING | {"strategy": ("last",)},
        at_least=1,
    )
    epochs: int | None = _tuning(
        None, "Number of epochs, after two of a new head alone [default: by number of images].", at_least=1
    )
    time_budget: str | None = _setting(
        None,
        "Time limit, such as 60s, 10min or 1h. Fine-tuning runs fewer epochs if needed; a probe spends the remaining time on "
        "flips and other scales of the training images and keeps them if they improve cross-validation.",
        parse=lambda text: seconds_of(text),
    )
    lr: str = _tuning(
        "auto",
        "Learning rate: one number, or LOW:HIGH from the first stage to the head, such as 1e-6:1e-4.",
        parse=lambda text: learning_rates(text),
    )
    lr_spread: Literal["geometric", "linear"] = _tuning("geometric", "How LOW:HIGH is spread across the stages.")
    lr_decay: float | None = _tuning(
        None,
        "Layer-wise learning-rate decay, with a single --lr: each stage's rate is that of the next stage times this.",
        above=0,
        at_most=1,
    )
    schedule: ScheduleName = _tuning(
        "one-cycle", "Learning-rate schedule: one-cycle, flat, cosine (with warm-up) or step."
    )
    warmup: float = _tuning(0.25, "Warm-up fraction of each phase (one-cycle, cosine).", at_least=0, below=1)
    optimizer: OptimizerName = _tuning("adamw", "Optimizer; sgd uses momentum.")
    weight_decay: float = _tuning(
        0.01, "Weight decay; not applied to norm layers, biases and tokens.", at_least=0, below=1
    )
    batch_size: int | None = _tuning(
        None, "Batch size [default: 32; smaller for small datasets, larger on a GPU].", at_least=1
    )
    batch_norm: Literal["auto", BatchNorm] = _tuning(
        "auto",
        "Batch-norm statistics. frozen: keep the pretrained ones; folded: the same but faster; train: update them.",
    )
    augment: str = _setting("auto", f"Augmentation; auto: none for a probe, light for fine-tuning. {AUGMENT_HELP}")
    outputs: Literal["auto", Outputs] = _tuning(
        "auto",
        "Output layer: softmax; binary (one sigmoid for two classes); multilabel (one sigmoid per label).",
    )
    label_smoothing: float = _tuning(0.0, "Label smoothing.", at_least=0, below=1)
    mixup: float | None = _tuning(None, "Mixup alpha, such as 0.2.", above=0)
    cutmix: float | None = _tuning(None, "CutMix alpha, such as 1.0.", above=0)
    clip_norm: float | None = _tuning(1.0, "Clip gradients to this norm; 0 disables.", at_least=0)
    ema: float | None = _tuning(
        0.99, "EMA decay; EMA weights are evaluated and saved; 0 disables.", at_least=0, below=1
    )
    balance: Literal["auto", "none", "weights", "sampler"] = _setting(
        "auto",
        "Class imbalance. weights: class weights inversely proportional to frequency; sampler: sample all classes equally often "
        "(same as weights for a probe); auto: weights if the largest class is over 3 times the smallest.",
    )
    monitor: Literal["loss", "accuracy"] = _tuning(
        "loss",
        "Validation metric that selects the best epoch; the loss is computed after temperature scaling.",
    )
    patience: int | None = _tuning(None, "Early-stopping patience (epochs).", at_least=1)
    interpolate: bool = _tuning(
        True,
        "Do not interpolate initial and fine-tuned weights (WiSE-FT), which is done if clearly better on valid.",
    )
    average_best: int | None = _tuning(
        None,
        "Average the weights of this many best epochs if that is clearly better on valid.",
        at_least=1,
    )
    tta: bool = _setting(
        False,
        "Build test-time augmentation into the model: average over the image and its horizontal flip (2x slower); with "
        "vertical-flip in --augment, over vertical flips too (4x slower).",
    )
    precision: Literal["auto", "bf16", "f32"] = _setting(
        "auto",
        "Precision of the training features; auto: bf16 if the processor supports it. Predictions always use f32.",
    )
    track: Literal["tensorboard", "mlflow", "wandb", "trackio"] | None = _tuning(
        None,
        "Log metrics to this experiment tracker, which must be installed; files go to RUN/tracking.",
        packages={name: name for name in ("tensorboard", "mlflow", "wandb", "trackio")},
    )
    compile: bool = _tuning(False, "Use torch.compile; pays off in long runs on a GPU.")

    @property
    def time_budget_seconds(self) -> float | None:
        """The time budget in seconds; raises UsageError if it cannot be parsed."""
        return None if self.time_budget is None else seconds_of(self.time_budget)


@dataclass(frozen=True)
class NetworkSettings:
    """Settings of the backbone, its input and the head."""

    backbone: str = _setting(
        "auto",
        "lite0, lite1 and lite2 (no download), any timm name, random:NAME, or your own weights as NAME=FILE. Given several, "
        "joined by commas, compares them on a sample of the training images and uses the best for its cost. auto: lite0.",
    )
    head: HeadKind = _setting(
        "auto",
        "plain: linear on the last features, loadable by timm; extended: features of more stages, transformed (probe); cosine: "
        "cosine similarity (tune); auto: extended if clearly better in cross-validation.",
    )
    hidden: str | None = _tuning(
        None,
        "Hidden layers of the head for fine-tuning, as WIDTH or WIDTH:DROPOUT, such as 256:0.4,128:0.2.",
    )
    pooling: Pooling | None = _setting(
        None,
        "Pooling of the last feature map or of the patch tokens; token: the class token; both: class token and mean patch token "
        "[default: as pretrained].",
    )
    drop_hidden: bool = _setting(False, "Remove the hidden layers that VGG has before its classifier.")
    resize: Literal["auto", "squash", "crop", "pad"] = _setting("auto", "Resize mode; auto: as pretrained.")
    size: int | None = _setting(None, "Input size in pixels [default: as pretrained].", at_least=1)
    engine: Literal["auto", "openvino", "torch"] = _setting(
        "auto", "Inference engine; auto: OpenVINO on a CPU if it supports the network, else PyTorch."
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = _setting(
        "auto", "Device for training and features; auto: a CUDA GPU if available, else the CPU."
    )


@dataclass(frozen=True)
class AnswerSettings:
    """When a model answers with a label, and when it abstains with ``ambiguous`` or ``unknown``."""

    coverage: float = _setting(
        0.975,
        "Coverage of the conformal prediction sets: the true class is among the plausible ones for this fraction of images; if "
        "several are plausible, the answer is ambiguous.",
    )
    target_precision: float | None = _setting(
        None,
        "Instead of --coverage: answer only if answers are correct this often, such as 0.99; the rest is ambiguous.",
    )
    unknown_false_alarms: float = _setting(
        0.01, "Fraction of images of known classes that may be answered with unknown."
    )
    positive: str | None = _setting(None, "With two classes: the positive one, which gets its own decision threshold.")
    positive_recall: float | None = _setting(
        None,
        "Choose the threshold for this recall of the positive class, such as 0.95.",
        above=0,
        below=1,
    )
    miss_cost: float | None = _setting(
        None, "Choose the threshold by cost: a missed positive costs this many times as much as a false alarm.", above=0
    )


@dataclass(frozen=True)
class FitSettings(ClusterSettings, AnswerSettings, TuneSettings, NetworkSettings, DataSettings):
    """Settings of ``topwork fit``."""

    split_of: str | None = _setting(None, "Use the split of this run; images it does not contain go to train.")
    mode: Mode = _setting(
        "probe",
        "probe: train a head on frozen features; tune: then fine-tune the network, too; auto: fine-tune if it is likely to help.",
    )
    final_fit: Literal["train", "train+valid"] = _setting(
        "train",
        "Images to fit a probe on; train+valid adds a given valid part, which is then no longer used for evaluation.",
        needs={"mode": ("probe",)},
    )
    leave_out: str | None = _setting(
        None, "Train on all domains except this one and test on it, to measure generalization to a new domain."
    )
    near_duplicates: bool = _setting(True, "Do not look for near duplicates, which are kept on one side of the split.")
    zero_shot: str | None = _setting(
        None,
        "With a CLIP or SigLIP backbone: also report the zero-shot accuracy with this prompt, such as 'a photo of a {}.' ({} is "
        "the class name).",
        parse=lambda text: check_prompt(text),
        packages={"*": "transformers"},
    )
    views: int = _setting(2, "Number of augmented views of each training image for a probe, unless --augment is none.")


@dataclass(frozen=True)
class StudySettings(DataSettings):
    """Settings of ``topwork study``."""

    quick: bool = _setting(False, "Rough results within a minute: few images, small inputs, short training.")
    backbone: str = _setting("auto", "Pretrained network, as for fit.")
    size: int | None = _setting(
        None, "Input size in pixels, for training and features [default: depends on the study].", at_least=32
    )
    n_images: int | None = _setting(
        None, "Use at most this many images, balanced over the classes [default: all].", at_least=8
    )
    test_fraction: float = _setting(
        0.25, "Fraction held out for testing if the data has no split.", at_least=0, below=1
    )


@dataclass(frozen=True)
class ModelSettings:
    """Settings of ``topwork models NAME``: the head and the trainable layers."""

    n_classes: int | None = _setting(None, "Number of classes of the new head [default: the pretrained classifier].")
    strategy: Strategy = _setting("head", "Layers to train, as for fit.")
    last_stages: int = _setting(
        2,
        "Number of stages that --strategy last trains in addition to the head.",
        needs={"strategy": ("last",)},
        at_least=1,
    )
    lr: str = _setting(
        "auto",
        "Learning rate: one number, or LOW:HIGH from the first stage to the head.",
        parse=lambda text: learning_rates(text),
    )
    lr_spread: Literal["geometric", "linear"] = _setting("geometric", "How LOW:HIGH is spread across the stages.")
    lr_decay: float | None = _setting(None, "Layer-wise learning-rate decay, with a single --lr.")
    hidden: str | None = _setting(None, "Hidden layers of the new head, such as 256:0.4,128:0.2.")
    outputs: Literal["softmax", "binary"] = _setting(
        "softmax", "Output layer: softmax, or binary (one sigmoid for two classes)."
    )
    pooling: Pooling | None = _setting(None, "Pooling, as for fit.")
    drop_hidden: bool = _setting(False, "Remove the hidden layers that VGG has before its classifier.")


@dataclass(frozen=True)
class AdaptSettings(DataSettings):
    """Settings of ``topwork adapt``."""

    labels: str | None = _setting(
        None, "CSV with labels for some target images (path,label); rows without a label are skipped."
    )
    unlabeled: bool = _setting(
        False, "The target's folder names are not labels. By default they are used to evaluate, never to adapt."
    )
    mode: Literal["features", "tune"] = _setting(
        "features",
        "features: adapt the head only, in seconds; tune: then fine-tune the network on the source labels and on the adapted "
        "predictions that the methods agree on. The result is kept only if label-free checks find it better.",
    )
    epochs: int = _setting(4, "Number of epochs on the source images.", needs={"mode": ("tune",)}, at_least=1)
    ask: int = _setting(
        0, "Write a CSV with this many images that are most worth labeling, to fill in and pass to --labels."
    )
    time_budget: str | None = _setting(
        None, "Time limit for choosing a method once the images are embedded, such as 20s; uses fewer images if needed."
    )

    @property
    def time_budget_seconds(self) -> float | None:
        """The time budget in seconds; raises UsageError if it cannot be parsed."""
        return None if self.time_budget is None else seconds_of(self.time_budget)


@dataclass(frozen=True)
class ServeSettings:
    """Settings of ``topwork serve``."""

    host: str = _setting("127.0.0.1", "Address to listen on; 0.0.0.0 accepts connections from other machines.")
    port: int = _setting(8000, "Port to listen on; 0 picks a free one.")
    token_file: str | None = _setting(
        None, "File with a token that every request must send (Authorization: Bearer TOKEN)."
    )
    auth: bool = _setting(True, "Let other machines connect without a token.")
    allow_host: tuple[str, ...] = _setting((), "Additional host name to answer under; * allows all.")
    examples: str | None = _setting(None, "Folder of example images for the page.")
    workers: int | None = _setting(None, "Threads that decode images [default: one per core].", at_least=1)
    max_body_mb: float = _setting(20.0, "Maximum request size in MB; larger requests get status 413.")
    max_images: int = _setting(64, "Maximum number of images per request; more get status 413.")
    max_queue: int = _setting(1024, "Maximum number of queued images; beyond that, status 503.")
    max_held_mb: float = _setting(512.0, "Maximum total size of requests in memory, in MB; beyond that, status 503.")
    idle_seconds: float = _setting(10.0, "Close idle connections after this many seconds.")
    body_seconds: float = _setting(30.0, "Time limit for receiving a request body, in seconds; then status 408.")
    request_seconds: float = _setting(60.0, "Time limit for answering a request, in seconds; then status 504.")


def with_options(settings: Any, options: Mapping[str, Any]) -> Any:
    """The settings with some replaced by name.

    Raises:
        UsageError: no such setting; suggests the closest names.
    """
    known = {field.name for field in fields(settings)}
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, 2)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise UsageError(f"{name}: no such setting.{hint}")
    return replace(settings, **options)


RENAMED = {"fit": "resize"}  # settings in runs of earlier versions


def fit_command(path: str, out: str, asked: Mapping[str, Any]) -> str:
    """A ``topwork fit`` command line with every setting that differs from its default, and always the seed.

    Args:
        asked: values of :class:`FitSettings` by name.
    """
    words = ["topwork", "fit", path, "--out", out]
    defaults = {item.name: item.default for item in fields(FitSettings)}
    for stored, value in asked.items():
        name = RENAMED.get(stored, stored)
        if name not in defaults:  # an option of an earlier version
            continue
        if value is None or (value == defaults[name] and name != "seed"):
            continue
        words += option_of(name, value).split(" ", 1)
    return " ".join(quote(word) for word in words)


def quote(word: str) -> str:
    """A word quoted for a POSIX shell; in the ``$'...'`` form of bash if it has control characters or undecodable bytes."""
    if word.isprintable():
        return shlex.quote(word)
    escaped = re.sub(r"[\\']", lambda found: "\\" + found[0], word)
    encoded = "".join(c if c.isprintable() else _octal(c) for c in escaped)
    return f"$'{encoded}'"


def _octal(character: str) -> str:
    return "".join(f"\\{byte:03o}" for byte in character.encode("utf-8", "surrogateescape"))


def check_prompt(text: str) -> None:
    """Raises UsageError for a prompt without a placeholder for the class name."""
    if "{}" not in text:
        raise UsageError(
            f"--zero-shot {text!r:.80}: must contain {{}} for the class name, such as 'a photo of a {{}}.'"
        )


def learning_rates(text: str) -> tuple[float, float]:
    """(lowest, highest) of ``1e-4`` or ``1e-6:1e-4``.

    Raises:
        UsageError: for anything else.
    """
    parts = text.split(":")
    try:
        low, high = float(parts[0]), float(parts[-1])
    except ValueError:
        low = high = math.nan
    if len(parts) > 2 or not (0 < low <= high < math.inf):
        raise UsageError(f"--lr {text}: use one number such as 1e-4, or LOW:HIGH such as 1e-6:1e-4.")
    return low, high


def band_numbers(text: str) -> tuple[int, int, int]:
    """The three numbers in ``3,2,1``, counted from 1.

    Raises:
        UsageError: for anything else.
    """
    if not re.fullmatch(r"[1-9]\d{0,3}(,[1-9]\d{0,3}){2}", text):
        raise UsageError(f"--bands {text[:40]}: must be three band numbers, counted from 1, such as 3,2,1.")
    red, green, blue = map(int, text.split(","))
    return red, green, blue


def seconds_of(text: str) -> float:
    """Seconds of ``60``, ``60s``, ``10min``, ``1.5h``.

    Raises:
        UsageError: for anything else.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(s|sec|m|min|h)?\s*", text)
    if match is None or not float(match[1]):
        raise UsageError(f"{text}: not a time. Use a form such as 60s, 10min or 1h.")
    return float(match[1]) * {"m": 60.0, "min": 60.0, "h": 3600.0}.get(match[2] or "s", 1.0)


def cache_setting() -> Path:
    """The configured cache folder: ``TOPWORK_CACHE``, else the user's cache folder.

    Raises:
        UsageError: there is no home folder and TOPWORK_CACHE is not set.
    """
    chosen = os.environ.get("TOPWORK_CACHE")
    if chosen:
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "topwork"
    except RuntimeError:
        raise UsageError("There is no home folder for the cache. Set TOPWORK_CACHE to a folder.") from None


def cache_folder() -> Path:
    """The cache folder, or a temporary one if it is read-only."""
    return writable_folder(cache_setting(), "TOPWORK_CACHE names another folder.")


def is_launched() -> bool:
    """Whether ``torchrun`` or ``accelerate launch`` started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


# ---- help


# For first-time users; --help-all shows the rest.
EVERYDAY = frozenset(
    [
        "out",
        "resume",
        "overwrite",
        "open",
        "mode",
        "backbone",
        "epochs",
        "time-budget",
        "strategy",
        "group-by",
        "test-fraction",
        "seed",
        "json",
        "device",
        "dry-run",
    ]
)
_SUBJECTS: dict[str, Any] = {
    "Data": DataSettings,
    "Model": NetworkSettings,
    "Training": TuneSettings,
    "Answers": AnswerSettings,
    "Cluster": ClusterSettings,
}


def option_group(flag: str) -> tuple[str, bool]:
    """The heading of an option in the help, and whether it is shown by --help.

    Args:
        flag: such as ``--valid-fraction``.
    """
    name = flag.removeprefix("--")
    if name in ("json", "quiet", "debug"):
        return "Output", name in EVERYDAY
    own = (title for title, kind in _SUBJECTS.items() if name.replace("-", "_") in kind.__dataclass_fields__)
    return next(own, "Options"), name in EVERYDAY
