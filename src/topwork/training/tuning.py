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

import numpy as np
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
    from topwork.training.recipe import DataFacts, Recipe
    from topwork.training.streams import ImageStream

CHECKPOINTS = "checkpoint"


@dataclass(frozen=True)
class TunedClassifier:
    """A tuned network as backbone and head.

    Attributes:
        recipe: of the tuning, as plain JSON values.
        history: one record an epoch.
        stages: (stage, parameters, trainable, rate) of the network.
        words: sentences on what was done and why.
    """

    backbone: Backbone
    head: LinearHead
    recipe: dict[str, Any]
    history: list[dict[str, Any]]
    stages: list[dict[str, Any]]
    n_parameters: int
    n_trainable: int
    words: tuple[str, ...]


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
    def labels(self) -> NDArray[np.int64]:
        """Class index of every sample."""
        return np.asarray(self.manifest.labels, np.int64)

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
        return self.spec.kind == "linear"


def prepare(tuning: Tuning, on_progress: Callable[[int, int], None]) -> Ready:
    """Plans and decodes.

    Raises:
        UsageError: settings that contradict each other or the data.
    """
    from topwork.training.finetune import facts_of, streams_of
    from topwork.training.recipe import plan

    settings, parts, manifest = tuning.settings, tuning.parts, tuning.manifest
    start, spec = _starting_head(tuning), head_spec(settings)
    grey = all(sample.mode in ("1", "L", "LA", "I;16") for sample in manifest.samples)
    facts = facts_of(tuning.labels[parts.train], len(manifest.classes), len(parts.valid), grey=grey)
    recipe = plan(settings, facts, tuning.stage_names, settings.seed, head_is_fitted=spec.kind == "linear")
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
    from topwork.training.adoption import adopt
    from topwork.training.finetune import tune
    from topwork.training.interruption import Interruption
    from topwork.training.loop import Surroundings

    ready = prepare(tuning, on_progress)
    recipe, words = _timed(tuning, ready)
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
    backbone, head = adopt(tuning.backbone, done.state, ready.spec, len(tuning.manifest.classes))
    told = (done.tuned.message, done.chosen.reason, *done.tuned.notes, *recipe.notes)
    return TunedClassifier(
        backbone=backbone,
        head=head,
        recipe=recipe.as_dict() | {"tried": [vars(mixture) for mixture in done.chosen.tried]},
        history=done.tuned.history,
        stages=[vars(row) for row in done.stages],
        n_parameters=done.n_parameters,
        n_trainable=done.n_trainable,
        words=(*words, *told),
    )


def _starting_head(tuning: Tuning) -> LinearHead:
    """The head that tuning starts from must be one linear layer; an extended probe is fitted again as a plain one."""
    if tuning.probe.head.kind == "plain":
        return tuning.probe.head
    rows = tuning.parts.train
    n_classes = len(tuning.manifest.classes)
    seed = tuning.settings.seed
    return fit_probe(tuning.features, tuning.labels, n_classes, rows=rows, head="plain", seed=seed).head


def _timed(tuning: Tuning, ready: Ready) -> tuple[Recipe | None, tuple[str, ...]]:
    """Fits the plan into the time budget, where there is one; in auto mode, weighs whether it pays at all."""
    from topwork.training.estimate import estimate, training_rate
    from topwork.training.finetune import make_network
    from topwork.training.recipe import plan

    settings, facts = tuning.settings, ready.facts
    budget = settings.time_budget_seconds
    if settings.mode != "auto" and budget is None:
        return ready.recipe, ()
    network = make_network(tuning.backbone, ready.spec, ready.recipe, ready.start)
    rate = training_rate(network, ready.recipe, ready.train)
    measured = replace(facts, images_per_second=rate)
    recipe = plan(settings, measured, tuning.stage_names, settings.seed, head_is_fitted=ready.head_is_fitted)
    if settings.mode != "auto":
        return recipe, ()
    chosen = next(trial for trial in tuning.probe.trials if trial.chosen)
    budget_minutes = None if budget is None else budget / 60
    weighed = estimate(chosen.accuracy, chosen.n_images, facts.n_train, recipe, rate, budget_minutes)
    return (recipe if weighed.worth_it else None), (weighed.words,)


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
