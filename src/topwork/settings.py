"""What may be asked: every setting once, with its type, default and help.

The command line, the documentation and ``settings.json`` are made from these dataclasses. Nothing is decided here:
a value may be "auto"; ``run.py`` turns what was asked into what is done and records both.
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
from dataclasses import asdict, dataclass, field, fields, replace
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
    "none; light (mild crops, mirror images); standard (crops, mirror images, color); trivial (TrivialAugment); geometric "
    "(mild crops, flips both ways, quarter turns); or parts joined by +: random-resized-crop, mild-crop, flip, "
    "vertical-flip, quarter-turns, rotation, color-jitter."
)


ANY = ("...",)  # any value of another setting will do
TUNING: dict[str, tuple[str, ...]] = {"mode": ("tune", "auto")}  # what a setting needs that only fine-tuning reads


def _setting(
    default: Any,
    help: str,
    *,
    needs: Mapping[str, tuple[str, ...]] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    parse: Callable[[str], Any] | None = None,
    packages: Mapping[str, str] | None = None,
) -> Any:
    """A field with its help line and what :func:`check` asks of it.

    Args:
        needs: values of other settings, the usual one first; without one of each, this setting has no effect.
        at_least, above, at_most, below: limits of numbers.
        parse: raises UsageError for a text that cannot be read.
        packages: the optional package that a value needs, by value; ``*`` for any value.
    """
    limits = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    limits = {words: limit for words, limit in limits.items() if limit is not None}
    asks = {"needs": needs or {}, "limits": limits, "parse": parse, "packages": packages or {}}
    return field(default=default, metadata={"help": help, **asks})


_WITHIN: dict[str, Callable[[Any, Any], bool]] = {
    "at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt,
}  # fmt: skip


def check(settings: Any) -> None:
    """Refuses impossible values, and options that have no effect with the others that were given.

    Raises:
        UsageError: naming the option and what to do.
    """
    for item in fields(settings):
        value = getattr(settings, item.name)
        if value is None or value == item.default:
            continue
        option, limits = option_of(item.name, value), item.metadata.get("limits", {})
        if not all(_WITHIN[words](value, limit) for words, limit in limits.items()):
            allowed = " and ".join(f"{words} {limit:g}" for words, limit in limits.items())
            raise UsageError(f"{option}: must be {allowed}.")
        if item.metadata.get("parse"):
            item.metadata["parse"](value)
        for other, values in item.metadata.get("needs", {}).items():
            asked = getattr(settings, other, None)
            if hasattr(settings, other) and (asked is None if values == ANY else asked not in values):
                raise UsageError(f"{option} has no effect without {option_of(other, values[0])}.")
        packages = item.metadata.get("packages", {})
        package = packages.get(value) or packages.get("*")
        if package is not None and importlib.util.find_spec(package) is None:
            raise UsageError(f"{option}: the package {package} is not installed (pip install {package}).")


def option_of(name: str, value: Any) -> str:
    """A setting as it is typed: ``--batch-size 8``, ``--no-interpolate``."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {value}"


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
    bands: str | None = _setting(
        None,
        "Bands of a many-band TIFF to take as red, green and blue, counted from 1, such as 3,2,1 [default: the model's].",
        parse=lambda text: band_numbers(text),
    )
    limit_per_class: int | None = _setting(None, "Use at most this many images per class, drawn by --seed.")
    corrections: str | None = _setting(
        None,
        "CSV of corrected labels (path,label), such as topwork review writes; replaces the labels of those images.",
    )
    valid_fraction: float | None = _setting(
        None,
        "Fraction held out for validation if the data has no split [default: 0.2 if the backbone is tuned, else 0: a probe is "
        "chosen by cross-validation].",
        at_least=0,
        below=1,
    )
    test_fraction: float = _setting(
        0.2, "Fraction held out for the test if the data has no split or only a train part; 0: none."
    )
    max_reject_fraction: float = _setting(0.1, "Exit with status 3 if a larger fraction of the files was rejected.")
    workers: int | None = _setting(None, "Threads that read and decode images [default: one per core].")
    seed: int = _setting(0, "Random seed: split, cross-validation folds and every other random choice.")


