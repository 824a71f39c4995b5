"""Console output of commands: progress with rate and remaining time, notes, and the results.

On a terminal a live bar; otherwise a line every few seconds. Progress goes to stderr, so that stdout contains only the
results. Notes are printed at the end, so that they are not scrolled away.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from topwork.commands.cache import CACHED
from topwork.data.remote import shown
from topwork.progress import Reporter
from topwork.text import count, duration, escape, percent_ci

PLAIN_SECONDS = 5.0
MAX_CLASS_LINES = 60
STEP_TEXT = {
    "backbone": "Preparing the backbone",
    "scan": "Reading images",
    "scan and embed": "Reading and embedding images",
    "look": "Checking duplicates and shortcuts",
    "compare backbones": "Comparing backbones",
    "probe": "Fitting the head",
    "prepare": "Decoding the training images",
    "range test": "Running the range test",
    "tune": "Fine-tuning the network",
    "embed again": "Embedding with the tuned network",
    "evaluate": "Evaluating",
    "write": "Writing the run",
    "insights": "Analyzing the run",
    "adapt": "Choosing an adaptation method",
    "compare domains": "Comparing domains",
    "examine": "Testing perturbations",
    "report": "Writing the report",
    "predict": "Predicting",
    "export": "Exporting and verifying",
}


def say(text: str) -> None:
    """Prints a line to stderr; failures to print (full disk, closed pipe) are ignored."""
    with contextlib.suppress(OSError):
        print(wrapped(text, sys.stderr), file=sys.stderr, flush=True)


def wrapped(text: str, stream: TextIO) -> str:
    """The text with long sentences broken between words for a terminal; tables and commands are not broken."""
    if not stream.isatty():
        return text
    width = shutil.get_terminal_size().columns
    return "\n".join(_broken(line, width) for line in text.split("\n"))


def _broken(line: str, width: int) -> str:
    words = line.strip()
    if len(line) <= width or "  " in words or "topwork " in words:
        return line
    indent = " " * (len(line) - len(line.lstrip()) + (2 if words.startswith("- ") else 0))
    return textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


class Terminal(Reporter):
    """Shows steps and progress on stderr, and the notes at the end; a context manager that restores the terminal."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.notes: list[str] = []
        self._bar: Any = None
        self._text = ""
        self._started = self._spoken = time.monotonic()

    def __enter__(self) -> Terminal:
        if not self.quiet and sys.stderr.isatty():
            self._bar = _live_bar()
            self._bar.start()
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if self._bar is not None:
            if kind is None:
                self._finish_task()
            self._bar.stop()
            self._bar = None
        if self.notes and kind is None:
            self.say(f"\n{count(len(self.notes), 'note')}:")
            for text in self.notes:
                self.say(f"  - {text}")

    def step(self, name: str) -> None:
        """Starts a new line."""
        self._text = STEP_TEXT.get(name, name)
        self._started = self._spoken = time.monotonic()
        if self._bar is not None:
            self._finish_task()
            self._bar.add_task(self._text, total=None)

    def progress(self, n_done: int, n_all: int) -> None:
        """Updates the bar."""
        if self._bar is not None and self._bar.task_ids:
            self._bar.update(self._bar.task_ids[-1], completed=n_done, total=n_all)
        elif not self.quiet and time.monotonic() - self._spoken >= PLAIN_SECONDS:
            self._spoken = time.monotonic()
            rate = n_done / (self._spoken - self._started)
            left = (n_all - n_done) / rate if rate else 0.0
            self.say(f"{self._text}: {n_done} of {n_all}, {rate:.1f}/s, {duration(left)} left")

    def note(self, text: str) -> None:
        """Adds a note for the end."""
        self.notes.append(text)

    def stages(self, rows: Sequence[dict[str, Any]]) -> None:
        """Prints the table of trainable layers."""
        self._print("\n".join(stage_lines(rows)))

    def epoch(self, record: dict[str, Any]) -> None:
        """Prints a line for each epoch."""
        line = f"  epoch {record['epoch']}: loss {record['train_loss']:.3f}"
        if "valid_loss" in record:
            line += f", valid loss {record['valid_loss']:.3f}"
            if "valid_calibrated_loss" in record:
                line += f" ({record['valid_calibrated_loss']:.3f} calibrated)"
            line += f", accuracy {percent_ci(record['valid_accuracy'])}"
        line += ", best" if record.get("best") else ""
        self._print(line if self._bar is not None else f"{line}, {record['images_per_second']:.0f} images/s")

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            self.say(text)

    def say(self, text: str) -> None:
        """Prints a line."""
        if not self.quiet:
            say(text)

    def _finish_task(self) -> None:
        if self._bar.tasks:
            total = self._bar.tasks[-1].total or 1
            self._bar.update(self._bar.task_ids[-1], total=total, completed=total)


