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
from topwork.errors import Interrupted, TopworkError, UsageError
from topwork.features.embed import Features
from topwork.features.probe import Probe, fit_probe
from topwork.models.backbone import Backbone, adopt_weights
from topwork.models.head import FeatureTransform, LinearHead
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
    from topwork.training.finetune import facts_of, stage_names, streams_of, tune
    from topwork.training.interruption import Interruption
    from topwork.training.loop import Surroundings
    from topwork.training.recipe import plan

    settings, parts = tuning.settings, tuning.parts
    start = _starting_head(tuning)
    grey = all(sample.mode in ("1", "L", "LA", "I;16") for sample in tuning.manifest.samples)
    facts = facts_of(tuning.labels[parts.train], len(tuning.manifest.classes), len(parts.valid), grey=grey)
    names = stage_names(tuning.backbone.module(len(tuning.manifest.classes)))
    recipe = plan(settings, facts, names, settings.seed)
    train, valid = streams_of(
        tuning.manifest, parts.train, parts.valid, tuning.backbone, recipe, settings.workers, on_progress
    )
    timed, words = _timed(tuning, recipe, facts, names, train, start)
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
        done = tune(tuning.backbone, recipe, train, valid, probe=start, around=around)
    if done.tuned.ending == "interrupted" and interruption.signal is not None:
        raise Interrupted(interruption.signal)
    backbone, head = _adopted(tuning, done.state)
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
    tuning: Tuning, recipe: Recipe, facts: DataFacts, names: list[str], train: Any, start: LinearHead
) -> tuple[Recipe | None, tuple[str, ...]]:
    """Fits the plan into the time budget, where there is one; in auto mode, weighs whether it pays at all."""
    from topwork.models.modules import HeadSpec
    from topwork.training.estimate import estimate, training_rate
    from topwork.training.finetune import make_network
    from topwork.training.recipe import plan

    settings = tuning.settings
    budget = settings.time_budget_seconds
    if settings.mode != "auto" and budget is None:
        return recipe, ()
    rate = training_rate(make_network(tuning.backbone, HeadSpec(), recipe, start), recipe, train)
    recipe = plan(settings, replace(facts, images_per_second=rate), names, settings.seed)
    if settings.mode != "auto":
        return recipe, ()
    chosen = next(trial for trial in tuning.probe.trials if trial.chosen)
    budget_minutes = None if budget is None else budget / 60
    weighed = estimate(chosen.accuracy, chosen.n_images, facts.n_train, recipe, rate, budget_minutes)
    return (recipe if weighed.worth_it else None), (weighed.words,)


def _adopted(tuning: Tuning, state: dict[str, Any]) -> tuple[Backbone, LinearHead]:
    """The tuned weights as a backbone of its own, and its classifier as a head."""
    n_classes = len(tuning.manifest.classes)
    network = tuning.backbone.module(n_classes)
    missing, unexpected = network.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise TopworkError(f"{tuning.backbone.name}: the tuned weights do not fit the network: {missing or unexpected}")
    backbone = adopt_weights(tuning.backbone, network)
    name = backbone.classifier_name
    weight, bias = (state[f"{name}.{key}"].float().numpy() for key in ("weight", "bias"))
    if weight.shape != (n_classes, backbone.n_features):
        raise UsageError(
            f"--backbone {tuning.backbone.name}: its classifier is not one linear layer; topwork cannot tune it."
        )
    n = backbone.n_features
    return backbone, LinearHead(
        FeatureTransform(("last",), "none", np.zeros(n, np.float32), np.ones(n, np.float32)), weight, bias
    )