@dataclass(frozen=True)
class ClusterSettings:
    """Which machines read and embed images."""

    ray: str | None = _setting(
        None,
        "Read and embed images on a Ray cluster: --ray alone uses the cores of this machine, --ray auto or "
        "--ray ray://HOST:10001 a cluster that runs.",
    )
    num_cpus_per_worker: float = _setting(1.0, "CPUs of each Ray worker.", needs={"ray": ANY}, above=0)
    num_gpus_per_worker: float = _setting(
        0.0, "GPUs of each Ray worker; 0.5: two workers share one.", needs={"ray": ANY}, at_least=0
    )


HERE = ClusterSettings()  # no cluster: threads of this process


@dataclass(frozen=True)
class ScanSettings(ClusterSettings, DataSettings):
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
        "head: train the new head only; last: also the last --last-stages stages; all: everything at once; lp-ft: everything, "
        "starting from the probe's head; lora: low-rank adapters and the head, for large networks (less memory); gradual: unfreeze one more stage at a time; "
        "scratch: from random weights. auto: lp-ft.",
        needs=TUNING,
        packages={"lora": "peft"},
    )
    lora_rank: int = _setting(8, "Rank of LoRA adapters.", needs=TUNING | {"strategy": ("lora",)}, at_least=1)
    last_stages: int = _setting(
        2, "Stages that --strategy last trains besides the head.", needs=TUNING | {"strategy": ("last",)}, at_least=1
    )
    epochs: int | None = _setting(
        None, "Epochs; by default chosen from the number of images.", needs=TUNING, at_least=1
    )
    time_budget: str | None = _setting(
        None,
        "Such as 60s, 10min or 1h. Tuning takes no longer, with fewer epochs if need be; a probe spends what is left of it on "
        "mirror images and other scales of the training images, and keeps them if cross-validation is better for it.",
        parse=lambda text: seconds_of(text),
    )
    lr: str = _setting(
        "auto",
        "Learning rate: one number, or LOW:HIGH from the first stage to the head (1e-6:1e-4).",
        needs=TUNING,
        parse=lambda text: learning_rates(text),
    )
    lr_spread: Literal["geometric", "linear"] = _setting(
        "geometric", "How LOW:HIGH is spread over the stages.", needs=TUNING
    )
    lr_decay: float | None = _setting(
        None,
        "Layer-wise decay, with a single --lr: each stage gets this share of the rate of the one after it.",
        needs=TUNING,
        above=0,
        at_most=1,
    )
    schedule: ScheduleName = _setting("one-cycle", "one-cycle, flat, cosine (with warm-up) or step.", needs=TUNING)
    warmup: float = _setting(
        0.25, "Warm-up fraction of each phase (one-cycle, cosine).", needs=TUNING, at_least=0, below=1
    )
    optimizer: OptimizerName = _setting("adamw", "adamw, adam or sgd (with momentum).", needs=TUNING)
    weight_decay: float = _setting(
        0.01, "Weight decay; not applied to norm layers, biases, and tokens.", needs=TUNING, at_least=0, below=1
    )
    batch_size: int | None = _setting(
        None, "Images per step; by default 32, fewer for small data sets, more on a GPU.", needs=TUNING, at_least=1
    )
    batch_norm: Literal["auto", BatchNorm] = _setting(
        "auto",
        "Batch-norm statistics. frozen: keep the pretrained ones; folded: the same, faster; train: update them.",
        needs=TUNING,
    )
    augment: str = _setting("auto", f"Augmentation; auto: none for the probe, mild for tuning. {AUGMENT_HELP}")
    outputs: Literal["auto", Outputs] = _setting(
        "auto", "softmax; binary: one sigmoid for two classes; multilabel.", needs=TUNING
    )
    label_smoothing: float = _setting(0.0, "Label smoothing.", needs=TUNING, at_least=0, below=1)
    mixup: float | None = _setting(None, "Mixup alpha (0.2 is usual).", needs=TUNING, above=0)
    cutmix: float | None = _setting(None, "CutMix alpha (1.0 is usual).", needs=TUNING, above=0)
    clip_norm: float | None = _setting(1.0, "Clip gradients to this norm; 0 disables.", needs=TUNING, at_least=0)
    ema: float | None = _setting(
        0.99, "EMA decay; EMA weights are evaluated and saved; 0 disables.", needs=TUNING, at_least=0, below=1
    )
    balance: Literal["auto", "none", "weights", "sampler"] = _setting(
        "auto",
        "Class imbalance: weights inverse to the class counts, or a sampler that draws every class equally often (the same "
        "for a probe, which sees all images at once); auto: weights if one class is more than 3 times another.",
    )
    monitor: Literal["loss", "accuracy"] = _setting(
        "loss",
        "Validation metric that selects the best epoch; the loss is taken after temperature scaling.",
        needs=TUNING,
    )
    patience: int | None = _setting(None, "Early-stopping patience (epochs).", needs=TUNING, at_least=1)
    interpolate: bool = _setting(
        True, "Interpolate initial and fine-tuned weights (WiSE-FT) if it is clearly better on valid.", needs=TUNING
    )
    average_best: int | None = _setting(
        None, "Average the weights of this many best epochs if it is clearly better on valid.", needs=TUNING, at_least=1
    )
    tta: bool = _setting(
        False,
        "Test-time augmentation: every answer of the model averages the image and its horizontal flip (2x slower); with "
        "vertical-flip in --augment also both upside down (4x).",
    )
    precision: Literal["auto", "bf16", "f32"] = _setting(
        "auto", "Of training features; auto: bf16 if the processor has it. Answers are computed in f32."
    )
    track: Literal["tensorboard", "mlflow", "wandb", "trackio"] | None = _setting(
        None,
        "Also send the epochs to this tracker (its package must be installed); its files go to RUN/tracking.",
        needs=TUNING,
        packages={name: name for name in ("tensorboard", "mlflow", "wandb", "trackio")},
    )
    compile: bool = _setting(False, "torch.compile the network; pays off in long runs on a GPU.", needs=TUNING)

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
        None, "Hidden layers of the head that tuning trains, WIDTH:DROPOUT or WIDTH: 256:0.4,128:0.2.", needs=TUNING
    )
    pooling: Pooling | None = _setting(
        None,
        "Pooling of the last map or of the patch tokens; token: the class token; both: class token and mean patch token. "
        "By default as the weights were trained.",
    )
    drop_hidden: bool = _setting(False, "Without the hidden layers that VGG has before its last one.")
    resize: Literal["auto", "squash", "crop", "pad"] = _setting("auto", "Resize mode.")
    size: int | None = _setting(None, "Input side in pixels; by default the one the weights were trained at.")
    engine: Literal["auto", "openvino", "torch"] = _setting("auto", "What runs the network.")
    device: Literal["auto", "cpu", "cuda", "mps"] = _setting(
        "auto", "Device for training and features; auto: a CUDA GPU if there is one, else the CPU."
    )


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
    positive: str | None = _setting(None, "Of two classes, the one to find; it gets a threshold of its own.")
    positive_recall: float | None = _setting(
        None,
        "Choose that threshold so that this share of the positive images is found, such as 0.95.",
        above=0,
        below=1,
    )
    miss_cost: float | None = _setting(
        None, "Choose it by cost: how many times as much a missed positive costs as a false alarm.", above=0
    )


