"""What most sections of the report say: in goes a :class:`Record`, out come plain values for one template.

A section function also asks the album for the pictures its template or the script will show. Every text that comes
from the data goes through ``shown``; the templates escape it. Nothing here writes HTML. Results and mistakes have a
file of their own.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from topwork.commands.leaks import leak_note
from topwork.report.charts import Line, Plot, line_plot, tick_percent
from topwork.report.pictures import EXAMPLE, Album
from topwork.report.results import figures
from topwork.report.run_data import Record
from topwork.report.summary import sentences
from topwork.settings import fit_command, quote
from topwork.text import decimal, escape, percent

MAX_ROWS = 1000  # of any table
N_OPEN = 24  # groups of examples that are open at first; the rest unfolds
MAX_EXAMPLE_CLASSES = 300
MAX_REJECT_CHARACTERS = 1_000_000
PART_NAMES = ("train", "valid", "test")
FOR_EXPERTS = ("Cross-entropy", "Average precision")  # figures that are under Results only
STEP_NAMES = {"scan_and_embed": "read and embed", "evaluate": "judge", "write": "write the run"}


def summary(record: Record, _album: Album) -> dict[str, Any]:
    """The sentences, and the figures of the part that counts most."""
    part = record.main_part
    return {
        "sentences": sentences(record),
        "part": part,
        "n": record.evaluation[part]["n"] if part else 0,
        "figures": [row for row in figures(record, part) if row["label"] not in FOR_EXPERTS] if part else [],
    }


# ---- data


def data(record: Record, album: Album) -> dict[str, Any]:
    """Images used and rejected, images of each class by part, examples, what looked odd."""
    manifest = record.manifest
    rows = [_class_row(name, parts) for name, parts in record.rows_by_class.items()]
    largest = max(row["total"] for row in rows)
    for row in rows:
        row["bars"] = _stacked(row, largest)
    leaks = [leak_note(name, some["n_leaked"], some) for name, some in record.evaluation.get("leaks", {}).items()]
    return {
        "facts": _data_facts(record),
        "classes": rows[:MAX_ROWS],
        "n_classes": len(rows),
        "parts": [name for name in PART_NAMES if any(row[name] for row in rows)],
        "examples": _examples(record, album),
        "n_open": N_OPEN,
        "notes": leaks + [escape(note) for note in manifest.notes],
        "rejects": _rejects(record),
        "n_rejects": len(manifest.rejects),
        "reasons": Counter(escape(reject.reason) for reject in manifest.rejects).most_common(8),
    }


def _class_row(name: str, parts: dict[str, list[int]]) -> dict[str, Any]:
    counts = {part: len(parts.get(part, ())) for part in PART_NAMES}
    return {"name": escape(name), **counts, "total": sum(len(rows) for rows in parts.values())}


def _stacked(row: dict[str, Any], largest: int) -> list[dict[str, Any]]:
    """Segments of a bar: part, start and length in percent of the largest class."""
    segments, start = [], 0.0
    for part in PART_NAMES:
        length = 100 * row[part] / largest
        if length:
            segments.append({"part": part, "start": round(start, 2), "length": round(length, 2)})
        start += length
    return segments


def _data_facts(record: Record) -> list[tuple[str, str, str]]:
    """Label, value and remark of each tile."""
    samples = record.manifest.samples
    widths, heights = np.array([s.width for s in samples]), np.array([s.height for s in samples])
    sides = np.sort(np.stack([widths, heights]), axis=0)
    formats = Counter(sample.format for sample in samples).most_common(3)
    n_rejects = len(record.manifest.rejects)
    sizes = f"short side {sides[0].min():,} to {sides[0].max():,} px, long side up to {sides[1].max():,} px"
    n_gray = sum(sample.mode in ("1", "L", "LA", "I;16") for sample in samples)
    n_turned = sum(sample.orientation != 1 for sample in samples)
    odd = ", ".join(text for n, text in ((n_gray, f"{n_gray:,} gray"), (n_turned, f"{n_turned:,} turned upright")) if n)
    drawn = f"split drawn with seed {record.split.get('seed')}"
    given = "parts as the data give them" if record.split.get("given") else drawn
    rejected = "each is named below, with the reason" if n_rejects else "every file is a sound image"
    return [
        ("Images used", f"{len(samples):,}", given),
        ("Files rejected", f"{n_rejects:,}", rejected),
        ("Classes", f"{len(record.manifest.classes):,}", _class_sizes(record)),
        ("Median size", f"{int(np.median(widths)):,} × {int(np.median(heights)):,}", sizes),
        ("Formats", ", ".join(f"{name} {n:,}" for name, n in formats), odd or "all in color, all upright"),
    ]


def _class_sizes(record: Record) -> str:
    sizes = list(record.manifest.counts.values())
    low, high = min(sizes), max(sizes)
    return f"{low:,} images each" if low == high else f"from {low:,} to {high:,} images"


def _examples(record: Record, album: Album) -> list[dict[str, Any]]:
    n_classes = len(record.manifest.classes)
    n_each = 8 if n_classes <= 4 else 5 if n_classes <= 12 else 4 if n_classes <= 40 else 2 if n_classes <= 120 else 1
    groups = []
    for name, parts in list(record.rows_by_class.items())[:MAX_EXAMPLE_CLASSES]:
        rows = parts.get("train") or next(iter(parts.values()))
        chosen = sorted(rows, key=lambda row: record.manifest.samples[row].content_hash)[:n_each]
        groups.append({"name": escape(name), "rows": [album.want(row, EXAMPLE) for row in chosen]})
    return groups


def _rejects(record: Record) -> list[tuple[str, str]]:
    rows, n_characters = [], 0
    for reject in record.manifest.rejects[:MAX_ROWS]:
        rows.append((escape(reject.path), escape(reject.reason)))
        n_characters += len(rows[-1][0])
        if n_characters > MAX_REJECT_CHARACTERS:
            break
    return rows


# ---- training


def training(record: Record, _album: Album) -> dict[str, Any]:
    """What was asked and what was done, what was tried, and the curves of an epoch-wise training."""
    trials = [line for line in record.history if "candidate" in line]
    return {
        "rows": _asked_and_done(record),
        "reason": _sentence(escape(str(record.recipe.get("head", {}).get("reason", "")))),
        "candidates": _candidates(trials),
        "trials": [_trial_row(trial) for trial in trials[:MAX_ROWS]],
        "plots": [asdict(plot) for plot in trial_plots(trials)],
        "curves": [asdict(plot) for plot in epoch_plots(record.history)],
        "stages": stage_rows(record.recipe.get("stages", [])),
        "words": [escape(str(text)) for text in record.recipe.get("words", [])],
        "n_folds": trials[0]["n_folds"] if trials else 0,
        "n_images": trials[0]["n_images"] if trials else 0,
        "n_trainable": record.evaluation.get("n_trainable"),
        "n_parameters": record.evaluation.get("n_parameters"),
    }


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _head_text(head: dict[str, Any]) -> str:
    penalty = "" if head.get("penalty") is None else f", penalty {head['penalty']}"
    return f"{head.get('kind')}: {head.get('candidate')}{penalty}"


def _asked_and_done(record: Record) -> list[tuple[str, str, str]]:
    """Name, asked, done."""
    asked, recipe = record.settings.get("settings", {}), record.recipe
    head, spec = recipe.get("head", {}), recipe.get("preprocessing", {})
    input_size = f"{spec.get('width')} × {spec.get('height')} px, {spec.get('fit')}, {spec.get('interpolation')}"
    weights = "by class, against unequal counts" if recipe.get("class_weights") else "none: the counts are even enough"
    if recipe.get("multi_label"):
        weights = "none: each label has a threshold of its own"
    n_part = {part: int((record.part_of == part).sum()) for part in PART_NAMES}
    fractions = f"valid {asked.get('valid_fraction')}, test {asked.get('test_fraction')}"
    temperature = f"{decimal(recipe.get('temperature'))}, from the {recipe.get('temperature_fitted_on', 'train part')}"
    rows = [
        ("Backbone", asked.get("backbone"), f"{recipe.get('backbone')} ({recipe.get('architecture')})"),
        ("Mode", asked.get("mode"), recipe.get("mode")),
        ("Head", asked.get("head"), _head_text(head)),
        ("Input", f"{asked.get('fit')}, {asked.get('size') or 'as the weights'}", input_size),
        (
            "Parts",
            "as given" if record.split.get("given") else fractions,
            ", ".join(f"{name} {n:,}" for name, n in n_part.items() if n),
        ),
        ("Class weights", "auto", weights),
        (
            "Engine",
            f"{asked.get('engine')}, {asked.get('precision')}",
            f"{recipe.get('engine')}, {recipe.get('precision')}",
        ),
        ("Temperature", "auto", temperature),
        ("Seed", asked.get("seed"), recipe.get("seed")),
    ]
    return [(name, escape(str(a)), escape(str(b))) for name, a, b in rows]


def _candidates(trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a candidate, at its best penalty; the chosen one first."""
    best: dict[str, dict[str, Any]] = {}
    for trial in trials:
        old = best.get(trial["candidate"])
        if old is None or (trial["chosen"], -trial["cross_entropy"]) > (old["chosen"], -old["cross_entropy"]):
            best[trial["candidate"]] = trial
    rows = sorted(best.values(), key=lambda trial: (not trial["chosen"], trial["cross_entropy"]))
    return [_trial_row(trial) for trial in rows]


