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
from topwork.data.samples import one_label_only, rules_of
from topwork.data.split import Split, divided_as, join_groups, leave_out, split, with_valid, without_valid
from topwork.data.transforms import Mirror
from topwork.errors import UsageError
from topwork.features.backbone_selection import Choice, choose, names_of, subsample
from topwork.features.cluster import embedder_on
from topwork.features.duplicates import near_duplicates, near_pairs
from topwork.features.embed import Embedder, Features, embed
from topwork.features.engine import Engine
from topwork.features.probe import Probe, fit_probe
from topwork.features.views import Probed, View, asked_views, buy_views, with_views
from topwork.models.backbone import Backbone, load_backbone
from topwork.models.head import Changes
from topwork.progress import Reporter, Stopwatch
from topwork.run import read_split
from topwork.settings import DataSettings, FitSettings
from topwork.text import count, escape, first_names

MIN_CLASSES = 2
VALID_FRACTION = 0.2


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

    def features_of(self, part: str) -> Features:
        """Features of a part, by row: ``features`` for train, ``answers`` for held-out parts."""
        return self.features if part == "train" or self.answers is None else self.answers

    @property
    def labels(self) -> NDArray[Any]:
        """(N,) class index of every sample; (N, C) 0 or 1 for several labels."""
        return self.manifest.targets


def prepare_data(
    path: str | os.PathLike[str], settings: FitSettings, clock: Stopwatch, reporter: Reporter
) -> PreparedData:
    """Scans, embeds and splits."""
    names = names_of(settings.backbone)
    with clock("backbone"):
        reporter.step("backbone")
        backbones = [_backbone(name, settings, reporter) for name in names]
        backbone = backbones[0]
        embedder = embedder_of(backbone, settings)
        if embedder.engine.note:
            reporter.note(embedder.engine.note)
    with clock("scan_and_embed"):
        reporter.step("scan and embed")
        manifest, features = scan_and_embed(path, settings, embedder, reporter)
    for note in manifest.notes:
        reporter.note(note)
    if settings.split_of is not None:
        manifest = divided_as(manifest, read_split(Path(settings.split_of)))
    with clock("split"):
        near = near_duplicates(manifest, features, embedder) if settings.near_duplicates else None
        groups = join_groups(manifest, near_pairs(near))
        parts = _divided(manifest, settings, groups)
        if manifest.is_train_only and len(parts.test):
            reporter.note(
                f"The data has only a train part: held out {count(len(parts.test), 'image')} of it for testing. To train on all "
                "of them: --test-fraction 0."
            )
        if settings.final_fit == "train+valid" and len(parts.valid):
            reporter.note(f"The {count(len(parts.valid), 'valid image')} added to train (--final-fit train+valid).")
            parts = without_valid(parts, manifest)
        if manifest.multi_label:
            _check_label_sets(manifest, parts, reporter)
        else:
            _check_trainable(manifest, parts, reporter)
    n_near = len(near.pairs) if near else None
    data = PreparedData(settings, embedder.backbone, embedder, manifest, features, groups, parts, n_near)
    return _with_chosen(data, backbones, clock, reporter) if len(backbones) > 1 else data


def _divided(manifest: Manifest, settings: FitSettings, groups: Sequence[int]) -> Split:
    """Train, valid and test. Only tuning needs valid, so a probe has none unless the data or the settings have it."""
    tunes = settings.mode != "probe"
    fraction = settings.valid_fraction
    if fraction is None:
        fraction = VALID_FRACTION if tunes else 0.0
    if settings.leave_out is not None:
        parts = leave_out(manifest, settings.leave_out, fraction, settings.seed, groups)
    else:
        parts = split(manifest, fraction, settings.test_fraction, settings.seed, groups)
    return with_valid(parts, manifest, fraction or VALID_FRACTION, groups) if tunes and not len(parts.valid) else parts


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


def _with_chosen(
    data: PreparedData, backbones: Sequence[Backbone], clock: Stopwatch, reporter: Reporter
) -> PreparedData:
    """The same images and split with the backbone selected by cross-validation on a few training images."""
    settings, manifest = data.settings, data.manifest
    if manifest.multi_label:
        raise one_label_only(f"--backbone {settings.backbone}")
    with clock("compare_backbones"):
        reporter.step("compare backbones")
        rows = subsample(data.labels, data.parts.train, settings.seed)
        some = replace(manifest, samples=tuple(manifest.samples[row] for row in rows.tolist()))
        embedders: dict[str, Embedder] = {data.backbone.name: data.embedder}

        def embedded(backbone: Backbone) -> tuple[Features, Engine]:
            embedder = embedders.setdefault(backbone.name, embedder_of(backbone, settings))
            features = embed(
                backbone, some, embedder=embedder, n_threads=settings.workers, on_progress=reporter.progress
            )  # fmt: skip
            return features, embedder.engine

        groups = np.asarray(data.groups)[rows].tolist()
        choice = choose(backbones, embedded, data.labels[rows], len(manifest.classes), groups, settings.seed)
        reporter.note(choice.words)
    backbone = next(one for one in backbones if one.name == choice.name)
    with clock("scan_and_embed"):
        reporter.step("embed again")
        embedder = embedders[backbone.name]
        features = embed(
            backbone, manifest, embedder=embedder, n_threads=settings.workers, on_progress=reporter.progress
        )  # fmt: skip
    return replace(data, backbone=embedder.backbone, embedder=embedder, features=features, choice=choice)