def _live_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import TimeElapsedColumn as Elapsed
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            speed = task.finished_speed or task.speed
            many = task.total is not None and task.total > 1
            return Text(f"{speed:,.0f}/s" if speed and many else "", style="progress.data.speed")

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        Rate(),
        Elapsed(),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
    )


def part_lines(name: str, part: dict[str, Any]) -> list[str]:
    """The metrics of one part, as lines for a person."""
    from topwork.evaluation.calibration import outcome_sentence  # numpy stays out of --help
    from topwork.evaluation.metrics import metrics_of

    metrics = list(metrics_of(part))
    labels = part.get("n_labels_per_image")
    head = f"{name}: {count(part['n'], 'image')}" + (f", {labels:.1f} labels per image" if labels is not None else "")
    width = max((len(metric.title) for metric in metrics), default=0)
    lines = [head, *(f"  {metric.title:{width}}  {metric.text_ci(part)}" for metric in metrics)]
    said = outcome_sentence(part.get("outcomes"))
    return [*lines, f"  {said}"] if said else lines


def evaluation_lines(name: str, evaluated: dict[str, Any], out: str | None = None) -> list[str]:
    """The results of ``topwork evaluate``; first the metrics without images that the model was trained on."""
    seen = evaluated.get("seen_in_training") or {}
    lines = (
        part_lines(f"{escape(name)}, without images seen in training", seen["without"]) if seen.get("without") else []
    )
    lines += [*part_lines(escape(name), evaluated), *by_lines(evaluated.get("by", {}))]
    return [*lines, f"Report: {escape(out)}/report.html"] if out else lines


def range_lines(found: Any, n: int = 12) -> list[str]:
    """The results of ``topwork lr-range``: some points of the curve, the rules, and the suggestion."""
    test = found.test
    shown_rows = sorted({round(i * (len(test.rates) - 1) / (n - 1)) for i in range(n)})
    rows = [(f"{test.rates[row]:.1e}", f"{test.losses[row]:.4f}") for row in shown_rows]
    start = "fitted by the probe" if found.head_is_fitted else "untrained"
    return [
        f"{found.backbone}, batch size {found.batch_size}, head {start}. No weights are saved.",
        "",
        table(rows, ("rate of the head", "smoothed loss")),
        "",
        *(f"{name:12} {rate:.1e}" for name, rate in test.rules.items()),
        "",
        f"Suggested: {found.option}",
        f"Why: {test.reason}",
    ]