def _trial_row(trial: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": escape(str(trial["candidate"])),
        "plain": trial["plain"],
        "penalty": f"{trial['penalty']:g}",
        "accuracy": percent(trial["accuracy"]),
        "error": f"±\u202f{100 * trial['standard_error']:.1f}",
        "cross_entropy": decimal(trial["cross_entropy"]),
        "chosen": trial["chosen"],
    }


def trial_plots(trials: Sequence[dict[str, Any]]) -> list[Plot]:
    """Accuracy and cross-entropy against the penalty, a line for each candidate; nothing where there is one trial."""
    if len({trial["penalty"] for trial in trials}) < 2:
        return []
    return [
        line_plot(title, _trial_lines(trials, name), "penalty (weak to strong)", label, text, x_is_log=True)
        for title, name, label, text in (
            ("Accuracy in cross-validation", "accuracy", "accuracy", tick_percent),
            ("Cross-entropy in cross-validation", "cross_entropy", "nats", _tick_number),
        )
    ]


def _trial_lines(trials: Sequence[dict[str, Any]], name: str) -> list[Line]:
    by_candidate: dict[str, list[dict[str, Any]]] = {}
    for trial in trials:
        by_candidate.setdefault(trial["candidate"], []).append(trial)
    lines, color = [], 1
    for candidate, tried in by_candidate.items():
        chosen = next((trial for trial in tried if trial["chosen"]), None)
        color += chosen is None
        points = tuple(sorted((trial["penalty"], trial[name]) for trial in tried))
        mark = (chosen["penalty"], chosen[name]) if chosen else None
        lines.append(Line(escape(candidate), points, 1 if chosen else min(color, 6), chosen is not None, mark))
    return sorted(lines, key=lambda line: line.is_strong)  # the chosen one is drawn last, over the others


