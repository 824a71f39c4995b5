"""``topwork fit``: from a folder of images to a run directory.

``fit`` reads from top to bottom: scan and embed in one pass, split, probe, fine-tune if requested, calibrate, evaluate,
write. Each step is one public function of the layer below.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topwork.commands.assess import assess, check_labels, check_positive, zero_shot_accuracy
from topwork.commands.prepare import (
    PreparedData,
    check_classes,
    embedded,
    embedder_of,
    fitted_probe,
    prepare_data,
    timing,
    with_answers,
)
from topwork.commands.scan import Understood, understood
from topwork.data.augment import pipeline
from topwork.data.corrections import read_corrections
from topwork.data.remote import absolute, is_url
from topwork.data.split import without_valid
from topwork.evaluation.analysis import AnalysisInputs, analyze
from topwork.features.backbone_selection import names_of
from topwork.features.engine import best_device, compiled_form
from topwork.features.feature_maps import OpenNetwork, open_network
from topwork.features.logistic import few_threads
from topwork.features.probe import Probe
from topwork.features.views import Probed
from topwork.models.backbone import check_backbone
from topwork.models.classifier import Classifier
from topwork.models.text_tower import text_model, zero_shot_head
from topwork.progress import Reporter, Steps, tracking
from topwork.run import (
    Run,
    asked,
    check_free,
    free_run_folder,
    is_finished,
    provenance,
    read_split,
    replacement_of,
    run_folder,
    write_json,
    write_run,
)
from topwork.settings import FitSettings, check, is_launched, with_options
from topwork.text import count, duration
from topwork.training.recipe import head_spec

if TYPE_CHECKING:
    from topwork.training.finetune import TunedClassifier

RESERVED = 0.15  # of the time budget, for evaluation, insights and the report
VALID_OF_TUNING = "selecting the epoch, the weights, the temperature and the thresholds, so its scores are optimistic"


@dataclass(frozen=True, eq=False, repr=False)
class Fitted(Run):
    """A run that was just fitted, with its probe."""

    probe: Probe


def fit(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    settings: FitSettings | None = None,
    *,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    **options: Any,
) -> Fitted:
    """Trains, evaluates and writes a classifier for the images in ``path``.

    Args:
        out: output directory (default: ``runs/NAME``, or the next free ``runs/NAME-2``).
        overwrite: replace a finished run in ``out``.
        options: settings by name, such as ``mode="tune", epochs=3``: the options of ``topwork fit``.

    Raises:
        UsageError: nothing to train on, ``out`` is taken, or there is no such setting.
        TopworkError: a step failed; embedded images stay in the cache.
    """
    settings, steps = with_options(settings or FitSettings(), options), Steps(reporter)
    folder = free_run_folder(path) if out is None else Path(out)
    check_settings(settings)
    wanted = asked(path, settings)
    with run_folder(folder, overwrite, wanted) as work:
        write_json(work / "settings.json", wanted)
        data = prepare_data(path, settings, steps)
        check_positive(settings, data.manifest.classes)
        opened = _opening(data)
        by_names = None
        if settings.zero_shot is not None:
            with steps.timed("zero_shot"):
                by_names = zero_shot_head(data.backbone, data.manifest.classes, settings.zero_shot)
        if data.choice is not None:  # a resumed run must not choose again: measured speeds vary
            write_json(work / "settings.json", wanted | {"backbones": asdict(data.choice)})
        with steps("probe"):
            probed = fitted_probe(data, steps)
        tuned, words = _tune(data, probed.probe, work, steps)
        if tuned is None and len(data.parts.valid) and not _has_own_valid(data):
            words.append(
                f"Trained the probe again, also on {count(len(data.parts.valid), 'image')} held out for fine-tuning."
            )
            steps.reporter.note(words[-1])
            data = replace(data, parts=without_valid(data.parts, data.manifest))
            with steps("probe"):
                probed = fitted_probe(data, steps)
        seen = with_answers(data if tuned is None else _embedded_again(data, tuned, steps), steps.reporter)
        with few_threads(data.n_values):
            assessed = assess(seen, probed.probe, tuned, steps)
        recipe = _recipe(data, probed, tuned, assessed.classifier) | ({"words": words} if words else {})
        evaluation = assessed.evaluation
        if tuned is not None:
            evaluation |= {"n_parameters": tuned.training.n_parameters, "n_trainable": tuned.training.n_trainable}
        if by_names is not None:
            evaluation |= {"zero_shot": zero_shot_accuracy(data, by_names, evaluation)}
        origin = provenance(data.manifest, data.parts, evaluation, settings)
        classifier = replace(assessed.classifier, provenance=origin)
        with steps("write"):
            history = [*map(asdict, probed.probe.trials), *(tuned.training.result.history if tuned else [])]
            compiled = compiled_form(classifier.backbone) if data.embedder.engine.kind == "openvino" else None
            write_run(work, data.manifest, data.parts, classifier, assessed.predictions, recipe, history, compiled)
        if not data.manifest.multi_label:
            with steps("insights"), few_threads(data.n_values):
                rate = timing(steps, data.embedder)["images_per_second"]
                opener = partial(open_network, classifier.backbone) if opened is None else opened.result
                inputs = AnalysisInputs(
                    data.manifest, data.parts, data.groups, probed.probe, data.features, assessed.classifier,
                    seen.features, opener, assessed.predictions, evaluation, is_tuned=tuned is not None, embedding_rate=rate,
                    path=absolute(path), out=str(folder.absolute()), settings=asdict(settings), seed=settings.seed,
                )  # fmt: skip
                write_json(work / "insights.json", analyze(inputs))
        evaluation |= {"timing": timing(steps, data.embedder)}
        write_json(work / "evaluation.json", evaluation)
    return Fitted(
        folder, data.manifest, data.parts, classifier, assessed.predictions, evaluation, recipe, history, probed.probe
    )


def check_settings(settings: FitSettings) -> None:
    """Rejects impossible settings before any work; nothing is downloaded.

    Raises:
        UsageError: invalid values, values without effect, or a missing package, file or backbone.
    """
    check(settings)
    head_spec(settings)
    best_device(settings.device)
    pipeline("none" if settings.augment == "auto" else settings.augment)
    check_labels(settings)
    if settings.zero_shot is not None:
        for name in names_of(settings.backbone):
            text_model(name)
    if settings.split_of is not None:
        read_split(Path(settings.split_of))
    if settings.corrections is not None:
        read_corrections(settings.corrections)


def dry_run(path: str | os.PathLike[str], out: str | None, settings: FitSettings, *, overwrite: bool) -> Understood:
    """How the images would be read, after the checks of :func:`fit`; nothing is written, and no image is opened.

    Raises:
        UsageError: as ``fit``.
    """
    check_settings(settings)
    for name in names_of(settings.backbone):
        check_backbone(name)
    if out is not None and not is_url(out) and not overwrite:
        check_free(Path(out), overwrite, asked(path, settings))
    found = understood(path, settings)
    check_positive(settings, list(found.classes))
    if not settings.multi_label:
        check_classes(path, list(found.classes), found.rejects, found.notes)
    return found


def follow(path: str | os.PathLike[str], out: str | os.PathLike[str], settings: FitSettings) -> None:
    """Runs one of the other processes in distributed training, which writes nothing.

    Raises:
        UsageError: nothing is fine-tuned, so there is nothing to distribute.
    """
    if settings.mode == "probe":
        return
    from topwork.training.distributed import processes
    from topwork.training.finetune import plan_tuning, tune_classifier

    steps, folder = Steps(Reporter()), Path(out)
    work = replacement_of(folder) if is_finished(folder) else folder
    processes().wait()
    data = prepare_data(path, settings, steps)
    probed = fitted_probe(data, steps)
    planned = plan_tuning(data.backbone, data.manifest, data.features, data.parts, probed.probe, settings)
    tune_classifier(planned, work, steps.reporter, steps.reporter.note)


# ---- the steps, in their order


def _has_own_valid(data: PreparedData) -> bool:
    """Whether the data or the settings ask for a valid part, rather than fine-tuning."""
    return data.settings.valid_fraction is not None or any(sample.part == "valid" for sample in data.manifest.samples)


def _opening(data: PreparedData) -> Future[OpenNetwork] | None:
    """The network of the heatmaps, compiled while the head is fitted; None if the network may change or none is needed."""
    if data.settings.mode != "probe" or data.manifest.multi_label:
        return None
    pool = ThreadPoolExecutor(1)
    opened = pool.submit(open_network, data.backbone)
    pool.shutdown(wait=False)
    return opened


def _tune(data: PreparedData, probe: Probe, folder: Path, steps: Steps) -> tuple[TunedClassifier | None, list[str]]:
    """The tuned network, or None if nothing is tuned or the probe is kept; and the decision in words."""
    settings, words = data.settings, []

    def say(text: str) -> None:
        words.append(text)
        steps.reporter.note(text)

    if settings.mode == "probe":
        return None, words
    from topwork.training.distributed import processes
    from topwork.training.finetune import plan_tuning, tune_classifier
    from topwork.training.selection import select_model

    with steps("tune"):
        if is_launched():
            processes().wait()
        within = _within_what_is_left(data, steps, say)
        with tracking(settings.track, folder, asdict(settings)) as track:
            on_progress = steps.reporter.progress
            planned = plan_tuning(data.backbone, data.manifest, data.features, data.parts, probe, within, on_progress)
            tuned = tune_classifier(planned, folder, steps.reporter, say, track)
    if tuned is None or settings.hidden is not None or settings.head == "cosine":  # a requested head is always kept
        return tuned, words
    with steps("embed_again"):
        valid, embedder = data.parts.valid, embedder_of(tuned.backbone, settings)
        features = embedded(data.manifest.take(valid.tolist()), embedder, settings, steps.reporter)
    before = probe.head.logits(data.features.blocks(probe.head.transform.blocks, valid))
    after = tuned.head.logits(features.blocks(tuned.head.transform.blocks))
    selection = select_model(before, after, data.labels[valid], asked_for=settings.mode == "tune")
    say(selection.message)
    return (tuned if selection.keeps_tuned else None), words


def _within_what_is_left(data: PreparedData, steps: Steps, say: Callable[[str], None]) -> FitSettings:
    """The settings with what is left of the time budget for tuning, reserving time to embed again."""
    settings, budget = data.settings, data.settings.time_budget_seconds
    if budget is None:
        return settings
    rate = timing(steps, data.embedder)["images_per_second"]
    reserve = RESERVED * budget + (len(data.manifest.samples) / rate if rate else steps.seconds["scan_and_embed"])
    left = budget - steps.total - reserve
    if left <= 0:
        say(
            f"--time-budget {settings.time_budget} is too short: reading, embedding and the probe took "
            f"{duration(steps.total)}, and evaluation needs about {duration(reserve)}. Fine-tuning will be as short as possible."
        )
    return replace(settings, time_budget=f"{max(left, 1.0):.0f}s")


def _embedded_again(data: PreparedData, tuned: TunedClassifier, steps: Steps) -> PreparedData:
    """The same images with the tuned network and its features."""
    with steps("embed_again"):
        embedder = embedder_of(tuned.backbone, data.settings)
        features = embedded(data.manifest, embedder, data.settings, steps.reporter)
    return replace(data, backbone=embedder.backbone, embedder=embedder, features=features)


def _recipe(
    data: PreparedData, probed: Probed, tuned: TunedClassifier | None, classifier: Classifier
) -> dict[str, Any]:
    """The settings used, with every "auto" resolved."""
    probe, parts, engine = probed.probe, data.parts, data.embedder.engine
    chosen = next(trial for trial in probe.trials if trial.chosen)
    unused = "evaluation only, so its scores are unbiased" if len(parts.valid) else "nothing, because there is none"
    head = {
        "kind": classifier.head.kind,
        "candidate": chosen.candidate,
        "penalty": chosen.penalty,
        "n_features": int(classifier.head.weight.shape[1]),
        "reason": probe.reason,
    }
    recipe = {
        "mode": "probe",
        "backbone": classifier.backbone.name,
        "architecture": classifier.backbone.architecture,
        "preprocessing": classifier.backbone.spec.as_dict(),
        "engine": engine.kind,
        "precision": engine.precision,
        "head": head,
        "cross_validation": {
            "n_folds": chosen.n_folds,
            "n_images": chosen.n_images,
            "accuracy": chosen.accuracy,
            "standard_error": chosen.standard_error,
        },
        "class_weights": None if probe.class_weights is None else probe.class_weights.tolist(),
        "temperature": classifier.temperature,
        "temperature_fitted_on": "out-of-fold logits of train",
        "valid_used_for": unused,
        "seed": parts.seed,
        "augment": probed.views[0].pipeline.name if probed.views else "none",
        "views": [view.name for view in probed.views],
        "views_tried": list(probed.tried),
        "balance": data.settings.balance,
        "near_duplicates": data.n_near,
    }
    if data.manifest.multi_label:
        recipe |= {"multi_label": True, "thresholds": classifier.thresholds["labels"]}
    if data.choice is not None:
        recipe |= {"backbones": asdict(data.choice)}
    if tuned is not None:
        done = tuned.training
        tuning = asdict(done.recipe) | {"tried": [vars(candidate) for candidate in done.selected.tried]}
        recipe |= {"mode": "tune", "tuning": tuning, "stages": [vars(row) for row in done.stages], "probe": head}
        recipe["head"] = head | {
            "candidate": f"fine-tuned with the network, {done.head}",
            "penalty": None,
            "reason": "Fine-tuned with the network, starting from the head of the probe (below).",
        }
        recipe |= {"temperature_fitted_on": "valid", "valid_used_for": VALID_OF_TUNING}
    return recipe