def embedder_of(backbone: Backbone, settings: FitSettings) -> Embedder:
    """The backbone with its engine and its part of the feature store."""
    return embedder_on(settings, backbone, settings.engine, settings.precision, settings.device)


def with_answers(data: PreparedData, reporter: Reporter) -> PreparedData:
    """The same with f32 features of the held-out images, so that all metrics are those of ``predict``."""
    if data.embedder.engine.precision == "f32":
        return data
    settings = data.settings
    exact = embedder_on(settings, data.backbone, settings.engine, "f32", settings.device)
    rows = np.concatenate([data.parts.valid, data.parts.test]).tolist()
    held_out = replace(data.manifest, samples=tuple(data.manifest.samples[row] for row in rows))
    embed(exact.backbone, held_out, embedder=exact, n_threads=settings.workers, on_progress=reporter.progress)
    return replace(data, backbone=exact.backbone, answers=Features(data.features.hashes, exact.store))


def fitted_probe(data: PreparedData, clock: Stopwatch, reporter: Reporter) -> Probed:
    """The head, fitted with augmented views if requested or if the time budget allows."""
    settings = data.settings

    def fitted(views: Sequence[View]) -> Probe:
        seen = with_views(
            data.manifest, data.features, data.parts.train, data.embedder, views, settings.seed, settings.workers,
            reporter.progress,
        )  # fmt: skip
        return fit_probe(
            seen,
            data.labels,
            len(data.manifest.classes),
            rows=data.parts.train,
            groups=data.groups,
            head="plain" if settings.head == "cosine" else settings.head,
            seed=settings.seed,
            on_progress=reporter.progress,
            balance=settings.balance,
        )

    if settings.augment != "auto":
        return Probed(fitted(views := asked_views(settings.augment, settings.views)), tuple(views), ())
    if settings.mode != "probe" or settings.time_budget_seconds is None:
        return Probed(fitted(()), (), ())
    rate = timing(clock, data.embedder)["images_per_second"]
    left = settings.time_budget_seconds - clock.total
    return buy_views(fitted, data.labels[data.parts.train], rate, left)


def check_classes(path: str | os.PathLike[str], classes: Sequence[str]) -> None:
    """Raises UsageError for fewer classes than a classifier needs."""
    if len(classes) < MIN_CLASSES:
        raise UsageError(
            f"{escape(os.fspath(path))}: only one class: {first_names(classes)}. A classifier needs at least two: one folder per class."
        )


def _check_trainable(manifest: Manifest, parts: Split, reporter: Reporter) -> None:
    check_classes(manifest.root, manifest.classes)
    trained = {manifest.samples[row].label for row in parts.train}
    if len(trained) < MIN_CLASSES:
        raise UsageError(f"{escape(str(manifest.root))}: the train part has images of only {len(trained)} class.")
    untrained = [name for name in manifest.classes if name not in trained]
    _say_untrained(untrained, "predicted", reporter)


def _check_label_sets(manifest: Manifest, parts: Split, reporter: Reporter) -> None:
    """Notes labels that cannot be learned.

    Raises:
        UsageError: every training image has the same labels.
    """
    truth = manifest.label_matrix[parts.train]
    counts = truth.sum(0)
    if not ((counts > 0) & (counts < len(truth))).any():
        raise UsageError(
            f"{escape(str(manifest.root))}: every training image has the same labels, so there is nothing to learn. "
            "(An empty label means that an image has none.)"
        )
    untrained = [name for name, n in zip(manifest.classes, counts.tolist(), strict=True) if not n]
    _say_untrained(untrained, "given", reporter)


def _say_untrained(names: Sequence[str], verb: str, reporter: Reporter) -> None:
    if names:
        some = ", ".join(escape(name) for name in names[:5])
        reporter.note(f"Without a training image, so they can never be {verb} ({len(names)}): {some}.")


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


def timing(clock: Stopwatch, embedder: Embedder) -> dict[str, Any]:
    """Seconds of each step and images per second, as in ``evaluation.json``."""
    seconds = clock.seconds["scan_and_embed"]
    return {
        "seconds": clock.seconds | {"total": clock.total},
        "n_embedded": embedder.n_embedded,
        "images_per_second": round(embedder.n_embedded / seconds, 1) if embedder.n_embedded and seconds else None,
        "engine_images_per_second": (
            round(embedder.n_embedded / embedder.engine_seconds, 1) if embedder.engine_seconds else None
        ),
    }