def epoch_plots(history: Sequence[dict[str, Any]]) -> list[Plot]:
    """Curves of an epoch-wise training: losses, accuracy and rate, as far as the records hold them.

    Args:
        history: records with ``epoch`` and any of ``train_loss``, ``valid_loss``, ``valid_calibrated_loss``,
            ``valid_accuracy``, ``rate``; records without ``epoch`` are passed over.
    """
    plots = []
    steps = _step_lines(history)
    for title, names, label, text in (
        ("Loss", ("train_loss", "valid_loss", "valid_calibrated_loss"), "cross-entropy", _tick_number),
        ("Accuracy on valid", ("valid_accuracy",), "accuracy", tick_percent),
        ("Learning rate", ("rate",), "rate", _tick_number),
    ):
        lines = [_epoch_line(history, name, number) for number, name in enumerate(names, start=1)]
        if title == "Learning rate" and steps:
            lines = steps
        drawn = [line for line in lines if len(line.points) > 0]
        if drawn:
            plots.append(line_plot(title, drawn, "epoch", label, text))
    return plots


VISIBLE = 0.05  # of the height of a plot


def _step_lines(history: Sequence[dict[str, Any]]) -> list[Line]:
    """The schedule as it was: the rate over the steps, of the stage with the highest and the one with the lowest rate.

    Records hold ``curve``: (position in epochs, loss, factor on the rates), and ``rates``: the peak rate of each stage.
    """
    peaks = {stage: rate for record in history for stage, rate in record.get("rates", {}).items() if rate}
    if not peaks:
        return []
    highest, lowest = (pick(peaks, key=lambda stage: peaks[stage]) for pick in (max, min))
    # a line at a hundredth of the axis shows nothing; the table of stages has its number
    ends = dict.fromkeys([highest, lowest] if peaks[lowest] > VISIBLE * peaks[highest] else [highest])
    lines = []
    for number, stage in enumerate(ends, start=1):
        points = tuple(
            (float(position), factor * record["rates"][stage])
            for record in history
            for position, _, factor in record.get("curve", [])
            if record["rates"].get(stage) is not None
        )
        lines.append(Line(f"{escape(stage)}", points, number, is_strong=number == 1))
    return [line for line in lines if line.points]


