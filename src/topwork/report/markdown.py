"""The report as text: ``report.md`` for people and version control, ``report.json`` for programs.

In: a :class:`Record`. Out: the same sentences and figures as the page has, without pictures. Names from the data are escaped
so that they can neither break a table nor start a tag.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from topwork.evaluation.advice import times
from topwork.evaluation.analysis import advice_of
from topwork.evaluation.predictions import join_labels
from topwork.report import label_sets
from topwork.report.examine_page import write_page
from topwork.report.results import figures
from topwork.report.run_data import Record, read_record
from topwork.report.sections import repeat_command
from topwork.report.summary import sentences
from topwork.text import percent

MAX_CLASSES, MAX_PAIRS, MAX_MISTAKES, MAX_SUSPECTS = 200, 20, 50, 50
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|~])")


def write_plain(run: Path, format: str) -> Path:
    """Writes ``report.md`` or ``report.json`` into a run folder and returns its path.

    Raises:
        UsageError: no finished run there.
        TopworkError: the run is damaged, or the report cannot be written.
    """
    record, final = read_record(run), Path(run) / f"report.{format}"
    text = markdown(record) if format == "md" else json.dumps(as_json(record), indent=1, allow_nan=False) + "\n"
    write_page(final, text)
    return final


def as_json(record: Record) -> dict[str, Any]:
    """Everything a run says, in one object."""
    return {
        "name": _clean(record.name),
        "run": _clean(str(record.folder)),
        "summary": [text.replace("\u202f", " ") for text in _sentences(record)],
        "evaluation": record.evaluation,
        "recipe": record.recipe,
        "settings": record.settings,
        "insights": record.insights,
        "split_digest": record.split.get("digest"),
        "data_digest": record.manifest.digest,
        "command": _clean(repeat_command(record)),
    }


def markdown(record: Record) -> str:
    """The report in GitHub's Markdown."""
    insights = record.insights
    lines = [f"# {_escaped(record.name)}", "", *(_said(text) + "\n" for text in _sentences(record))]
    for part in record.predictions:
        lines += _part(record, part)
    lines += _mistakes(record) + _advice(insights) + _suspects(insights, record) + _reproduce(record)
    return "\n".join(lines).rstrip() + "\n"


def _sentences(record: Record) -> list[str]:
    return label_sets.sentences(record) if record.manifest.multi_label else sentences(record)


def _part(record: Record, part: str) -> list[str]:
    judged = record.evaluation[part]
    measured = (label_sets.figures if record.manifest.multi_label else figures)(record, part)
    rows = [(row["label"], row["value"], f"{row['low']} to {row['high']}" if row["low"] else "") for row in measured]
    lines = [f"## {part}: {judged['n']:,} images", "", *_table(("figure", "value", "95 % interval"), rows)]
    scores = sorted(judged["per_class"].items(), key=lambda item: (item[1]["recall"] is None, item[1]["recall"] or 0))
    spans = judged.get("per_class_intervals", {})
    classes = []
    for name, s in scores[:MAX_CLASSES]:
        n_train = str(s["n_train"]) if s["n_train"] is not None else "–"
        figures_of = [_with_span(s[key], spans.get(name, {}).get(key)) for key in ("recall", "precision", "f1")]
        classes.append((_escaped(name), n_train, str(s["n"]), *figures_of))
    return [*lines, *_table(("class", "trained on", "images", "recall", "precision", "F1"), classes)]


def _with_span(value: float | None, interval: dict[str, float] | None) -> str:
    if interval is None:
        return percent(value)
    return f"{percent(value)} ({percent(interval['low'], 0)} to {percent(interval['high'], 0)})"


def _mistakes(record: Record) -> list[str]:
    part = record.main_part
    if part is None:
        return []
    predictions = record.predictions[part]
    wrong = [i for i in (-predictions.loss).argsort(kind="stable").tolist() if not predictions.correct[i]]
    rows = [
        (
            _escaped(record.manifest.samples[int(predictions.sample_indices[i])].path),
            _escaped(join_labels(predictions.classes, predictions.truth[i])),
            _escaped(join_labels(predictions.classes, predictions.given[i])),
            percent(float(predictions.confidence[i])),
            f"{predictions.loss[i]:.2f}",
        )
        for i in wrong[:MAX_MISTAKES]
    ]
    if not rows:
        return ["## Mistakes", "", "None.", ""]
    return [
        "## Mistakes, the highest loss first",
        "",
        *_table(("image", "true", "answer", "probability", "loss"), rows),
    ]


def _advice(insights: dict[str, Any]) -> list[str]:
    items = advice_of(insights)
    if not items:
        return []
    lines = ["## What would help most", ""]
    for number, item in enumerate(items, start=1):
        lines.append(f"{number}. **{_escaped(item.title)}** ({times(item)}). {_escaped(item.text)}")
    return [*lines, ""]


def _suspects(insights: dict[str, Any], record: Record) -> list[str]:
    found = [s for s in insights.get("suspects", []) if s["is_confident"]]
    if not found:
        return []
    samples = record.manifest.samples
    rows = [
        (_escaped(samples[s["row"]].path), _escaped(samples[s["row"]].label), _escaped(s["suggested"]), percent(s["suggested_probability"]))
        for s in found[:MAX_SUSPECTS]
    ]  # fmt: skip
    return ["## Labels to check", "", *_table(("image", "label", "looks like", "probability"), rows)]


def _reproduce(record: Record) -> list[str]:
    # A fence longer than any run of backticks inside, so that no path can end it.
    command = _clean(repeat_command(record))
    fence = "`" * (3 + max((len(ticks) for ticks in re.findall("`+", command)), default=0))
    return ["## Reproduce", "", fence, command, fence, "", f"Split {record.split.get('digest')}", ""]


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def _clean(text: str) -> str:
    """Text without what cannot be encoded or moves the cursor."""
    from topwork.text import escape

    return escape(text)


def _said(text: str) -> str:
    """A sentence of our own, whose names went through ``shown`` already."""
    return _SPECIAL.sub(r"\\\1", text.replace("\u202f", " "))


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    return _SPECIAL.sub(r"\\\1", _clean(text))