@dataclass(frozen=True)
class FitSettings(ClusterSettings, AnswerSettings, TuneSettings, NetworkSettings, DataSettings):
    """What ``topwork fit`` may be asked, beyond the data."""

    split_of: str | None = _setting(
        None, "A run folder: divide the images as that run did; images that it did not have are for training."
    )
    mode: Mode = _setting(
        "probe", "probe: a head on frozen features; tune: then move the network too; auto: tune where it should pay."
    )
    final_fit: Literal["train", "train+valid"] = _setting(
        "train",
        "Images that a probe is fitted on: train+valid adds a given valid part, which then measures nothing.",
        needs={"mode": ("probe",)},
    )
    leave_out: str | None = _setting(
        None, "Train on all domains but this one, and make it the test part: how well does it do on a new domain?"
    )
    near_duplicates: bool = _setting(True, "Look for near duplicates and keep them on one side of the split.")
    zero_shot: str | None = _setting(
        None,
        "With a CLIP or SigLIP backbone: a prompt with {} for the class name, such as 'a photo of a {}.'; also measures the head "
        "that the text tower makes of the class names, without training.",
        parse=lambda text: check_prompt(text),
        packages={"*": "transformers"},
    )
    views: int = _setting(2, "Augmented views of each training image for the probe, when --augment is not none.")