def stage_rows(stages: Sequence[dict[str, Any]]) -> list[dict[str, str | bool]]:
    """The table of what tuning moved, at which peak rate."""
    return [
        {
            "name": escape(str(row["stage"])),
            "n_parameters": f"{row['n_parameters']:,}",
            "moves": bool(row["trainable"]),
            "rate": f"{row['rate']:.1e}" if row["rate"] else "–",
        }
        for row in stages
    ]


def _epoch_line(history: Sequence[dict[str, Any]], name: str, color: int) -> Line:
    points = [(float(r["epoch"]), float(r[name])) for r in history if "epoch" in r and r.get(name) is not None]
    finite = tuple(point for point in points if np.isfinite(point).all())
    return Line(name.replace("_", " "), finite, color, is_strong=name.startswith("valid"))


def _tick_number(value: float) -> str:
    return f"{value:.4g}"


# ---- reproducibility


def reproduce(record: Record, _album: Album) -> dict[str, Any]:
    """How to get the same run again, what it depended on, how long it took, and how to use the model."""
    seconds = dict(record.evaluation.get("timing", {}).get("seconds", {}))
    total = seconds.pop("total", None) or sum(seconds.values()) or 1.0
    timing = record.evaluation.get("timing", {})
    return {
        "command": repeat_command(record),
        "model": escape(str(record.folder / "model")),
        "predict": f"topwork predict {quote(str(record.folder))} IMAGES --out answers.csv",
        "python": _python(str(record.folder / "model")),
        "versions": [(name, escape(str(v))) for name, v in record.settings.get("versions", {}).items()]
        + [("python", escape(str(record.settings.get("python", "–"))))],
        "facts": _facts(record),
        "seconds": [
            (STEP_NAMES.get(name, name), f"{some:.2f}\u202fs", round(min(100, 100 * some / total), 2))
            for name, some in seconds.items()
        ],
        "total": f"{total:.2f}\u202fs",
        "n_embedded": timing.get("n_embedded"),
        "rate": timing.get("images_per_second"),
        "settings": json.dumps(record.settings, indent=1),
        "recipe": json.dumps(record.recipe, indent=1),
    }


def _facts(record: Record) -> list[tuple[str, str]]:
    """Names and digests that identify the run."""
    rows = [
        ("Data", record.settings.get("path")),
        ("Run", str(record.folder)),
        ("Started", record.settings.get("started")),
        ("Platform", record.settings.get("platform")),
        ("Images and labels", record.manifest.digest),
        ("Split", record.split.get("digest")),
        ("Backbone weights", record.model.get("weights_digest")),
    ]
    return [(name, escape(str(value))) for name, value in rows if value]


def repeat_command(record: Record) -> str:
    """The command that makes the same run in a folder beside this one."""
    path = str(record.settings.get("path", record.manifest.root))
    return fit_command(path, f"{record.folder}-again", record.settings.get("settings", {}))


def _python(model: str) -> str:
    return (
        "from topwork import Predictor\n\n"
        f"predictor = Predictor({ascii(model) if not model.isprintable() else repr(model)})\n"
        'for answer in predictor.predict(["image.jpg"]):\n'
        "    print(answer.label, answer.probability)"
    )
