"""Fine-tuning inside a run: from the probe to a classifier whose network has moved.

In: what ``run.fit`` has at that point (manifest, split, probe) and settings. Out: :class:`TunedClassifier`: a backbone
with the tuned weights, prepared like any other, so that engine, store, model folder and exports need to know nothing of
tuning; its head; and the records of the training. What is done is decided in ``training/recipe.py``, how in
``training/loop.py``. Auto mode weighs what tuning may add against its time and may leave the probe as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from topwork.data.manifest import Manifest
from topwork.data.split import Split
from topwork.errors import Interrupted, UsageError
from topwork.features.embed import Features
from topwork.features.probe import Probe, fit_probe
from topwork.models.backbone import Backbone
from topwork.models.head import HeadSpec, LinearHead, parse_head
from topwork.settings import FitSettings

if TYPE_CHECKING:
    from topwork.training.batches import ImageStream
    from topwork.training.recipe import DataFacts, Recipe

CHECKPOINTS = "checkpoint"
ENOUGH_EPOCHS = 6  # with fewer for everything, the upper stages alone are looked at
LEAST_EPOCHS = 3  # with fewer, auto does not begin
TAIL_STAGES, TAIL_VIEWS = 2, 4


@dataclass(frozen=True)
class TunedClassifier:
    """A tuned network as backbone and head.

    Attributes:
        trained_head: what was trained as the head, in the words of ``--hidden``.
        recipe: of the tuning, as plain JSON values.
        history: one record an epoch.
        stages: (stage, parameters, trainable, rate) of the network.
    """

    backbone: Backbone
    head: LinearHead
    trained_head: str
    recipe: dict[str, Any]
    history: list[dict[str, Any]]
    stages: list[dict[str, Any]]
    n_parameters: int
    n_trainable: int


@dataclass(frozen=True)
class Tuning:
    """What tuning needs from the run so far."""

    backbone: Backbone
    manifest: Manifest
    features: Features
    parts: Split
    probe: Probe
    settings: FitSettings
    folder: Path | None = None

    @property
    def labels(self) -> NDArray[Any]:
        """(N,) class index of every sample; (N, C) which classes it has, where it may have several."""
        return self.manifest.targets

    @property
    def stage_names(self) -> list[str]:
        """The stages that a plan gives rates to, the classifier last."""
        from topwork.training.finetune import stage_names

        return stage_names(self.backbone.skeleton(len(self.manifest.classes)))


@dataclass(frozen=True)
class Ready:
    """What training starts from: the recipe, the head, the decoded images."""

    recipe: Recipe
    spec: HeadSpec
    start: LinearHead
    facts: DataFacts
    train: ImageStream
    valid: ImageStream | None

    @property
    def head_is_fitted(self) -> bool:
        """Whether the head starts from the probe's."""
        return self.spec.starts_from_probe


def prepare(tuning: Tuning, on_progress: Callable[[int, int], None]) -> Ready:
    """Plans and decodes.

    Raises:
        UsageError: settings that contradict each other or the data.
    """
    from topwork.training.finetune import facts_of, streams_of
    from topwork.training.recipe import plan

    settings, parts, manifest = tuning.settings, tuning.parts, tuning.manifest
    start, spec = _starting_head(tuning)
    gray = all(sample.mode in ("1", "L", "LA", "I;16") for sample in manifest.samples)
    facts = facts_of(tuning.labels[parts.train], len(manifest.classes), len(parts.valid), gray=gray)
    recipe = plan(settings, facts, tuning.stage_names, settings.seed, head_is_fitted=spec.starts_from_probe)
    train, valid = streams_of(
        manifest, parts.train, parts.valid, tuning.backbone, recipe, settings.workers, on_progress
    )  # fmt: skip
    return Ready(recipe, spec, start, facts, train, valid)


def tune_classifier(
    tuning: Tuning,
    on_progress: Callable[[int, int], None],
    on_epoch: Callable[[dict[str, Any]], None],
    say: Callable[[str], None],
    on_stages: Callable[[list[dict[str, Any]]], None] | None = None,
) -> TunedClassifier | None:
    """Tunes the network, or returns None where auto mode finds that it would not pay; ``say`` hears the words.

    Raises:
        UsageError: settings that contradict each other or the data.
        TopworkError: training failed, with the cause; the last checkpoint is kept.
        Interrupted: a signal came; a checkpoint was saved, and resuming continues from it.
    """
    from topwork.training.distributed import processes
    from topwork.training.finetune import tune
    from topwork.training.interruption import Interruption
    from topwork.training.loop import Surroundings

    ready = prepare(tuning, on_progress)
    recipe, words = processes().agree(_timed(tuning, ready))  # rates differ between processes
    for sentence in words:
        say(sentence)
    if recipe is None:
        return None
    folder = tuning.folder / CHECKPOINTS if tuning.folder is not None else None
    if folder is not None:
        folder.mkdir(exist_ok=True)
    with Interruption() as interruption:
        around = Surroundings(
            folder=folder, resume=True, on_stages=on_stages, on_epoch=on_epoch, on_progress=on_progress,
            stop=interruption.stopped,
        )  # fmt: skip
        done = tune(
            tuning.backbone, recipe, ready.train, ready.valid, head=ready.spec, probe=ready.start, around=around
        )  # fmt: skip
    if done.tuned.ending == "interrupted" and interruption.signal is not None:
        raise Interrupted(interruption.signal)
    backbone, head = done.backbone_and_head()
    for sentence in (done.tuned.message, done.chosen.reason, *done.tuned.notes, *recipe.notes):
        say(sentence)
    return TunedClassifier(
        backbone=backbone,
        head=head,
        trained_head=str(ready.spec),
        recipe=recipe.as_dict() | {"tried": [vars(mixture) for mixture in done.chosen.tried]},
        history=done.tuned.history,
        stages=[vars(row) for row in done.stages],
        n_parameters=done.n_parameters,
        n_trainable=done.n_trainable,
    )


