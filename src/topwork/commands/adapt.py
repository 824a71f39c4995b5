"""``topwork adapt``: a new run whose model also answers for a new domain, with few labels of it or none.

Scan and embed both domains, choose a method without labels of the target (``adaptation/guards.py``), distil one
head for both, judge both. Labels found in the target's folders are used to report, never to adapt.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topwork.adaptation.active_learning import Asked, images_to_label
from topwork.adaptation.adapted_head import adapted_classifier, adapted_head, loss_on_source, score
from topwork.adaptation.align import Domains
from topwork.adaptation.guards import Choice, choose
from topwork.commands.adapt_moved import Adaptation, moved
from topwork.commands.adapt_record import domains_record, target_figures
from topwork.commands.adapt_sides import Source, Target, chosen_rows, domains_of, held_out, penalty_of
from topwork.commands.add_class import stored_run
from topwork.commands.steps import (
    evaluate_parts,
    model_embedder,
    predict_features,
    provenance,
    rules_of,
    scan_and_embed,
    timing,
)
from topwork.data.manifest import Manifest, save_manifest
from topwork.data.split import split, split_record
from topwork.data.unlabeled import COLUMNS, read_labels, rules_without_labels
from topwork.errors import UsageError
from topwork.evaluation.predictions import Predictions, softmax
from topwork.features.embed import Embedder, embed
from topwork.features.engine import compiled_form
from topwork.files import atomic_file
from topwork.models.classifier import COMPILED, Classifier, find_model, save_classifier
from topwork.progress import Reporter, Stopwatch
from topwork.run import read_evaluation, run_folder, save_predictions, versions, write_json
from topwork.settings import AdaptSettings, as_dict
from topwork.text import escape

ASK_FILE = "ask.csv"


@dataclass(frozen=True, eq=False)
class AdaptedRun:
    """What ``topwork adapt`` did.

    Attributes:
        record: ``domains.json``: what was chosen and why, both domains before and after, by class, and plots.
        ask_path: the CSV that names images to label; None where none were asked for.
    """

    folder: Path
    choice: Choice
    evaluation: dict[str, Any]
    record: dict[str, Any]
    ask_path: Path | None
    n_rejected: int
    n_used: int

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


def adapt(
    run: str | os.PathLike[str],
    target: str | os.PathLike[str],
    out: str | os.PathLike[str],
    settings: AdaptSettings | None = None,
    *,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> AdaptedRun:
    """A new run that knows both domains; the model stays as it is where nothing better can be believed.

    Args:
        run: the run that holds the model; its manifest names the source's images.
        target: images of the new domain: a folder (flat, or one folder a class), an archive or a table.

    Raises:
        UsageError: no run, no usable image, labels for images or classes that are not there.
    """
    settings, reporter, clock = settings or AdaptSettings(), reporter or Reporter(), Stopwatch()
    budget = settings.time_budget_seconds
    folder, run = Path(out), Path(run)
    with run_folder(folder, overwrite):
        started = {"path": str(Path(target).absolute()), "adapted_from": str(run.absolute())}
        write_json(folder / "settings.json", started | {"settings": as_dict(settings), "versions": versions()})
        with clock("scan_and_embed"):
            reporter.step("scan and embed")
            source, embedder = _source(run, settings)
            found = _target(target, source.classifier, settings, embedder, reporter)
        for note in found.manifest.notes:
            reporter.note(note)
        with clock("adapt"):
            reporter.step("adapt")
            own, rows = chosen_rows(source, found, budget, settings.seed)
            domains = domains_of(source, found, own, rows)
            choice, classifier = _adapted(source, found, domains, (own, rows), settings, reporter)
            now = Adaptation(source, found, domains, own, rows, choice, classifier, embedder)
        everything = np.arange(len(found.manifest.samples))
        before = predict_features(source.classifier, found.features, everything, found.truth)
        if settings.mode != "features":
            with clock("move"):
                reporter.step("move")
                now = moved(now, settings, reporter)
        choice, classifier = now.choice, now.classifier
        asked = None
        if settings.ask:
            with clock("ask"):
                reporter.step("ask")
                asked = images_to_label(now.domains, choice, settings.ask, settings.seed)
                asked = replace(asked, rows=rows[asked.rows])
        with clock("evaluate"):
            reporter.step("evaluate")
            predictions = _source_predictions(now.source, classifier)
            evaluation = evaluate_parts(classifier, source.manifest, source.parts, predictions, settings.seed)
            after = predict_features(classifier, now.target.features, everything, found.truth)
            if found.is_labeled:
                evaluation |= target_figures(before, after, evaluation, read_evaluation(run), settings.seed)
            record = domains_record(
                choice, found.manifest, before, after, now.domains, rows, evaluation, read_evaluation(run)
            )
        with clock("write"):
            reporter.step("write")
            record["asked"] = _asked_record(asked)
            classifier = replace(
                classifier,
                provenance=provenance(source.manifest, source.parts, evaluation, settings)
                | {"adapted_to": found.manifest.digest, "adaptation": choice.method},
            )
            _write(folder, now, classifier, predictions, after)
            ask_path = _write_ask(folder / ASK_FILE, asked, found.manifest, after, choice, rows) if asked else None
            write_json(folder / "domains.json", record)
        evaluation["timing"] = timing(clock, now.embedder)
        write_json(folder / "evaluation.json", evaluation)
    for note in record["notes"]:
        reporter.note(note)
    n_rejected, n_used = found.manifest.n_failed, len(found.manifest.samples)
    return AdaptedRun(folder, choice, evaluation, record, ask_path, n_rejected, n_used)


# ---- reading


def _source(run: Path, settings: AdaptSettings) -> tuple[Source, Embedder]:
    classifier, manifest, part_of = stored_run(run, "adapt")
    if manifest.multi_label:
        raise UsageError(f"{escape(str(run))}: images with several labels cannot be adapted yet.")
    samples = tuple(
        replace(sample, part=part_of[sample.content_hash])
        for sample in manifest.samples
        if sample.content_hash in part_of
    )
    manifest = replace(manifest, samples=samples)
    embedder = model_embedder(classifier)
    features = embed(classifier.backbone, manifest, embedder=embedder, n_threads=settings.workers)
    index = {name: number for number, name in enumerate(classifier.classes)}
    labels = np.array([index[sample.label] for sample in samples], np.int64)
    return Source(run, classifier, manifest, split(manifest, seed=settings.seed), features, labels), embedder


def _target(
    path: str | os.PathLike[str],
    classifier: Classifier,
    settings: AdaptSettings,
    embedder: Embedder,
    reporter: Reporter,
) -> Target:
    rules, has_no_labels = rules_without_labels(path, rules_of(settings), settings.unlabeled)
    manifest, features = scan_and_embed(path, replace(settings, label_regex=rules.label_regex), embedder, reporter)
    if has_no_labels:
        manifest = replace(
            manifest, samples=tuple(replace(s, label="?") for s in manifest.samples), classes=("?",), notes=()
        )
    index = {name: number for number, name in enumerate(classifier.classes)}
    truth = np.array([-1 if has_no_labels else index.get(s.label, -1) for s in manifest.samples], np.int64)
    known = np.full(len(truth), -1, np.int64)
    if settings.labels is not None:
        known = read_labels(Path(settings.labels), manifest, classifier.classes)
    return Target(manifest, features, known, truth, not has_no_labels)


# ---- adapting


def _adapted(
    source: Source,
    target: Target,
    domains: Domains,
    rows: tuple[NDArray[np.int64], NDArray[np.int64]],
    settings: AdaptSettings,
    reporter: Reporter,
) -> tuple[Choice, Classifier]:
    """The choice and its classifier, which is the source's own unless something better can be believed."""
    old = source.classifier
    given = softmax(score(old.head, domains.target))
    choice = choose(domains, given, seed=settings.seed)
    if target.is_labeled and (target.truth < 0).all() and not (target.known >= 0).any():
        names = ", ".join(escape(name) for name in target.manifest.classes[:5])
        choice = replace(
            choice,
            outcome="refused",
            method="none",
            probabilities=given,
            reason=f"the target's folders ({names}) are none of the model's classes; where they are no classes, add "
            "--unlabeled.",
        )
    if choice.outcome != "adapted" and choice.method != "labels only":
        if choice.outcome == "refused":
            reporter.note(f"Nothing was relabeled: {choice.reason}")
        return choice, old
    kept_out = held_out(source)
    head = adapted_head(old.head, domains, choice, penalty_of(source.run))
    loss = loss_on_source(old.head, head, kept_out)
    if loss is not None:
        reason = f"the adapted head {loss}."
        return replace(choice, outcome="unchanged", method="none", reason=reason, probabilities=given), old
    last = (source.features.block("last", rows[0]), target.features.block("last", rows[1]))
    return choice, adapted_classifier(old, head, domains, choice, kept_out, last)


