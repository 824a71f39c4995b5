"""Training: fine-tuning curves, trained layers, and the classifiers tried. Settings: requested and used, and commands."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from topwork.blocks import Beside, Block, Cell, Chart, Command, Facts, Fold, Series, Share, Stack, Table, Text
from topwork.report.pictures import Album
from topwork.report.run_data import Record
from topwork.report.sections.data import PART_NAMES
from topwork.settings import fit_command, quote
from topwork.text import count, decimal, duration, escape

MAX_ROWS = 500  # of trials
VISIBLE = 0.05  # of the height of a chart
STEP_NAMES = {"scan_and_embed": "read and embed"}
CHOSEN = {
    "plain": "Used the simple classifier; nothing more complex was clearly better in cross-validation.",
    "extended": "Used an extended classifier, which was clearly better in cross-validation than the simple one.",
}


def training(record: Record, _album: Album) -> list[Block]:
    """Fine-tuning first, if any; the search for the classifier behind a fold."""
    curves, kind = epoch_charts(record.history), (record.recipe.get("head") or {}).get("kind", "")
    decided = [str(text) for text in record.recipe.get("words", [])] or [CHOSEN.get(kind, "")]
    blocks: list[Block] = [Text(escape(text[:1].upper() + text[1:])) for text in decided if text]
    if curves:
        blocks.append(Beside(tuple([chart] for chart in curves)))
    if record.recipe.get("stages"):
        blocks.append(_stages(record.recipe["stages"]))
    return blocks + _search(record)


def _stages(stages: Sequence[dict[str, Any]]) -> Fold:
    """Trained layers with their peak rates; with LoRA, the parameters of the adapters."""
    rows = tuple(
        (
            escape(str(row["stage"])),
            row["n_parameters"],
            row.get("n_trained", row["n_parameters"] if row["trainable"] else 0),
            f"{row['rate']:.1e}" if row["rate"] else None,
        )
        for row in stages
    )
    columns = ("Stage", "Parameters", "Trained", "Peak learning rate")
    return Fold("Trainable layers", [Table("Trainable layers", columns, rows, heading=False)])


# ---- the search


def _search(record: Record) -> list[Block]:
    trials = [line for line in record.history if "candidate" in line]
    if not trials:
        return []
    best = _best(trials)
    rows = tuple(_trial_row(trial) for trial in best)
    columns = ("Features", "Accuracy (± standard error)", "Cross-entropy", "Regularization")
    note = f"{trials[0]['n_folds']}-fold cross-validation on {count(trials[0]['n_images'], 'training image')}, each at its best regularization."  # fmt: skip
    blocks: list[Block] = [Table("Classifiers", columns, rows, note, heading=False, chosen=(0,) if best[0]["chosen"] else ())]  # fmt: skip
    charts = trial_charts(trials)
    if charts:
        blocks.append(Beside(tuple([chart] for chart in charts)))
    if len(trials) > len(best):
        blocks.append(
            Table("All trials", columns, tuple(_trial_row(trial) for trial in trials[:MAX_ROWS]), is_sortable=True)
        )
    reason = str((record.recipe.get("head") or {}).get("reason", ""))
    if reason:
        blocks.append(Text(escape(reason[:1].upper() + reason[1:]), "small"))
    return [Fold(f"Classifiers tried: {count(len(trials), 'setting')}", blocks)]


def _best(trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each candidate at its best penalty; the chosen one first."""
    best: dict[str, dict[str, Any]] = {}
    for trial in trials:
        old = best.get(trial["candidate"])
        if old is None or (trial["chosen"], -trial["cross_entropy"]) > (old["chosen"], -old["cross_entropy"]):
            best[trial["candidate"]] = trial
    return sorted(best.values(), key=lambda trial: (not trial["chosen"], trial["cross_entropy"]))


def _trial_row(trial: dict[str, Any]) -> tuple[Any, ...]:
    name = escape(str(trial["candidate"])) + ("" if trial["plain"] else " (extended)")
    error = f"{Share(trial['accuracy'])} ± {100 * trial['standard_error']:.1f}"
    return name, error, decimal(trial["cross_entropy"]), float(trial["penalty"])


def trial_charts(trials: Sequence[dict[str, Any]]) -> list[Chart]:
    """Accuracy and cross-entropy by penalty, one line per candidate; nothing for a single trial."""
    if len({trial["penalty"] for trial in trials}) < 2:
        return []
    return [
        Chart(title, "regularization", label, tuple(_trial_series(trials, key)), "log", y_is_share=key == "accuracy")
        for title, key, label in (
            ("Accuracy in cross-validation", "accuracy", "accuracy"),
            ("Cross-entropy in cross-validation", "cross_entropy", "cross-entropy"),
        )
    ]