@dataclass(frozen=True)
class StudySettings(DataSettings):
    """What ``topwork study`` may be asked, beyond the data."""

    quick: bool = _setting(False, "A rough answer within a minute: few images, small inputs, short training.")
    backbone: str = _setting("auto", "The pretrained network that is studied; as for fit.")
    size: int | None = _setting(
        None, "Input side in pixels, for training and features; by default the study's own.", at_least=32
    )
    n_images: int | None = _setting(
        None, "Use at most this many images, evenly of all classes; by default all.", at_least=8
    )
    test_fraction: float = _setting(0.25, "Fraction held out for the test if the data has no split.")


@dataclass(frozen=True)
class ModelSettings:
    """What the table of ``topwork models NAME`` may be asked: the head and what would move."""

    n_classes: int | None = _setting(None, "Classes of the new head; by default the classifier that the weights have.")
    strategy: Strategy = _setting("head", "What would move: head (as a probe), last, all, lp-ft, gradual or scratch.")
    last_stages: int = _setting(
        2, "Stages that --strategy last trains besides the head.", needs={"strategy": ("last",)}, at_least=1
    )
    lr: str = _setting(
        "auto",
        "Learning rate: one number, or LOW:HIGH from the first stage to the head.",
        parse=lambda text: learning_rates(text),
    )
    lr_spread: Literal["geometric", "linear"] = _setting("geometric", "How LOW:HIGH is spread over the stages.")
    lr_decay: float | None = _setting(None, "With a single --lr: the share of the rate that an earlier stage gets.")
    hidden: str | None = _setting(None, "Hidden layers of the new head, such as 256:0.4,128:0.2.")
    outputs: Literal["softmax", "binary"] = _setting("softmax", "softmax; binary: one sigmoid for two classes.")
    pooling: Pooling | None = _setting(None, "Pooling of the last map or of the tokens; as for fit.")
    drop_hidden: bool = _setting(False, "Without the hidden layers that VGG has before its last one.")


@dataclass(frozen=True)
class AdaptSettings(DataSettings):
    """What ``topwork adapt`` may be asked, beyond the data."""

    labels: str | None = _setting(
        None, "CSV with the columns path and label for some images of the target; rows without a label are skipped."
    )
    unlabeled: bool = _setting(
        False, "Folder names of the target are not labels; by default they are used for the report, never to adapt."
    )
    mode: Literal["features", "tune"] = _setting(
        "features",
        "What is trained. features: the head alone, in seconds; tune: then the whole network, on the labels of the source and "
        "on the adapted predictions that the methods agree on. It is kept only if it is better as far as one can tell "
        "without labels.",
    )
    epochs: int = _setting(4, "Epochs on the source's images.", needs={"mode": ("tune",)}, at_least=1)
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
    token_file: str | None = _setting(None, "File with a token that every request must carry (Authorization: Bearer).")
    auth: bool = _setting(True, "--no-auth lets other machines in without a token.")
    allow_host: tuple[str, ...] = _setting((), "Further host name that requests may come under; * allows all.")
    examples: str | None = _setting(None, "Folder of images that the page offers to try.")
    workers: int | None = _setting(None, "Threads that decode images [default: one per core].")
    max_body_mb: float = _setting(20.0, "Largest request in MB; larger ones get 413.")
    max_images: int = _setting(64, "Most images in one request; more get 413.")
    max_queue: int = _setting(1024, "Most images that wait for an answer; beyond it, 503.")
    max_held_mb: float = _setting(512.0, "Most MB of requests in memory at a time; beyond it, 503.")
    idle_seconds: float = _setting(10.0, "Time after which an idle connection is closed.")
    body_seconds: float = _setting(30.0, "Time a client has for the body; then 408.")
    request_seconds: float = _setting(60.0, "Time after which a request that is not answered gets 504.")