def _source_predictions(source: Source, classifier: Classifier) -> dict[str, Predictions]:
    return {
        name: predict_features(classifier, source.features, rows, source.labels)
        for name, rows in source.parts.parts().items()
    }


# ---- writing


def _asked_record(asked: Asked | None) -> dict[str, Any] | None:
    if asked is None:
        return None
    gains = {"gain": asked.gain, "gain_low": asked.gain_low, "gain_high": asked.gain_high}
    return {"n": len(asked.rows), "rows": asked.rows.tolist(), **gains}


def _write_ask(
    path: Path, asked: Asked, manifest: Manifest, after: Predictions, choice: Choice, rows: NDArray[np.int64]
) -> Path:
    """The CSV to fill in; the column label is empty."""
    votes = dict(zip(rows.tolist(), choice.consensus, strict=True))
    with (
        atomic_file(path) as partial,
        open(partial, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for row in asked.rows.tolist():
            names = np.argsort(-votes[row])[:2]
            second = f" or {after.classes[names[1]]}" if votes[row][names[1]] > 0 else ""
            reason = f"the methods say {after.classes[names[0]]}{second}"
            predicted = after.classes[after.predicted[row]]
            writer.writerow((manifest.samples[row].path, "", predicted, f"{after.confidence[row]:.3f}", reason))
    return path


def _write(
    folder: Path, now: Adaptation, classifier: Classifier, predictions: dict[str, Predictions], after: Predictions
) -> None:
    from topwork.export.card import model_card

    source, target = now.source, now.target
    recipe = json.loads((source.run / "recipe.json").read_text())
    adapted = {"from": str(source.run.absolute()), "to": str(target.manifest.root), **now.choice.as_dict()}
    recipe["adapted"] = adapted | {"network_moved": now.is_moved}
    recipe["temperature"] = classifier.temperature
    save_manifest(source.manifest, folder / "manifest.parquet")
    save_manifest(target.manifest, folder / "target.parquet")
    write_json(folder / "split.json", split_record(source.parts, source.manifest))
    write_json(folder / "recipe.json", recipe)
    with atomic_file(folder / "history.jsonl") as partial:
        lines = [json.dumps(record) + "\n" for record in now.history]
        partial.write_text((source.run / "history.jsonl").read_text() + "".join(lines))
    save_predictions(predictions, source.manifest, folder / "predictions.parquet")
    save_predictions({"target": after}, target.manifest, folder / "target_predictions.parquet")
    shutil.copytree(find_model(source.run), folder / "source_model", dirs_exist_ok=True)
    # the source's own network comes with its compiled form; a moved one has it in the cache
    own = classifier.backbone.folder / COMPILED[0]
    form = own if own.is_file() else compiled_form(classifier.backbone)
    compiled = form if now.embedder.engine.kind == "openvino" else None
    save_classifier(classifier, folder / "model", compiled, model_card(classifier))
    insights = source.run / "insights.json"
    if insights.is_file() and not now.is_moved:  # they are about the network that the source's model has
        shutil.copyfile(insights, folder / insights.name)