def _trial_series(trials: Sequence[dict[str, Any]], key: str) -> list[Series]:
    by_candidate: dict[str, list[dict[str, Any]]] = {}
    for trial in trials:
        by_candidate.setdefault(trial["candidate"], []).append(trial)
    series, color = [], 1
    for candidate, tried in by_candidate.items():
        chosen = next((trial for trial in tried if trial["chosen"]), None)
        color += chosen is None
        points = tuple(sorted((float(trial["penalty"]), float(trial[key])) for trial in tried))
        mark = (float(chosen["penalty"]), float(chosen[key])) if chosen else None
        series.append(Series(escape(candidate), points, mark=mark, color=1 if chosen else color, is_strong=chosen is not None))  # fmt: skip
    return sorted(series, key=lambda one: one.is_strong)  # the chosen one is drawn last, on top


# ---- epochs


def epoch_charts(history: Sequence[dict[str, Any]]) -> list[Chart]:
    """Curves of fine-tuning: losses, accuracy and learning rate, if recorded.

    Args:
        history: records with ``epoch`` and any of ``train_loss``, ``valid_loss``, ``valid_calibrated_loss``,
            ``valid_accuracy``, ``rate``; records without ``epoch`` are skipped.
    """
    charts = []
    for title, names, label in (
        ("Loss", ("train_loss", "valid_loss", "valid_calibrated_loss"), "cross-entropy"),
        ("Accuracy on valid", ("valid_accuracy",), "accuracy"),
        ("Learning rate", ("rate",), "learning rate"),
    ):
        series = [_epoch_series(history, name, number) for number, name in enumerate(names, start=1)]
        if title == "Learning rate":
            series = _step_series(history) or series
        drawn = tuple(one for one in series if one.points)
        if drawn:
            charts.append(Chart(title, "epoch", label, drawn, y_is_share=names[0] == "valid_accuracy"))
    return charts


def _epoch_series(history: Sequence[dict[str, Any]], name: str, color: int) -> Series:
    points = [(float(r["epoch"]), float(r[name])) for r in history if "epoch" in r and r.get(name) is not None]
    finite = tuple(point for point in points if np.isfinite(point).all())
    return Series(name.replace("_", " "), finite, color=color, is_strong=name.startswith("valid"))


def _step_series(history: Sequence[dict[str, Any]]) -> list[Series]:
    """The learning rate by step, for the stages with the highest and the lowest rate.

    Records hold ``curve``: (position in epochs, loss, factor on the rates), and ``rates``: the peak rate of each stage.
    """
    peaks = {stage: rate for record in history for stage, rate in record.get("rates", {}).items() if rate}
    if not peaks:
        return []
    highest, lowest = (pick(peaks, key=lambda stage: peaks[stage]) for pick in (max, min))
    # invisible at a hundredth of the axis; the table of layers has its rate
    ends = dict.fromkeys([highest, lowest] if peaks[lowest] > VISIBLE * peaks[highest] else [highest])
    series = []
    for number, stage in enumerate(ends, start=1):
        points = tuple(
            (float(position), factor * record["rates"][stage])
            for record in history
            for position, _, factor in record.get("curve", [])
            if record["rates"].get(stage) is not None
        )
        series.append(Series(escape(stage), points, color=number, is_strong=number == 1))
    return [one for one in series if one.points]


# ---- settings
def settings(record: Record, _album: Album) -> list[Block]:
    """Commands first; the details behind folds."""
    versions = Beside(([_times(record)], [_versions(record)]))
    if record.is_evaluation:
        command = record.settings.get("command")
        again = _titled("Run it again", " ".join(quote(str(word)) for word in command)) if command else []
        return [*again, Fold("Time and versions", [versions, _identity(record)])]
    model = str(record.folder / "model")
    requested = Table("Requested and used", ("Setting", "Requested", "Used"), tuple(_requested(record)), heading=False, text_columns=(1, 2))  # fmt: skip
    return [
        *_titled("Predict with this model", f"topwork predict {quote(str(record.folder))} IMAGES --out answers.csv"),
        *_titled("Predict in Python", python_code(model)),
        *_titled("Run it again", repeat_command(record)),
        Fold("Settings: requested and used", [requested]),
        Fold("Time and versions", [versions, *_embedded(record), _identity(record)]),
        Fold("settings.json and recipe.json", [
            Command(json.dumps(values, indent=1), name)
            for name, values in (("settings.json", record.settings), ("recipe.json", record.recipe))
        ]),
    ]  # fmt: skip


