"""``topwork adapt``: a new run whose model also works on a new domain, with few labels or none.

``adaptation/guards.py`` decides without labels of the target which predictions to trust. Labels from the target's
folders are used in the report, never to adapt.
"""

from __future__ import annotations

import csv
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from topwork.adaptation.adapted_head import (
    HeldOut,
    Images,
    adapted_classifier,
    adapted_head,
    is_better,
    loss_on_source,
    pseudo_labels,
    score,
    tune_on_both,
    tuned_choice,
)
from topwork.adaptation.align import N_SAMPLE, STYLES, Domains, Ints, Rows, nearest_style
from topwork.adaptation.expected import domains_record, target_figures
from topwork.adaptation.guards import SIGNIFICANCE, Choice, choose, images_to_label
from topwork.commands.assess import evaluate_parts
from topwork.commands.prepare import embedded, scan_and_embed, timing
from topwork.data.images import decode
from topwork.data.listing import ANY_LABEL, is_flat
from topwork.data.manifest import Manifest, read_labels, save_manifest, without_labels
from topwork.data.remote import absolute
from topwork.data.split import Split, split
from topwork.data.transforms import fit_to_input
from topwork.errors import ImageError, Interrupted
from topwork.evaluation.domains import energy_distance
from topwork.evaluation.predictions import UNKNOWN_CLASS, Predictions, labels_for, predict_features, softmax
from topwork.export.runtime import model_embedder
from topwork.features.embed import Embedder, Features, embed_changed
from topwork.features.engine import compiled_form, load_engine
from topwork.files import atomic_file
from topwork.models.classifier import COMPILED, Classifier, find_model, load_classifier
from topwork.progress import Reporter, Steps
from topwork.run import (
    free_run_folder,
    images_of_run,
    provenance,
    read_evaluation,
    read_recipe,
    run_folder,
    save_predictions,
    versions,
    write_json,
    write_run,
)
from topwork.settings import AdaptSettings, DataSettings, check
from topwork.text import Described, first_names, percent

ASK_FILE = "ask.csv"
DEFAULT_PENALTY = 3e-3  # for fine-tuned heads, whose recipe has none
IMAGES_PER_SECOND = 400  # for selecting a method on one slow core; converts a time budget into images
FEWEST_IMAGES, MOST_IMAGES = 400, 4000


@dataclass(frozen=True, eq=False, repr=False)
class AdaptedRun(Described):
    """What ``topwork adapt`` did.

    Attributes:
        record: ``domains.json``: what was chosen and why, both domains before and after, by class, and a map.
        ask_path: the CSV that lists images to label; None if none were asked for.
    """

    folder: Path
    choice: Choice
    evaluation: dict[str, Any]
    record: dict[str, Any]
    ask_path: Path | None
    n_rejected: int
    n_used: int

    def facts(self) -> dict[str, object]:
        """Shown in notebooks."""
        return {
            "Outcome": self.choice.outcome,
            "Reason": self.choice.reason,
            "Predictions changed": self.record["n_changed"],
            "Folder": str(self.folder),
        }

    def as_dict(self) -> dict[str, Any]:
        """What ``adapt --json`` prints."""
        choice, record = self.record["choice"], self.record
        return {
            "run": str(self.folder),
            **{key: choice[key] for key in ("outcome", "method", "reason", "checks", "distance")},
            **{key: self.evaluation.get(key) for key in ("domains", "target", "timing")},
            **{key: record[key] for key in ("predicted", "n_changed", "asked")},
            "ask": str(self.ask_path) if self.ask_path else None,
        }


@dataclass(frozen=True, eq=False)
class Source:
    """The run to adapt, with its images, split, features and labels."""

    run: Path
    classifier: Classifier
    manifest: Manifest
    parts: Split
    features: Features
    labels: Ints

    def held_out(self) -> HeldOut:
        """The valid part, which no head was fitted on."""
        rows = self.parts.valid
        return HeldOut(_rows_for(self.classifier, self.features, rows), self.labels[rows])