def stage_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Stages, parameters, how many of them are trained, and their peak rates, as a table."""
    cells = [
        (row["stage"], f"{row['n_parameters']:,}", f"{row['n_trained']:,}", f"{row['rate']:.1e}" if row["rate"] else "")
        for row in rows
    ]
    total, trained = (f"{sum(row[key] for row in rows):,}" for key in ("n_parameters", "n_trained"))
    return table(
        [*cells, ("total", total, trained, "")], ("stage", "parameters", "trained", "learning rate")
    ).splitlines()


def by_lines(evaluated: dict[str, dict[str, Any]]) -> list[str]:
    """Accuracy of each domain, group or part, as a table; nothing if not requested."""
    lines = []
    for by, parts in evaluated.items():
        rows = [
            (name, f"{p['n']:,}", percent_ci(p["accuracy"]), percent_ci(p["balanced_accuracy"]))
            for name, p in parts.items()
        ]
        lines += ["", table(rows, (by, "images", "accuracy", "balanced accuracy"))]
    return lines


def domain_lines(found: dict[str, Any]) -> list[str]:
    """The results of ``topwork compare-domains``."""
    lines = [escape(found["sentence"])]
    rows = []
    for row in found["classes"][:MAX_CLASS_LINES]:
        n_b = f"{row['n_b']:,}" if row["n_b"] is not None else ""
        shift = f"{row['shift']:.2f}" if row["shift"] is not None else ""
        moves = {None: "", True: "yes", False: "no"}[row["moves"]]
        recalls = [percent_ci(row[key]) if row[key] else "" for key in ("expected", "accuracy")]
        rows.append((row["name"], f"{row['n_a']:,}", n_b, shift, moves, *recalls))
    heads = ("class", "images A", "images B", "shift", "shifted", "expected recall on B", "measured recall")
    return [*lines, table(rows, heads), *found["notes"]]


def adaptation_lines(record: dict[str, Any], evaluation: dict[str, Any]) -> list[str]:
    """The results of ``topwork adapt``."""
    choice, predicted = record["choice"], record["predicted"]
    outcome = {"adapted": "Adapted", "unchanged": "Unchanged", "refused": "Not adapted"}[choice["outcome"]]
    method = f" ({choice['method']})" if choice["outcome"] == "adapted" else ""
    lines = [f"{outcome}{method}: {choice['reason']}"]
    lines.append(f"{record['n_changed']:,} of {record['n_target']:,} predictions changed.")
    domains = evaluation.get("domains")
    if domains:
        for name in ("target", "source"):
            found = domains[name]
            if found["before"]:
                part = f" ({found['part']})" if found.get("part") else ""
                after, before = percent_ci(found["after"]["accuracy"]), percent_ci(found["before"]["accuracy"])
                lines.append(f"  {name + part:14s} {before} before, {after} after")
    lines.append(
        f"Expected accuracy on the target: {percent_ci(predicted['before'])} before, "
        f"{percent_ci(predicted['after'])} after."
    )
    return lines


def certificate_lines(certificate: Any) -> list[str]:
    """The parity certificate of an export."""
    n_same, most, mean = certificate.n_same, certificate.max_difference, certificate.mean_difference
    head = f"{certificate.format}, verified with {certificate.runtime} on {certificate.images}:"
    lines = [f"  same class         {n_same} of {certificate.n_compared}"]
    if certificate.is_int8:
        head = f"Quantized to 8 bits. {head}"
        lines += [
            f"  probabilities      differ by at most {most:.2f}, {mean:.3f} on average",
            _cost_line(certificate.cost),
        ]
    else:
        graph, limit = certificate.graph_difference, certificate.graph_tolerance
        lines += [
            f"  probabilities      differ by at most {most:.1e} (tolerance {certificate.tolerance:g}), {mean:.1e} on average",
            f"  same pixels        differ by at most {graph:.1e} (tolerance {limit:g})",
        ]
    if certificate.ties:
        ties = ", ".join(escape(tie.path) for tie in certificate.ties)
        lines.append(f"  ties               {len(certificate.ties)}: {ties}")
    return [head, *lines, *(f"  unreadable         {escape(path)}: {why}" for path, why in certificate.not_read)]


def _cost_line(cost: Any) -> str:
    if cost is None:
        return "  accuracy           unknown, because the images have no labels; export from the run directory to measure it"
    return (
        f"  accuracy           {percent_ci(cost.accuracy_before)} before, {percent_ci(cost.accuracy_after)} after: "
        f"{100 * cost.difference:+.1f} points (95% CI {100 * cost.low:+.1f} to {100 * cost.high:+.1f}, "
        f"{cost.n} held-out images)"
    )


def examination_lines(found: Any) -> list[str]:
    """The results of ``topwork examine``: findings in words, then the table of effects."""
    lines = [f"[{finding.kind}] {escape(finding.text)}" for finding in found.findings]
    rows = [("Unchanged", percent_ci(found.unchanged.accuracy), "", "")]
    for effect in found.effects:
        significant = "significant" if effect.is_clear else ""
        rows.append((effect.title, percent_ci(effect.accuracy), f"{100 * effect.difference:+.1f}", significant))
    return [*lines, "", table(rows, ("images", "accuracy", "points", ""))]


def comparison_lines(sentence: str, found: dict[str, Any], n: int = 12) -> list[str]:
    """The results of ``topwork compare`` for one pair of runs."""
    changed = [(name, c) for name, c in found["per_class"].items() if c["n_gained"] or c["n_lost"]]
    changed.sort(key=lambda item: (-abs(item[1]["n_gained"] - item[1]["n_lost"]), -item[1]["n_gained"]))
    lines, rows = [escape(sentence)], []
    for name, c in changed[:n]:
        accuracies = map(percent_ci, (c["accuracy_first"], c["accuracy_second"]))
        rows.append((name, str(c["n"]), *accuracies, f"+{c['n_gained']} −{c['n_lost']}"))
    if rows:
        lines += ["", table(rows, ("class", "images", "first", "second", "gained/lost"))]
    differing = [
        tuple(row[key] for key in ("path", "label", "first", "second", "change")) for row in found["disagreements"]
    ]
    if differing:
        lines += ["", table(differing[:n], ("image", "label", "first", "second", ""))]
    more = [f"... and {len(differing) - n} more (all with --json)"] if len(differing) > n else []
    return [*lines, *more, ""]


def study_list_lines(studies: Sequence[Any]) -> list[str]:
    """The list of studies, with running time and source."""
    lines = []
    for study in studies:
        lines += [f"{study.name}: {study.title}", f"    teaches  {study.teaches}"]
        lines += [f"    costs    {study.cost}", f"    source   {study.source}", ""]
    return [*lines, "Run one with: topwork study NAME FOLDER (--quick for rough results within a minute)"]


def studied_lines(studied: Any) -> list[str]:
    """The results of a study: the sentences, then its tables."""
    from topwork.blocks import Cell, Table, as_cell

    lines = [studied.study.title, ""]
    lines += [f"- {escape(sentence)}" for sentence in studied.findings.sentences]
    for part in studied.findings.parts:
        if isinstance(part, Table):
            rows = [tuple(cell.text for cell in map(as_cell, row) if isinstance(cell, Cell)) for row in part.rows]
            lines += ["", part.title, table(rows, part.columns)]
    return [*lines, "", f"Took {duration(studied.seconds)}."]


def table(rows: Sequence[tuple[str, ...]], heads: tuple[str, ...]) -> str:
    """Rows as aligned text; names are escaped so that they cannot move the cursor."""
    cells = [heads, *[tuple(escape(cell) for cell in row) for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(heads))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def overview_lines(found: Any) -> list[str]:
    """The results of ``topwork scan``: a table of the classes, then facts about the images."""
    parts = sorted({part for facts in found.class_facts.values() for part in facts.parts})
    rows = []
    for name, facts in found.class_facts.items():
        counts = [f"{n:,}" for n in (facts.n, *(facts.parts.get(part, 0) for part in parts))]
        rows.append((name, *counts, f"{facts.width[1]:.0f} x {facts.height[1]:.0f}", f"{facts.aspect[1]:.2f}"))
    shown_rows = rows if len(rows) <= MAX_CLASS_LINES else [*rows[: MAX_CLASS_LINES - 5], *rows[-4:]]
    lines = [table(shown_rows, ("class", "images", *parts, "typical size", "width/height"))]
    if len(rows) > MAX_CLASS_LINES:
        lines.append(f"... {len(rows) - len(shown_rows):,} more classes not shown (see --json or the page)")
    near, shortcuts = found.near_duplicates, found.shortcuts
    looked = "not checked" if near is None else f"{len(near):,} groups"
    lines += [
        "",
        "Formats: " + ", ".join(f"{name} {n:,}" for name, n in found.formats.items()),
        f"Exact duplicates: {len(found.duplicates):,} groups. Near duplicates: {looked}.",
        f"Suggestion: --resize {found.suggested_fit.fit} ({found.suggested_fit.reason}).",
    ]
    if not shortcuts.families:
        return [*lines, f"Shortcut check: {shortcuts.reason}."]
    strongest = [
        f"{one.family} {percent_ci({'value': one.balanced_accuracy, 'low': one.low, 'high': one.high})}"
        for one in shortcuts.families[:3]
    ]
    chance = percent_ci(shortcuts.families[0].chance)
    text = f"Shortcut check, balanced accuracy from metadata alone (chance {chance}): {'; '.join(strongest)}."
    return [*lines, text]


# ---- lines of single commands


def fit_lines(fitted: Any) -> list[str]:
    """The results of ``topwork fit``: images, metrics of the held-out parts, the weakest classes, and next steps."""
    from topwork.evaluation.metrics import zero_shot_sentence  # numpy stays out of --help

    evaluation, manifest = fitted.evaluation, fitted.manifest
    lines = [
        f"{len(manifest.samples):,} images used, {len(manifest.rejects):,} rejected.",
        *reject_lines(manifest.rejects),
    ]
    lines.append(str(fitted.recipe["head"]["reason"]))
    parts = [name for name in ("valid", "test") if name in evaluation]
    for name in parts:
        if f"{name}_without_leaks" in evaluation:  # the more reliable metrics come first
            lines += part_lines(f"{name}, without images that are also in train", evaluation[f"{name}_without_leaks"])
        lines += part_lines(name, evaluation[name])
    if evaluation.get("zero_shot"):
        lines.append(zero_shot_sentence(evaluation))
    if parts and "per_class" in evaluation[parts[-1]]:
        lines += ["", *class_lines(evaluation[parts[-1]]["per_class"])]
    if "test" not in evaluation:
        used = f"; valid was used for {fitted.recipe['valid_used_for']}" if "valid" in evaluation else ""
        lines.append(f"There is no test part{used}.")
    run = escape(shown(fitted.folder))
    return [
        *lines,
        "",
        f"Took {duration(evaluation['timing']['seconds']['total'])}.",
        "Next:",
        f"  read the report           {run}/report.html",
        f"  classify new images       topwork predict {run} IMAGES --out predictions.csv",
        f"  check the labels          topwork review {run}",
        f"  try it in a browser       topwork serve {run}",
    ]


def class_lines(per_class: dict[str, dict[str, Any]], n: int = 20) -> list[str]:
    """Images, precision and recall per class; for many classes, those with the lowest recall."""
    order = list(per_class.items())
    if len(order) > n:
        order = sorted(order, key=lambda item: (item[1]["recall"] is None, item[1]["recall"]))[:n]
    rows = []
    for name, c in order:
        n_train = f"{c['n_train']:,}" if c.get("n_train") is not None else ""
        rows.append((name, n_train, f"{c['n']:,}", *map(percent_ci, (c["precision"], c["recall"]))))
    text = table(rows, ("class", "train images", "evaluated on", "precision", "recall"))
    more = len(per_class) - len(order)
    return [text, *([f"... and {more} more classes with higher recall"] if more else [])]


def reject_lines(rejects: Sequence[Any], n: int = 20) -> list[str]:
    """The first rejected files with their reasons."""
    lines = [f"  rejected {escape(reject.path)}: {reject.reason}" for reject in rejects[:n]]
    if len(rejects) > n:
        lines.append(f"  ... and {len(rejects) - n:,} more (see --json, or manifest.parquet in the run)")
    return lines


def understood_lines(found: Any, *, with_counts: bool = False) -> list[str]:
    """How a dataset is interpreted: layout, parts, classes and the first paths.

    Args:
        with_counts: list every class with its number of files.
    """
    answer = found.as_dict()
    parts = ", ".join(f"{part} {n:,}" for part, n in found.parts.items()) or "none given"
    lines = [f"Layout: {answer['layout']}, with labels from {answer['labels_from']}. Parts: {parts}."]
    if with_counts:
        lines.append(f"{count(len(found.classes), 'class', 'classes')}:")
        lines += [f"  {escape(name)}  {n:,}" for name, n in found.classes.items()]
    return [*lines, *(f"  {escape(path)} → {escape(label) or 'no label'}" for path, label in found.examples)]


def scan_lines(surveyed: Any) -> list[str]:
    """What ``topwork scan`` found."""
    manifest = surveyed.manifest
    used = f"\n{count(len(manifest.samples), 'image')} used, {count(len(manifest.rejects), 'file')} rejected."
    return [
        *understood_lines(surveyed.understood),
        "",
        *overview_lines(surveyed.overview),
        used,
        *reject_lines(manifest.rejects),
    ]


def added_lines(grown: Any) -> list[str]:
    """The results of ``topwork add-class``."""
    lines = [f"Added {', '.join(escape(label) for label in grown.added)}."]
    if grown.part is not None:
        lines.append(
            f"Existing classes, {count(grown.n_old, f'{grown.part} image')}: accuracy {percent_ci(grown.before)} before, "
            f"{percent_ci(grown.after)} after."
        )
    for part in ("valid", "test"):
        if part in grown.evaluation:
            lines += part_lines(part, grown.evaluation[part])
    return [*lines, f"Model: {Path(grown.folder) / 'model'}"]


def model_list_lines(found: dict[str, Any], pattern: str) -> list[str]:
    """The list of ``topwork models``."""
    rows = []
    for row in found["backbones"]:
        n = row["n_parameters"]
        size = (f"{n / 1e6:.1f}M", f"{n * 4 / 1e6:,.0f}") if n else ("", "")
        top1 = f"{row['top1']:.1f}%" if row["top1"] else ""
        rows.append((row["name"], str(row["size"] or ""), *size, top1, row["license"] or ""))
    lines = [table(rows, ("backbone", "input", "parameters", "MB", "ImageNet top-1", "license")), ""] if rows else []
    if rows and not any(row["n_parameters"] for row in found["backbones"]):
        lines.append("Parameters are counted for up to 40 architectures; use a narrower --filter to see them.")
    if not pattern:
        lines.append(
            "The weights of these come with packages; any timm model works, too: topwork models --filter '*resnet18*'"
        )
    elif not found["timm"]:
        wider = f"*{pattern.strip('*')}*"
        wider = "*resnet*" if wider == pattern else wider
        lines.append(f"No pretrained timm model matches --filter '{escape(pattern)}'; try '{escape(wider)}'.")
    return lines


def described_lines(described: Any, strategy: str, with_stages: bool) -> list[str]:
    """The description of ``topwork models NAME``."""
    license_name = described.license or "an unknown license"
    lines = [
        f"{described.name}: {described.architecture}, weights under {license_name}",
        f"{described.n_parameters:,} parameters, {described.n_trainable:,} of them trainable (--strategy {strategy}); "
        f"{described.n_features} features",
    ]
    return [*lines, *(stage_lines([vars(row) for row in described.stages]) if with_stages else [])]


def runs_lines(found: dict[str, Any]) -> list[str]:
    """The table of ``topwork runs`` and the best run."""
    rows = []
    for row in found["runs"]:
        n, missing = f"{row['n']:,}" if row["n"] else "", "no held-out images" if row["finished"] else "unfinished"
        accuracy = percent_ci(row["accuracy"]) if row["part"] else missing
        rows.append((row["name"], row["backbone"], row["mode"], row["part"] or "", n, accuracy))
    return [table(rows, ("run", "backbone", "mode", "part", "images", "accuracy")), "", found["best"]]


def cache_lines(found: dict[str, Any]) -> list[str]:
    """The table of ``topwork cache``."""
    rows = [
        (CACHED.get(name.rstrip("-0123456789"), name), f"{size / 1e6:,.1f} MB") for name, size in found["bytes"].items()
    ]
    lines = [f"Cache: {escape(found['folder'])} (set TOPWORK_CACHE to move it)"]
    if found.get("freed") is not None:
        return [*lines, f"Freed {found['freed'] / 1e6:,.1f} MB. Features are recomputed when needed."]
    return [*lines, *([table(rows, ("contents", "size"))] if rows else ["The cache is empty."])]


def prediction_lines(out: str, n: int, counts: dict[str, Any]) -> list[str]:
    """A summary of predictions: images by outcome, and by class, the most frequent first."""
    by_outcome = ", ".join(f"{number:,} {name}" for name, number in counts["outcomes"].items())
    labels = list(counts["labels"].items())
    shown = labels[:20]
    width = max((len(escape(name)) for name, _ in shown), default=0)
    lines = [f"Wrote {count(n, 'row')} to {out}: {by_outcome}."]
    lines += [f"  {escape(name):<{width}}  {number:>7,}" for name, number in shown]
    return lines + ([f"  and {count(len(labels) - len(shown), 'more class', 'more classes')}"] if labels[20:] else [])


def checked_lines(rows: Sequence[Any]) -> list[str]:
    """The results of ``topwork models --check``, as a Markdown table with notes."""
    lines = [
        "| backbone | engine | input | parameters | features | stages | `--pooling` | images/s | saved as |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.problem:
            lines.append(f"| `{escape(row.name)}` | not usable: {escape(row.problem)} | | | | | | | |")
            continue
        ends = " … ".join(dict.fromkeys((row.stages[0], row.stages[-1]))) if row.stages else "none"
        shown = [
            f"`{escape(row.name)}`", row.engine, f"{row.size}", f"{row.n_parameters / 1e6:.1f}M", f"{row.n_features}",
            f"{len(row.stages)}: {ends}", ", ".join(row.poolings), f"{row.images_per_second:g}",
            "timm model" if row.is_timm else "topwork only",
        ]  # fmt: skip
        lines.append("| " + " | ".join(shown) + " |")
    notes = [escape(row.note) for row in rows if row.note and not row.problem]
    return [*lines, *(["", *(f"- {note}" for note in notes)] if notes else [])]
