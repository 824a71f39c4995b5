"""The first steps of every fit: scan and embed the images, split them, and fit a probe.

In: a path and settings. Out: :class:`PreparedData`, and from it a :class:`topwork.features.views.Probed`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topwork.data.augment import Flip, pipeline
from topwork.data.manifest import Manifest, scan
from topwork.data.samples import Reject, one_label_only, rules_of
from topwork.data.split import (
    Split,
    divided_as,
    join_groups,
    leave_out,
    n_train_of,
    split,
    with_valid,
    without_valid,
)
from topwork.data.transforms import Mirror
from topwork.errors import UsageError
from topwork.features.backbone_selection import Choice, choose, names_of, subsample
from topwork.features.cluster import embedder_on
from topwork.features.duplicates import near_duplicates, near_pairs
from topwork.features.embed import Embedder, Features, embed
from topwork.features.engine import Engine
from topwork.features.logistic import few_threads
from topwork.features.probe import Probe, fit_probe
from topwork.features.views import Probed, View, asked_views, buy_views, with_views
from topwork.models.backbone import Backbone, load_backbone
from topwork.models.head import Changes
from topwork.progress import Reporter, Steps
from topwork.run import read_split
from topwork.settings import DataSettings, FitSettings
from topwork.text import count, escape, first_names

MIN_CLASSES = 2
VALID_FRACTION = 0.2
UNDIVIDED = "there are too few images or groups per class to hold any out"


@dataclass(frozen=True)
class PreparedData:
    """The prepared data, before training.

    Attributes:
        features: of all images, in the precision of training.
        answers: of the held-out images, in f32, if ``features`` are not; see :func:`with_answers`.
    """

    settings: FitSettings
    backbone: Backbone
    embedder: Embedder
    manifest: Manifest
    features: Features
    groups: Sequence[int]
    parts: Split
    n_near: int | None
    choice: Choice | None = None
    answers: Features | None = None

    @property
    def n_values(self) -> int:
        """Size of the problem, for :func:`topwork.features.logistic.few_threads`."""
        return len(self.manifest.samples) * self.backbone.n_features

    def features_of(self, part: str) -> Features:
        """Features of a part, by row: ``features`` for train, ``answers`` for held-out parts."""
        return self.features if part == "train" or self.answers is None else self.answers

    @property
    def labels(self) -> NDArray[Any]:
        """(N,) class index of every sample; (N, C) 0 or 1 for several labels."""
        return self.manifest.targets


def prepare_data(path: str | os.PathLike[str], settings: FitSettings, steps: Steps) -> PreparedData:
    """Scans, embeds and splits."""
    names, reporter = names_of(settings.backbone), steps.reporter
    with steps("backbone"):
        backbones = [_backbone(name, settings, reporter) for name in names]
        embedder = embedder_of(backbones[0], settings)
        if embedder.engine.note:
            reporter.note(embedder.engine.note)
    with steps("scan_and_embed"):
        manifest, features = scan_and_embed(path, settings, embedder, reporter)
    for note in manifest.notes:
        reporter.note(note)
    if settings.split_of is not None:
        manifest = divided_as(manifest, read_split(Path(settings.split_of)))
    with steps.timed("split"):
        near = near_duplicates(manifest, features, embedder) if settings.near_duplicates else None
        groups = join_groups(manifest, near_pairs(near))
        parts = _divided(manifest, settings, groups, reporter)
        _check_trainable(manifest, parts, reporter)
    n_near = len(near.pairs) if near else None
    data = PreparedData(settings, embedder.backbone, embedder, manifest, features, groups, parts, n_near)
    return _with_chosen(data, backbones, steps) if len(backbones) > 1 else data


def _divided(manifest: Manifest, settings: FitSettings, groups: Sequence[int], reporter: Reporter) -> Split:
    """Train, valid and test. Only tuning needs valid, so a probe has none unless the data or the settings have it."""
    tunes, fraction = settings.mode != "probe", settings.valid_fraction
    if fraction is None:
        fraction = VALID_FRACTION if tunes else 0.0
    if settings.leave_out is not None:
        parts = leave_out(manifest, settings.leave_out, fraction, settings.seed, groups)
    else:
        parts = split(manifest, fraction, settings.test_fraction, settings.seed, groups)
    if tunes and not len(parts.valid):
        parts = with_valid(parts, manifest, fraction or VALID_FRACTION, groups)
    if manifest.is_train_only and len(parts.test):
        reporter.note(
            f"The data has only a train part: held out {count(len(parts.test), 'image')} of it for testing. To train on all "
            "of them: --test-fraction 0."
        )
    if settings.final_fit == "train+valid" and len(parts.valid):
        reporter.note(f"The {count(len(parts.valid), 'valid image')} added to train (--final-fit train+valid).")
        parts = without_valid(parts, manifest)
    if settings.mode == "tune" and not len(parts.valid):
        raise UsageError(
            f"{escape(str(manifest.root))}: fine-tuning needs validation images, but {UNDIVIDED}. Use --mode probe."
        )
    if settings.test_fraction and not parts.given and not len(parts.test):
        reporter.note(f"No image is held out for testing: {UNDIVIDED}.")
    return parts


def _backbone(name: str, settings: FitSettings, reporter: Reporter) -> Backbone:
    backbone = load_backbone(name, on_note=reporter.note).changed(Changes(settings.pooling, settings.drop_hidden))
    fit = None if settings.resize == "auto" else settings.resize
    return backbone.with_spec(
        height=settings.size, width=settings.size, fit=fit, mirror=_mirror(settings), bands=settings.bands
    )


def _mirror(settings: FitSettings) -> Mirror:
    """For ``--tta``: the positions that the augmentation makes equivalent; by default a horizontal flip."""
    if not settings.tta:
        return "none"
    steps = pipeline(settings.augment).steps if settings.augment != "auto" else ()
    return "both" if Flip(vertical=True) in steps else "horizontal"


def _with_chosen(data: PreparedData, backbones: Sequence[Backbone], steps: Steps) -> PreparedData:
    """The same images and split with the backbone selected by cross-validation on a few training images."""
    settings, manifest, reporter = data.settings, data.manifest, steps.reporter
    if manifest.multi_label:
        raise one_label_only(f"--backbone {settings.backbone}")
    with steps("compare_backbones"):
        rows = subsample(data.labels, data.parts.train, settings.seed)
        some = manifest.take(rows.tolist())
        embedders: dict[str, Embedder] = {data.backbone.name: data.embedder}

        def embedded_by(backbone: Backbone) -> tuple[Features, Engine]:
            embedder = embedders.setdefault(backbone.name, embedder_of(backbone, settings))
            return embedded(some, embedder, settings, reporter), embedder.engine

        groups = np.asarray(data.groups)[rows].tolist()
        choice = choose(backbones, embedded_by, data.labels[rows], len(manifest.classes), groups, settings.seed)
        reporter.note(choice.words)
    reporter.step("embed again")
    with steps.timed("scan_and_embed"):
        embedder = embedders[choice.name]
        features = embedded(manifest, embedder, settings, reporter)
    return replace(data, backbone=embedder.backbone, embedder=embedder, features=features, choice=choice)


def embedder_of(backbone: Backbone, settings: FitSettings) -> Embedder:
    """The backbone with its engine and its part of the feature store."""
    return embedder_on(settings, backbone, settings.engine, settings.precision, settings.device)


def embedded(manifest: Manifest, embedder: Embedder, settings: DataSettings, reporter: Reporter) -> Features:
    """Features of the images, from the store where they are known."""
    n_threads, on_progress = settings.workers, reporter.progress
    return embed(embedder.backbone, manifest, embedder=embedder, n_threads=n_threads, on_progress=on_progress)


def with_answers(data: PreparedData, reporter: Reporter) -> PreparedData:
    """The same with f32 features of the held-out images, so that all metrics are those of ``predict``."""
    if data.embedder.engine.precision == "f32":
        return data
    settings = data.settings
    exact = embedder_on(settings, data.backbone, settings.engine, "f32", settings.device)
    embedded(data.manifest.take([*data.parts.valid, *data.parts.test]), exact, settings, reporter)
    return replace(data, backbone=exact.backbone, answers=Features(data.features.hashes, exact.store))


def fitted_probe(data: PreparedData, steps: Steps) -> Probed:
    """The head, fitted with augmented views if requested or if the time budget allows."""
    settings, on_progress = data.settings, steps.reporter.progress

    def fitted(views: Sequence[View]) -> Probe:
        seen = with_views(
            data.manifest, data.features, data.parts.train, data.embedder, views, settings.seed, settings.workers,
            on_progress,
        )  # fmt: skip
        with few_threads(data.n_values):
            return fit_probe(
                seen,
                data.labels,
                len(data.manifest.classes),
                rows=data.parts.train,
                groups=data.groups,
                head="plain" if settings.head == "cosine" else settings.head,
                seed=settings.seed,
                on_progress=on_progress,
                balance=settings.balance,
            )

    if settings.augment != "auto":
        return Probed(fitted(views := asked_views(settings.augment, settings.views)), tuple(views), ())
    if settings.mode != "probe" or settings.time_budget_seconds is None:
        return Probed(fitted(()), (), ())
    rate = timing(steps, data.embedder)["images_per_second"]
    left = settings.time_budget_seconds - steps.total
    return buy_views(fitted, data.labels[data.parts.train], rate, left)


def check_classes(
    path: str | os.PathLike[str], classes: Sequence[str], rejects: Sequence[Reject], notes: Sequence[str]
) -> None:
    """Raises UsageError for fewer classes than a classifier needs."""
    if len(classes) < MIN_CLASSES:
        lost = [f"{escape(reject.path)}: {reject.reason}" for reject in rejects if not reject.expected]
        why = f" Not used: {count(len(lost), 'file')}, such as {lost[0]}." if lost else ""
        why += next((f" {note}" for note in notes if note.startswith("Tables here")), "")
        raise UsageError(
            f"{escape(os.fspath(path))}: only one class: {first_names(classes)}.{why} A classifier needs at least two: one folder per class, or "
            "labels in a table or in the file names (--label-regex)."
        )


def _check_trainable(manifest: Manifest, parts: Split, reporter: Reporter) -> None:
    """Notes classes that cannot be learned.

    Raises:
        UsageError: there is nothing to learn.
    """
    where, n_train = escape(str(manifest.root)), n_train_of(manifest, parts)
    trained = [name for name, n in n_train.items() if n]
    if not manifest.multi_label:
        check_classes(manifest.root, manifest.classes, manifest.rejects, manifest.notes)
        if len(trained) < MIN_CLASSES:
            raise UsageError(f"{where}: the train part has images of only {len(trained)} class.")
    elif all(n_train[name] == len(parts.train) for name in trained):
        raise UsageError(
            f"{where}: every training image has the same labels, so there is nothing to learn. "
            "(An empty label means that an image has none.)"
        )
    untrained = [name for name, n in n_train.items() if not n]
    if untrained:
        verb, some = "given" if manifest.multi_label else "predicted", ", ".join(map(escape, untrained[:5]))
        reporter.note(f"Without a training image, so they can never be {verb} ({len(untrained)}): {some}.")


def scan_and_embed(
    path: str | os.PathLike[str], settings: DataSettings, embedder: Embedder, reporter: Reporter
) -> tuple[Manifest, Features]:
    """One pass over the pixels; resumes after an interruption."""
    try:
        manifest = scan(
            path,
            visitor=embedder,
            n_threads=settings.workers,
            on_progress=reporter.progress,
            rules=rules_of(settings, embedder.backbone.spec.bands),
            load=embedder.load,
        )
    finally:
        embedder.flush()
    return manifest, embed(embedder.backbone, manifest, embedder=embedder, n_threads=settings.workers)


def timing(steps: Steps, embedder: Embedder) -> dict[str, Any]:
    """Seconds of each step and images per second, as in ``evaluation.json``."""
    seconds = steps.seconds["scan_and_embed"]
    return {
        "seconds": steps.seconds | {"total": steps.total},
        "n_embedded": embedder.n_embedded,
        "images_per_second": round(embedder.n_embedded / seconds, 1) if embedder.n_embedded and seconds else None,
        "engine_images_per_second": (
            round(embedder.n_embedded / embedder.engine_seconds, 1) if embedder.engine_seconds else None
        ),
    }
