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
    folder: Path

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class index of every sample."""
        return np.asarray(self.manifest.labels, np.int64)


def tune_classifier(
    tuning: Tuning,
    on_progress: Callable[[int, int], None],
    on_epoch: Callable[[dict[str, Any]], None],
    say: Callable[[str], None],
) -> TunedClassifier | None:
    """Tunes the network, or returns None where auto mode finds that it would not pay; ``say`` hears the words.

    Raises:
        UsageError: settings that contradict each other or the data.
        TopworkError: training failed, with the cause; the last checkpoint is kept.
        Interrupted: a signal came; a checkpoint was saved, and resuming continues from it.
    """
    from topwork.training.adoption import adopt
    from topwork.training.finetune import facts_of, stage_names, streams_of, tune
    from topwork.training.interruption import Interruption
    from topwork.training.loop import Surroundings
    from topwork.training.recipe import plan

    settings, parts = tuning.settings, tuning.parts
    start, spec = _starting_head(tuning), head_spec(settings)
    grey = all(sample.mode in ("1", "L", "LA", "I;16") for sample in tuning.manifest.samples)
    facts = facts_of(tuning.labels[parts.train], len(tuning.manifest.classes), len(parts.valid), grey=grey)
    names = stage_names(tuning.backbone.module(len(tuning.manifest.classes)))
    recipe = plan(settings, facts, names, settings.seed, head_is_fitted=spec.kind == "linear")
    train, valid = streams_of(
        tuning.manifest, parts.train, parts.valid, tuning.backbone, recipe, settings.workers, on_progress
    )
    timed, words = _timed(tuning, recipe, facts, names, train, start, spec)
    for sentence in words:
        say(sentence)
    if timed is None:
        return None
    recipe = timed
    folder = tuning.folder / CHECKPOINTS
    folder.mkdir(exist_ok=True)
    with Interruption() as interruption:
        around = Surroundings(
            folder=folder, resume=True, on_epoch=on_epoch, on_progress=on_progress, stop=interruption.stopped
        )
        done = tune(tuning.backbone, recipe, train, valid, head=spec, probe=start, around=around)
    if done.tuned.ending == "interrupted" and interruption.signal is not None:
        raise Interrupted(interruption.signal)
    backbone, head = adopt(tuning.backbone, done.state, spec, len(tuning.manifest.classes))
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


def _timed(
    tuning: Tuning,
    recipe: Recipe,
    facts: DataFacts,
    names: list[str],
    train: Any,
    start: LinearHead,
    spec: HeadSpec,
) -> tuple[Recipe | None, tuple[str, ...]]:
    """Fits the plan into the time budget, where there is one; in auto mode, weighs whether it pays at all."""
    from topwork.training.estimate import estimate, training_rate
    from topwork.training.finetune import make_network
    from topwork.training.recipe import plan

    settings = tuning.settings
    budget = settings.time_budget_seconds
    if settings.mode != "auto" and budget is None:
        return recipe, ()
    rate = training_rate(make_network(tuning.backbone, spec, recipe, start), recipe, train)
    measured = replace(facts, images_per_second=rate)
    recipe = plan(settings, measured, names, settings.seed, head_is_fitted=spec.kind == "linear")
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