def _starting_head(tuning: Tuning) -> tuple[LinearHead, HeadSpec]:
    """What tuning starts from and what it trains; where an extended probe cannot be kept, a plain one is fitted."""
    from topwork.training.finetune import trained_from

    probe, spec = tuning.probe.head, head_spec(tuning.settings)
    if spec == HeadSpec():
        spec = trained_from(probe, tuning.settings)
    if probe.kind == "plain" or spec.kind == "extended":
        return probe, spec
    rows = tuning.parts.train
    n_classes = len(tuning.manifest.classes)
    seed = tuning.settings.seed
    return fit_probe(tuning.features, tuning.labels, n_classes, rows=rows, head="plain", seed=seed).head, spec


@dataclass(frozen=True)
class _Plan:
    """A recipe that fits into the time there is, and the rate it was planned with."""

    recipe: Recipe
    images_per_second: float
    before_seconds: float
    words: tuple[str, ...] = ()


def _timed(tuning: Tuning, ready: Ready) -> tuple[Recipe | None, tuple[str, ...]]:
    """Fits the plan into the time there is; in auto mode, weighs whether it pays at all."""
    from topwork.training.estimate import estimate

    settings = tuning.settings
    budget = settings.time_budget_seconds
    if settings.mode != "auto" and budget is None:
        return ready.recipe, ()
    planned = _fitted_plan(tuning, ready)
    if settings.mode != "auto":
        return planned.recipe, planned.words
    if planned.recipe.n_epochs < min(LEAST_EPOCHS, ready.recipe.n_epochs):
        fits = _epochs(planned.recipe.n_epochs)
        return None, (f"Only {fits} would fit into the time there is, too little to learn from: not tuning.",)
    chosen = next(trial for trial in tuning.probe.trials if trial.chosen)
    weighed = estimate(
        chosen.accuracy, chosen.n_images, ready.facts.n_train, planned.recipe, planned.images_per_second,
        None if budget is None else budget / 60, planned.before_seconds,
    )  # fmt: skip
    return (planned.recipe if weighed.worth_it else None), (*planned.words, weighed.words)


def _fitted_plan(tuning: Tuning, ready: Ready) -> _Plan:
    """Everything, if it gets enough epochs; else the last stages from cached activations, if those get more."""
    from topwork.training.estimate import DEFAULT_MINUTES, tail_rate, training_rate
    from topwork.training.finetune import make_network
    from topwork.training.recipe import plan

    settings = tuning.settings
    seconds = settings.time_budget_seconds or 60 * DEFAULT_MINUTES
    within = replace(settings, time_budget=f"{seconds:g}s")
    rate = training_rate(
        make_network(tuning.backbone, ready.spec, ready.recipe, ready.start), ready.recipe, ready.train
    )

    def fitted(settings: FitSettings, rate: float, before: float = 0.0) -> Recipe:
        left = replace(settings, time_budget=f"{max(1.0, seconds - before):g}s")
        facts = replace(ready.facts, images_per_second=rate)
        return plan(left, facts, tuning.stage_names, settings.seed, head_is_fitted=ready.head_is_fitted)

    whole = _Plan(fitted(within, rate), rate, 0.0)
    if whole.recipe.n_epochs >= min(ENOUGH_EPOCHS, ready.recipe.n_epochs) or settings.strategy != "auto":
        return whole
    upper = replace(within, strategy="last", last_stages=TAIL_STAGES, tail_views=settings.tail_views or TAIL_VIEWS)
    try:
        n_views = TAIL_VIEWS * ready.facts.n_train + ready.facts.n_valid
        recipe = plan(upper, ready.facts, tuning.stage_names, settings.seed, head_is_fitted=ready.head_is_fitted)
        network = make_network(tuning.backbone, ready.spec, recipe, ready.start)
        views_per_second, rate = tail_rate(network, recipe, ready.train)
        before = n_views / views_per_second
        tail = _Plan(fitted(upper, rate, before), rate, before)
    except UsageError:  # too few stages, or a network that cannot be cut
        return whole
    if tail.recipe.n_epochs <= whole.recipe.n_epochs:
        return whole
    words = (
        f"In {seconds / 60:.0f} min everything would get {_epochs(whole.recipe.n_epochs)} here; the last {TAIL_STAGES} stages "
        f"get {_epochs(tail.recipe.n_epochs)} from cached activations, so only those move."
    )
    return replace(tail, words=(words,))


def _epochs(n: int) -> str:
    return f"{n} epoch" if n == 1 else f"{n} epochs"


def head_spec(settings: FitSettings) -> HeadSpec:
    """The head that tuning trains.

    Raises:
        UsageError: two kinds at once, or one that a probe cannot have.
    """
    if settings.hidden is None and settings.head != "cosine":
        return HeadSpec()
    if settings.mode == "probe":
        option = "--hidden" if settings.hidden is not None else "--head cosine"
        raise UsageError(f"{option}: a head that has to be trained needs --mode tune.")
    if settings.hidden is None:
        return HeadSpec("cosine")
    spec = parse_head(settings.hidden)
    if settings.head != "auto" or not spec.hidden:
        raise UsageError(
            "--hidden gives the widths of hidden layers, such as 256:0.4,128:0.2, and goes without --head."
        )
    return spec