def _titled(title: str, text: str) -> list[Block]:
    return [Text(title, "small"), Command(text, title)]


def repeat_command(record: Record) -> str:
    """The command that makes the same run in a folder next to this one."""
    path = str(record.settings.get("path", record.manifest.root))
    return fit_command(path, f"{record.folder}-again", record.settings.get("settings", {}))


def python_code(model: str) -> str:
    """How to predict with the model in Python."""
    return (
        "from topwork import Predictor\n\n"
        f"predictor = Predictor({ascii(model) if not model.isprintable() else repr(model)})\n"
        'for answer in predictor.predict(["image.jpg"]):\n'
        "    print(answer.label, answer.probability)"
    )


def _requested(record: Record) -> list[tuple[str, str, str]]:
    """Name, requested, used; a dash if it is not a setting."""
    asked, recipe = record.settings.get("settings", {}), record.recipe
    head, spec = recipe.get("head", {}), recipe.get("preprocessing", {})
    penalty = "" if head.get("penalty") is None else f", regularization {head['penalty']}"
    n_part = {part: int((record.part_of == part).sum()) for part in PART_NAMES}
    given = bool(record.split.get("given"))
    fractions = f"valid {asked['valid_fraction']}, test {asked['test_fraction']}" if "test_fraction" in asked else None
    resize = asked.get("resize", asked.get("fit"))
    rows: list[tuple[str, Any, Any]] = [
        ("Backbone", asked.get("backbone"), f"{recipe.get('backbone')} ({recipe.get('architecture')})"),
        ("Mode", asked.get("mode"), recipe.get("mode")),
        ("Classifier", asked.get("head"), f"{head.get('kind')}: {head.get('candidate')}{penalty}"),
        ("Input size", asked.get("size"), f"{spec.get('width')} × {spec.get('height')} px"),
        ("Resize", resize, f"{spec.get('fit')}, {spec.get('interpolation')}"),
        ("Split", "given by the data" if given else fractions, ", ".join(f"{k} {n:,}" for k, n in n_part.items() if n)),
        ("Class balance", asked.get("balance"), "by class size" if recipe.get("class_weights") else "none"),
        ("Precision", asked.get("precision"), ", ".join(str(recipe[key]) for key in ("precision", "engine") if recipe.get(key))),
        ("Temperature", None, f"{decimal(recipe.get('temperature'))}, fitted on the {recipe.get('temperature_fitted_on', 'train part')}"),
        ("Seed", asked.get("seed"), recipe.get("seed")),
    ]  # fmt: skip
    if record.evaluation.get("n_parameters"):
        trained = f"{record.evaluation['n_trainable']:,} of {record.evaluation['n_parameters']:,}"
        rows.append(("Trained parameters", None, trained))
    return [(name, _shown(asked_for), _shown(used)) for name, asked_for, used in rows]


def _shown(value: Any) -> str:
    return "–" if value in (None, "") else escape(str(value))


def _times(record: Record) -> Table:
    seconds = dict(record.evaluation.get("timing", {}).get("seconds", {}))
    total = seconds.pop("total", None) or sum(seconds.values()) or 1.0
    rows = [
        (STEP_NAMES.get(name, name), Stack((("train", min(1.0, some / total)),)), Cell(duration(some), some))
        for name, some in seconds.items()
    ]
    return Table("Time", ("Step", "", "Time"), (*rows, ("total", Stack(()), Cell(duration(total), total, "strong"))))


def _versions(record: Record) -> Table:
    versions = {**record.settings.get("versions", {}), "python": record.settings.get("python", "–")}
    return Table("Versions", ("Package", "Version"), tuple((escape(k), escape(str(v))) for k, v in versions.items()))


def _embedded(record: Record) -> list[Block]:
    timing = record.evaluation.get("timing", {})
    n, rate = timing.get("n_embedded"), timing.get("images_per_second")
    if n is None:
        return []
    if not n:
        return [Text("All features were cached.", "small")]
    speed = f" at {rate:,.0f} images per second" if rate else ""
    return [Text(f"{n:,} images embedded{speed}; the rest were cached.", "small")]


def _identity(record: Record) -> Facts:
    """Names and digests that identify the run."""
    rows = (
        ("Data", record.settings.get("path")),
        ("Run", str(record.folder)),
        ("Started", record.settings.get("started")),
        ("Platform", record.settings.get("platform")),
        ("Images and labels", record.manifest.digest),
        ("Split", record.split.get("digest")),
        ("Backbone weights", record.model.get("weights_digest")),
    )
    return Facts(tuple((name, escape(str(value)), "") for name, value in rows if value), "list")