@dataclass(frozen=True, eq=False)
class Target:
    """The new domain: images, features, labels given by the user, and labels for the report only (-1: none)."""

    manifest: Manifest
    features: Features
    known: Ints
    truth: Ints
    has_labels: bool


@dataclass(frozen=True, eq=False)
class Adaptation:
    """The features of both domains, and the decision.

    Attributes:
        own, rows: rows of the source and of the target in ``domains``.
        history: one record per epoch if the network was fine-tuned and kept.
    """

    source: Source
    target: Target
    domains: Domains
    own: Ints
    rows: Ints
    choice: Choice
    classifier: Classifier
    embedder: Embedder
    is_tuned: bool = False
    history: tuple[dict[str, Any], ...] = ()


def adapt(
    run: str | os.PathLike[str],
    target: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    settings: AdaptSettings | None = None,
    *,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> AdaptedRun:
    """Writes a new run for both domains; the model stays unchanged unless a better one passes the checks.

    Args:
        run: the run with the model; its manifest lists the source's images.
        target: images of the new domain: a folder (flat, or one folder per class), an archive or a table.
        out: output directory (default: a new ``runs/NAME-2``).

    Raises:
        UsageError: no run, no usable image, labels for images or classes that do not exist.
    """
    settings, steps, run = settings or AdaptSettings(), Steps(reporter), find_model(run).parent
    reporter = steps.reporter
    out = free_run_folder(run, Path.exists) if out is None else out
    check(settings)
    with run_folder(Path(out), overwrite) as folder:
        started = {"path": absolute(target), "adapted_from": str(run.absolute())}
        write_json(folder / "settings.json", started | {"settings": asdict(settings), "versions": versions()})
        with steps("scan_and_embed"):
            source, embedder = _read_source(run, settings, reporter)
            found = _read_target(target, source.classifier, settings, embedder, reporter)
        for note in found.manifest.notes:
            reporter.note(note)
        with steps("adapt"):
            now = _adapted(source, found, embedder, settings, reporter)
        if settings.mode == "tune":
            with steps("tune"):
                now = _fine_tuned(now, settings, reporter)
        asked = (
            now.rows[images_to_label(now.domains, now.choice, settings.ask, settings.seed)] if settings.ask else None
        )
        with steps("evaluate"):
            everything = np.arange(len(found.manifest.samples))
            before = predict_features(source.classifier, found.features, everything, found.truth)
            after = predict_features(now.classifier, now.target.features, everything, found.truth)
            predictions = {
                name: predict_features(now.classifier, now.source.features, rows, source.labels)
                for name, rows in source.parts.parts().items()
            }
            evaluation = evaluate_parts(now.classifier, source.manifest, source.parts, predictions, settings.seed)
            of_source = read_evaluation(run)
            evaluation |= target_figures(before, after, evaluation, of_source, settings.seed)
            record = domains_record(now.choice, found.manifest, before, after, now.domains, now.rows, of_source)
            record["asked"] = None if asked is None else {"n": len(asked), "rows": asked.tolist()}
        with steps("write"):
            origin = provenance(source.manifest, source.parts, evaluation, settings)
            origin |= {"adapted_to": found.manifest.digest, "adaptation": now.choice.method}
            _write(folder, now, replace(now.classifier, provenance=origin), predictions, after)
            ask_path = None if asked is None else _write_ask(folder / ASK_FILE, asked, now, after)
            write_json(folder / "domains.json", record)
        evaluation["timing"] = timing(steps, now.embedder)
        write_json(folder / "evaluation.json", evaluation)
    for note in record["notes"]:
        reporter.note(note)
    n_rejected, n_used = found.manifest.n_failed, len(found.manifest.samples)
    return AdaptedRun(Path(out), now.choice, evaluation, record, ask_path, n_rejected, n_used)


# ---- reading


def _read_source(run: Path, settings: AdaptSettings, reporter: Reporter) -> tuple[Source, Embedder]:
    classifier, manifest = load_classifier(run), images_of_run(run, verb="adapt")
    manifest = replace(manifest, samples=tuple(sample for sample in manifest.samples if sample.part))
    embedder = model_embedder(classifier)
    features, labels = embedded(manifest, embedder, settings, reporter), labels_for(classifier, manifest)
    return Source(run, classifier, manifest, split(manifest, seed=settings.seed), features, labels), embedder


def _read_target(
    path: str | os.PathLike[str],
    classifier: Classifier,
    settings: AdaptSettings,
    embedder: Embedder,
    reporter: Reporter,
) -> Target:
    manifest, features, has_labels = scan_target(path, settings, settings.unlabeled, embedder, reporter)
    nothing = np.full(len(manifest.samples), UNKNOWN_CLASS, np.int64)
    truth = labels_for(classifier, manifest) if has_labels else nothing
    known = nothing if settings.labels is None else read_labels(Path(settings.labels), manifest, classifier.classes)
    return Target(manifest, features, known, truth, has_labels)


def scan_target(
    path: str | os.PathLike[str], settings: DataSettings, is_unlabeled: bool, embedder: Embedder, reporter: Reporter
) -> tuple[Manifest, Features, bool]:
    """Images of a folder with or without class folders, their features, and whether their labels are meaningful."""
    has_no_labels = is_unlabeled or (settings.label_regex is None and is_flat(Path(path)))
    if has_no_labels and settings.label_regex is None:
        settings = replace(settings, label_regex=ANY_LABEL)
    manifest, features = scan_and_embed(path, settings, embedder, reporter)
    return without_labels(manifest) if has_no_labels else manifest, features, not has_no_labels


# ---- adapting


def _adapted(
    source: Source, target: Target, embedder: Embedder, settings: AdaptSettings, reporter: Reporter
) -> Adaptation:
    """The choice and its classifier: the source's classifier unless a better one passes the checks."""
    own, rows = _chosen_rows(source, target, settings)
    domains, old = _domains(source, target, own, rows), source.classifier
    given = softmax(score(old.head, domains.target))
    restyled = _restyled(source, domains, own, embedder, reporter)
    choice = choose(domains, given, seed=settings.seed, restyled=restyled)
    if target.has_labels and (target.truth < 0).all() and not (target.known >= 0).any():
        reason = f"The target's folders ({first_names(target.manifest.classes)}) are not classes of the model. If the folder names are not labels, add --unlabeled."
        choice = replace(choice, outcome="refused", method="none", probabilities=given, reason=reason)
    unchanged = Adaptation(source, target, domains, own, rows, choice, old, embedder)
    if choice.outcome != "adapted":
        if choice.outcome == "refused":
            reporter.note(f"The model was not adapted. {choice.reason}")
        return unchanged
    head = adapted_head(old.head, domains, choice, _penalty_of(source.run))
    loss = loss_on_source(old.head, head, source.held_out())
    if loss is not None:
        reason = f"With the adapted head, {loss}."
        kept = replace(choice, outcome="unchanged", method="none", reason=reason, probabilities=given)
        return replace(unchanged, choice=kept)
    return _calibrated(unchanged, head)


def _restyled(
    source: Source, domains: Domains, own: Ints, embedder: Embedder, reporter: Reporter
) -> tuple[str, Rows] | None:
    """The style nearest to the target, and the restyled training images of the source; None if no style is near."""
    spec, classifier = embedder.spec, source.classifier

    def rows_in(style: str, rows: Ints) -> Rows:
        samples = [source.manifest.samples[row] for row in rows.tolist()]
        files = map(source.manifest.read_unchanged, rows.tolist())
        pixels = (fit_to_input(decode(data, min_side=spec.min_side).pixels, spec) for data in files)
        changed = (STYLES[style](image[None])[0] for image in pixels)
        found = embed_changed(embedder, [s.content_hash for s in samples], changed, style)
        return _rows_for(classifier, found, np.arange(len(rows)))

    if energy_distance(domains.source, domains.target, n_permutations=99).p_value >= 2 * SIGNIFICANCE:
        return None
    some = np.sort(np.random.default_rng(29).permutation(len(own))[:N_SAMPLE])
    try:
        styled = {style: rows_in(style, own[some]) for style in STYLES}
        style = nearest_style(domains.source[some], styled, domains.target)
        if style is None:
            return None
        reporter.step(f"embed as {style}")
        return style, rows_in(style, own)
    except (ImageError, OSError):
        reporter.note("The images of the run can no longer be read, so restyled copies of them were not tried.")
        return None


def _calibrated(now: Adaptation, head: Any) -> Adaptation:
    source, target = now.source, now.target
    last = (source.features.block("last", now.own), target.features.block("last", now.rows))
    held_out = source.held_out()
    return replace(now, classifier=adapted_classifier(source.classifier, head, now.domains, now.choice, held_out, last))


def _fine_tuned(now: Adaptation, settings: AdaptSettings, reporter: Reporter) -> Adaptation:
    """The network fine-tuned on both domains; the previous result, with the reason, if it is not better.

    Raises:
        Interrupted: by a signal during training.
    """
    if now.choice.outcome != "adapted" or now.choice.method == "labels only":
        reporter.note("--mode tune: the network was not fine-tuned, because the head was not adapted either.")
        return now
    tuned, head, history = _train(now, settings, reporter)
    other = _embedded_by(now, tuned, head, settings, reporter)
    probabilities = softmax(score(head, other.domains.target))
    verdict = is_better(now.domains, now.choice, other.domains, probabilities)
    loss = loss_on_source(now.source.classifier.head, head, now.source.held_out(), other.source.held_out())
    if loss is not None or not verdict.is_kept:
        words = f"The fine-tuned network was dropped: {loss or verdict.reason}."
        reporter.note(words)
        checks = now.choice.checks | verdict.checks
        return replace(now, choice=replace(now.choice, reason=f"{now.choice.reason} {words}", checks=checks))
    other = replace(other, choice=tuned_choice(now.choice, probabilities, verdict), history=tuple(history))
    return _calibrated(other, head)


def _train(now: Adaptation, settings: AdaptSettings, reporter: Reporter) -> tuple[Any, Any, list[dict[str, Any]]]:
    """Backbone, head and history after fine-tuning on the source's labels and the target's pseudo-labels."""
    from topwork.training.loop import Interruption, TrainerContext

    source, target = now.source, now.target
    start = adapted_head(source.classifier.head, now.domains, now.choice, _penalty_of(source.run))
    with Interruption() as interruption:
        done = tune_on_both(
            source.classifier.backbone,
            start,
            Images(source.manifest, now.own, now.domains.labels),
            Images(target.manifest, now.rows, pseudo_labels(now.choice, now.domains.known)),
            epochs=settings.epochs,
            seed=settings.seed,
            n_threads=settings.workers,
            context=TrainerContext(reporter=reporter, stop=interruption.stopped),
            on_progress=reporter.progress,
        )
    if done.training.result.ending == "interrupted" and interruption.signal is not None:
        raise Interrupted(interruption.signal)
    return done.backbone, done.head, done.training.result.history


def _embedded_by(now: Adaptation, backbone: Any, head: Any, settings: AdaptSettings, reporter: Reporter) -> Adaptation:
    """The same images embedded by another network."""
    reporter.step("embed again")
    embedder = Embedder(backbone, load_engine(backbone, precision="f32"))
    classifier = replace(now.source.classifier, backbone=backbone, head=head, precision="f32")
    features = embedded(now.source.manifest, embedder, settings, reporter)
    source = replace(now.source, classifier=classifier, features=features)
    target = replace(now.target, features=embedded(now.target.manifest, embedder, settings, reporter))
    domains = _domains(source, target, now.own, now.rows)
    return replace(
        now, source=source, target=target, domains=domains, classifier=classifier, embedder=embedder, is_tuned=True
    )


def _chosen_rows(source: Source, target: Target, settings: AdaptSettings) -> tuple[Ints, Ints]:
    """Rows of the source's train part and of the target to use; includes all images with known labels."""
    rng, budget = np.random.default_rng([settings.seed, 17]), settings.time_budget_seconds
    within = MOST_IMAGES if budget is None else int(budget * IMAGES_PER_SECOND / 2)
    n = min(MOST_IMAGES, max(FEWEST_IMAGES, within))

    def some(rows: Ints) -> Ints:
        return rows if len(rows) <= n else np.sort(rng.choice(rows, n, replace=False))

    own = some(source.parts.train)
    rows = some(np.arange(len(target.truth)))
    return own, np.union1d(rows, np.flatnonzero(target.known >= 0)).astype(np.int64)


def _domains(source: Source, target: Target, own: Ints, rows: Ints) -> Domains:
    classifier = source.classifier
    return Domains(
        _rows_for(classifier, source.features, own),
        source.labels[own],
        _rows_for(classifier, target.features, rows),
        target.known[rows],
        len(classifier.classes),
    )


def _rows_for(classifier: Classifier, features: Features, rows: Ints) -> Rows:
    """(N, D) features of some images for the head of the classifier."""
    transform = classifier.head.transform
    if not len(rows):
        return np.empty((0, len(transform.mean)), np.float32)
    return transform.apply(features.blocks(transform.blocks, rows))


def _penalty_of(run: Path) -> float:
    """The penalty that the run's probe was fitted with."""
    head = read_recipe(run)[0].get("head") or {}
    return float(head.get("penalty") or DEFAULT_PENALTY)


# ---- evaluating and writing


def _write_ask(path: Path, asked: Ints, now: Adaptation, after: Predictions) -> Path:
    """The CSV to fill in, with an empty column ``label``."""
    votes = dict(zip(now.rows.tolist(), now.choice.votes, strict=True))
    classes, samples = after.classes, now.target.manifest.samples
    with (
        atomic_file(path) as partial,
        open(partial, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(("path", "label", "suggested", "probability", "reason"))
        for row in asked.tolist():
            best = np.argsort(-votes[row])[:2]
            reason = ", ".join(
                f"{percent(votes[row][c], 0)} of methods: {classes[c]}" for c in best if votes[row][c] > 0
            )
            predicted = classes[after.predicted[row]]
            writer.writerow((samples[row].path, "", predicted, f"{after.confidence[row]:.3f}", reason))
    return path


def _write(
    folder: Path, now: Adaptation, classifier: Classifier, predictions: dict[str, Predictions], after: Predictions
) -> None:
    source, target = now.source, now.target
    recipe, history = read_recipe(source.run)
    adapted = {"from": str(source.run.absolute()), "to": str(target.manifest.root), **now.choice.as_dict()}
    recipe |= {"adapted": adapted | {"network_moved": now.is_tuned}, "temperature": classifier.temperature}
    # the source's network has its compiled form next to it; a fine-tuned one has it in the cache
    own = classifier.backbone.folder / COMPILED[0]
    form = own if own.is_file() else compiled_form(classifier.backbone)
    compiled, history = form if now.embedder.engine.kind == "openvino" else None, [*history, *now.history]
    write_run(folder, source.manifest, source.parts, classifier, predictions, recipe, history, compiled)
    save_manifest(target.manifest, folder / "target.parquet")
    save_predictions({"target": after}, target.manifest, folder / "target_predictions.parquet")
    shutil.copytree(find_model(source.run), folder / "source_model", dirs_exist_ok=True)
    insights = source.run / "insights.json"
    if insights.is_file() and not now.is_tuned:  # they are about the source's network
        shutil.copyfile(insights, folder / insights.name)
