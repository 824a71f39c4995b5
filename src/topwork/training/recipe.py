"""The plan of fine-tuning: turns :class:`TuneSettings` into a :class:`Recipe` without "auto".

In: settings (some "auto"), a few facts about the data, the names of the network's stages. Out: phases of one loop with
a rate for every stage. All functions are pure; a recipe is plain JSON and stored with the run.
Strategies are data: each is a list of phases, and frozen stages have rate 0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from topwork.data.augment import pipeline
from topwork.errors import UsageError
from topwork.features.probe import class_weights
from topwork.models.head import HeadSpec, parse_head
from topwork.settings import (
    BatchNorm,
    FitSettings,
    OptimizerName,
    Outputs,
    ScheduleName,
    Strategy,
    check,
    learning_rates,
)
from topwork.settings import TuneSettings as TuneSettings

HEAD = "classifier"
# Peak rates for pretrained weights; the first stage gets a tenth of it. Measured with AdamW on ELPV, last three
# stages from the probe's head, 4 epochs, loss on valid: 0.317 at 1e-4, 0.345 at 3e-4, 0.41 at 1e-3.
TUNE_RATE = {"adamw": 1e-4, "adam": 1e-4, "sgd": 1e-3}
# For heads and networks with random weights.
HEAD_RATE = {"adamw": 1e-3, "adam": 1e-3, "sgd": 1e-2}
SCRATCH_RATE = {"adamw": 1e-3, "adam": 1e-3, "sgd": 5e-2}


@dataclass(frozen=True)
class DataFacts:
    """Facts about the data and the machine for a plan.

    Attributes:
        class_counts: training images of each class.
        n_images: training images; None for the sum over the classes.
        has_bf16: the processor or GPU computes in bfloat16.
        images_per_second: in training; None if not measured.
    """

    class_counts: tuple[int, ...]
    n_valid: int
    n_images: int | None = None
    has_gpu: bool = False
    has_bf16: bool = False
    gray: bool = False
    multilabel: bool = False
    images_per_second: float | None = None

    @property
    def n_train(self) -> int:
        """Training images."""
        return sum(self.class_counts) if self.n_images is None else self.n_images


@dataclass(frozen=True)
class Phase:
    """A phase of training with one set of learning rates and one run of the schedule.

    Attributes:
        rates: (stage, peak rate) in forward order; 0 freezes the stage, including batch-norm statistics.
    """

    name: str
    n_epochs: int
    rates: tuple[tuple[str, float], ...]
    schedule: ScheduleName = "one-cycle"
    warmup: float = 0.25
    batch_norm: BatchNorm = "frozen"

    @property
    def frozen(self) -> frozenset[str]:
        """Names of the frozen stages."""
        return frozenset(stage for stage, rate in self.rates if rate == 0)


@dataclass(frozen=True)
class Recipe:
    """All decisions for one fine-tuning, without "auto"; see :class:`TuneSettings`.

    Attributes:
        augmentation: name of a pipeline of ``data/augment.py``.
        class_weights: weight of each class in the loss.
        sampling: relative frequency of each class in sampling; None for each image once per epoch.
    """

    strategy: Strategy
    phases: tuple[Phase, ...]
    head_from_probe: bool
    batch_size: int
    n_classes: int
    outputs: Outputs = "softmax"
    optimizer: OptimizerName = "adamw"
    weight_decay: float = 0.01
    augmentation: str = "none"
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None
    sampling: tuple[float, ...] | None = None
    mixup: float | None = None
    cutmix: float | None = None
    clip_norm: float | None = 1.0
    ema: float | None = None
    monitor: Literal["loss", "accuracy"] = "loss"
    patience: int | None = None
    interpolate: bool = False
    average_best: int | None = None
    lora_rank: int | None = None
    precision: Literal["bf16", "f32"] = "f32"
    compile: bool = False
    time_budget_seconds: float | None = None
    seed: int = 0
    notes: tuple[str, ...] = ()

    @property
    def n_epochs(self) -> int:
        """Number of epochs of all phases."""
        return sum(phase.n_epochs for phase in self.phases)

    @property
    def folds(self) -> bool:
        """Whether batch norms are folded into convolutions for training."""
        return all(phase.batch_norm == "folded" for phase in self.phases)

    def phases_with_epochs(self) -> Iterator[tuple[Phase, range]]:
        """Each phase with the numbers of its epochs, from 0."""
        first = 0
        for phase in self.phases:
            yield phase, range(first, first + phase.n_epochs)
            first += phase.n_epochs

    def draw_weights(self, labels: NDArray[np.int64]) -> NDArray[np.float64] | None:
        """(N,) relative frequency of each sample in sampling; None for each once per epoch."""
        return None if self.sampling is None else np.array(self.sampling)[labels]

    def is_written_as(self, values: dict[str, Any]) -> bool:
        """Whether these JSON values are this recipe; False for versions with other settings."""
        return bool(json.loads(json.dumps(asdict(self))) == values)


# ---- deciding


def plan(
    settings: TuneSettings, facts: DataFacts, stages: Sequence[str], seed: int = 0, *, head_is_fitted: bool = True
) -> Recipe:
    """Turns settings into a recipe.

    Args:
        stages: the network's stages in forward order, ``classifier`` last.
        head_is_fitted: the head starts from a probe. Otherwise (an MLP) it is first trained alone.

    Raises:
        UsageError: settings that contradict each other or the data.
    """
    _check(settings, facts)
    balance = _balance(settings, facts)
    strategy: Strategy = "lp-ft" if settings.strategy == "auto" else settings.strategy
    batch_size = settings.batch_size or _batch_size(facts)
    n_epochs, notes = _n_epochs(settings, facts, strategy)
    outputs: Outputs = (
        settings.outputs if settings.outputs != "auto" else ("multilabel" if facts.multilabel else "softmax")
    )
    phases = _phases(settings, strategy, tuple(stages), n_epochs)
    if strategy in ("last", "lp-ft", "lora") and not head_is_fitted:
        phases = (_head_phase(settings, tuple(stages), phases[0].batch_norm), *phases)
    return Recipe(
        strategy=strategy,
        phases=phases,
        head_from_probe=strategy != "scratch" and head_is_fitted,
        batch_size=batch_size,
        n_classes=len(facts.class_counts),
        outputs=outputs,
        optimizer=settings.optimizer,
        weight_decay=settings.weight_decay,
        augmentation=_augmentation(settings, facts),
        label_smoothing=settings.label_smoothing,
        class_weights=None if settings.balance == "sampler" else balance,
        sampling=balance if settings.balance == "sampler" else None,
        mixup=settings.mixup,
        cutmix=settings.cutmix,
        clip_norm=settings.clip_norm or None,  # 0 means off
        ema=settings.ema or None,
        monitor=settings.monitor,
        patience=settings.patience if facts.n_valid else None,
        interpolate=settings.interpolate and strategy not in ("scratch", "head") and facts.n_valid > 0,
        average_best=settings.average_best if facts.n_valid else None,
        lora_rank=settings.lora_rank if strategy == "lora" else None,
        precision=("bf16" if facts.has_bf16 else "f32") if settings.precision == "auto" else settings.precision,
        compile=settings.compile,
        time_budget_seconds=settings.time_budget_seconds,
        seed=seed,
        notes=notes,
    )


def spread_rates(settings: TuneSettings, stages: Sequence[str], strategy: str = "lp-ft") -> dict[str, float]:
    """Peak rate of every stage, from ``--lr``, ``--lr-spread`` and ``--lr-decay``."""
    low, high = _rate_range(settings, strategy)
    n = len(stages)
    if settings.lr_decay is not None:
        return {stage: high * settings.lr_decay ** (n - 1 - i) for i, stage in enumerate(stages)}
    positions = [i / (n - 1) if n > 1 else 1.0 for i in range(n)]
    if settings.lr_spread == "linear" or low == high:
        return {stage: low + (high - low) * x for stage, x in zip(stages, positions, strict=True)}
    return {stage: low * (high / low) ** x for stage, x in zip(stages, positions, strict=True)}


def _rate_range(settings: TuneSettings, strategy: str) -> tuple[float, float]:
    if settings.lr == "auto":
        if strategy == "scratch":
            return (SCRATCH_RATE[settings.optimizer],) * 2
        high = HEAD_RATE[settings.optimizer] if strategy in ("head", "lora") else TUNE_RATE[settings.optimizer]
        # one rate for the last stages, which are all task-specific (ELPV, valid: see docs/lab-log.md)
        return (high if strategy in ("head", "last", "lora") else high / 10), high
    return learning_rates(settings.lr)


def _phases(settings: TuneSettings, strategy: Strategy, stages: tuple[str, ...], n_epochs: int) -> tuple[Phase, ...]:
    rates = spread_rates(settings, stages, strategy)
    policy: BatchNorm = settings.batch_norm if settings.batch_norm != "auto" else (
        "train" if strategy == "scratch" else "folded"
    )  # fmt: skip

    def phase(name: str, epochs: int, moving: Sequence[str]) -> Phase:
        chosen = tuple((stage, rates[stage] if stage in moving else 0.0) for stage in stages)
        return Phase(name, epochs, chosen, settings.schedule, settings.warmup, policy)

    if strategy == "head":
        return (phase("head", n_epochs, stages[-1:]),)
    if strategy == "last":
        last = _last(stages, settings.last_stages)
        return (phase(f"last {settings.last_stages} stages", n_epochs, last),)
    if strategy == "gradual":
        return _gradual(phase, stages, n_epochs)
    names = {"all": "everything", "lp-ft": "everything, from the probe's head", "scratch": "from scratch"}
    name = names.get(strategy, "adapters and head")
    return (phase(name, n_epochs, stages),)


def _head_phase(settings: TuneSettings, stages: tuple[str, ...], policy: BatchNorm) -> Phase:
    """Two epochs of the new head alone, so that random weights do not distort the features (arXiv 2202.10054)."""
    rate = HEAD_RATE[settings.optimizer]
    rates = tuple((stage, rate if stage == stages[-1] else 0.0) for stage in stages)
    return Phase("head", 2, rates, settings.schedule, settings.warmup, policy)


def _gradual(phase: Any, stages: tuple[str, ...], n_epochs: int) -> tuple[Phase, ...]:
    """Howard and Ruder 2018 (arXiv 1801.06146): first the head, then one more stage per epoch, then everything."""
    n_steps = min(n_epochs, len(stages))
    starts = [max(1, round(len(stages) * (step + 1) / n_steps)) for step in range(n_steps)]
    starts[0] = 1
    phases = [phase(f"last {n} of {len(stages)} stages", 1, stages[-n:]) for n in starts]
    return (*phases[:-1], replace(phases[-1], n_epochs=n_epochs - n_steps + 1))


def _last(stages: tuple[str, ...], n: int) -> tuple[str, ...]:
    """The classifier, the neck before it, and the last n stages."""
    proper = [stage for stage in stages if stage not in ("stem", "neck", HEAD)]
    if not 0 < n <= len(proper):
        raise UsageError(f"--last-stages {n}: this network has {len(proper)} stages.")
    first = stages.index(proper[-n])
    return stages[first:]


def _n_epochs(settings: TuneSettings, facts: DataFacts, strategy: Strategy) -> tuple[int, tuple[str, ...]]:
    """About 30,000 images in total, 4 to 20 epochs."""
    usual = 30 if strategy == "scratch" else min(20, max(4, math.ceil(30_000 / facts.n_train)))
    n_epochs = settings.epochs or usual
    budget, rate = settings.time_budget_seconds, facts.images_per_second
    if budget is None or rate is None:
        return n_epochs, ()
    seconds = (facts.n_train + 0.4 * facts.n_valid) / rate  # evaluation costs about a third of training per image
    fits = max(1, int(0.9 * budget / seconds))
    if fits >= n_epochs:
        return n_epochs, ()
    return fits, (f"{fits} instead of {n_epochs} epochs, so that training ends within {budget:.0f} s here.",)


def _batch_size(facts: DataFacts) -> int:
    """A power of two with at least about 20 steps per epoch."""
    largest = 128 if facts.has_gpu else 32
    return max(4, min(largest, int(2 ** int(math.log2(max(facts.n_train / 20, 4))))))


def _augmentation(settings: TuneSettings, facts: DataFacts) -> str:
    if settings.augment != "auto":
        return pipeline(settings.augment).name
    # Color often determines the class, so it is not changed by default; flips and crops rarely change the class.
    return "flip" if facts.gray else "light"


def _balance(settings: TuneSettings, facts: DataFacts) -> tuple[float, ...] | None:
    """Weights inverse to the class counts, if the classes are to be balanced."""
    if facts.multilabel or settings.outputs == "multilabel":
        return None
    weights = class_weights(np.array(facts.class_counts), settings.balance)
    return None if weights is None else tuple(weights.tolist())


def _check(settings: TuneSettings, facts: DataFacts) -> None:
    """Checks settings against each other and against the data, which :func:`topwork.settings.check` cannot do."""
    check(settings)
    rules = [
        (settings.lr_decay is None or ":" not in settings.lr, "--lr-decay needs a single --lr, not LOW:HIGH."),
        (settings.outputs != "binary" or len(facts.class_counts) == 2, "--outputs binary needs exactly two classes."),
        (settings.patience is None or facts.n_valid > 0, "--patience needs validation images."),
        (facts.n_train > 0, "Training needs images."),
    ]
    for good, message in rules:
        if not good:
            raise UsageError(message)


def head_spec(settings: FitSettings) -> HeadSpec:
    """The head that tuning trains.

    Raises:
        UsageError: two kinds at once, or one that a probe does not support.
    """
    if settings.hidden is None and settings.head != "cosine":
        return HeadSpec()
    if settings.mode == "probe":
        raise UsageError(f"--{'hidden' if settings.hidden else 'head cosine'}: needs --mode tune.")
    if settings.hidden is None:
        return HeadSpec("cosine")
    spec = parse_head(settings.hidden)
    if settings.head != "auto" or not spec.hidden:
        raise UsageError("--hidden (widths of hidden layers, such as 256:0.4,128:0.2) cannot be combined with --head.")
    return spec