def as_dict(settings: DataSettings) -> dict[str, Any]:
    """Settings as plain JSON values, in their order of definition."""
    return asdict(settings)


def with_options(settings: Any, options: Mapping[str, Any]) -> Any:
    """The settings with some of them replaced by name.

    Raises:
        UsageError: there is no such setting; the nearest names are given.
    """
    known = {field.name for field in fields(settings)}
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, 2)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise UsageError(f"{name}: there is no such setting.{hint}")
    return replace(settings, **options)


RENAMED = {"fit": "resize"}  # settings of runs of earlier versions


def fit_command(path: str, out: str, asked: Mapping[str, Any]) -> str:
    """``topwork fit`` for a shell, with every setting that is not the default, and the seed always.

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
    """A word for a POSIX shell; with control characters or undecodable bytes in the ``$'...'`` form of bash."""
    if word.isprintable():
        return shlex.quote(word)
    escaped = re.sub(r"[\\']", lambda found: "\\" + found[0], word)
    encoded = "".join(c if c.isprintable() else _octal(c) for c in escaped)
    return f"$'{encoded}'"


def _octal(character: str) -> str:
    return "".join(f"\\{byte:03o}" for byte in character.encode("utf-8", "surrogateescape"))


def check_prompt(text: str) -> None:
    """Raises UsageError for a prompt that does not say where the class name goes."""
    if "{}" not in text:
        raise UsageError(f"--zero-shot {text!r:.80}: needs {{}} for the class name, such as 'a photo of a {{}}.'")


def learning_rates(text: str) -> tuple[float, float]:
    """(lowest, highest) of ``1e-4`` or ``1e-6:1e-4``.

    Raises:
        UsageError: anything else.
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
        UsageError: something else.
    """
    if not re.fullmatch(r"[1-9]\d{0,3}(,[1-9]\d{0,3}){2}", text):
        raise UsageError(f"--bands {text[:40]}: give three band numbers, counted from 1, such as 3,2,1.")
    red, green, blue = map(int, text.split(","))
    return red, green, blue


def seconds_of(text: str) -> float:
    """Seconds of ``60``, ``60s``, ``10min``, ``1.5h``.

    Raises:
        UsageError: anything else.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(s|sec|m|min|h)?\s*", text)
    if match is None or not float(match[1]):
        raise UsageError(f"{text}: not a time; write 60s, 10min or 1h.")
    return float(match[1]) * {"m": 60.0, "min": 60.0, "h": 3600.0}.get(match[2] or "s", 1.0)


def cache_setting() -> Path:
    """Where the user wants features and converted weights: ``TOPWORK_CACHE``, else the user's cache folder.

    Raises:
        UsageError: the user has no home folder and has not chosen another.
    """
    chosen = os.environ.get("TOPWORK_CACHE")
    if chosen:
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "topwork"
    except RuntimeError:
        raise UsageError("There is no home folder for the cache. Set TOPWORK_CACHE to a folder.") from None


def cache_folder() -> Path:
    """The folder where features and converted weights are kept, or a temporary one if it cannot be written."""
    return writable_folder(cache_setting(), "TOPWORK_CACHE names another folder.")


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
