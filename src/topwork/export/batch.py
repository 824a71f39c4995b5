"""Batch prediction to a file: one row per input, in input order, errors included, resumable.

Rows are appended to a journal next to the output; after an interruption the same command continues after the last
complete row. The output appears when it is complete. One process at a time writes an output.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from topwork.errors import TopworkError, UsageError
from topwork.export.predictor import Prediction, Predictor
from topwork.files import atomic_file, error_reason, locked
from topwork.models.classifier import FACTS

COLUMNS = ("path", "outcome", "label", "probability", "top", "error")
ENDINGS = (".csv", ".jsonl", ".parquet")
_FLUSH_ROWS = 64


@dataclass(frozen=True)
class Layout:
    """How rows are written.

    Attributes:
        n_top: classes in column ``top``; None for the number that the predictor returns.
        classes: a column ``probability_CLASS`` for each of these; the predictor must return them all.
        is_csv_safe: prefix CSV cells that a spreadsheet would evaluate as a formula with '.
    """

    n_top: int | None = None
    classes: tuple[str, ...] = ()
    is_csv_safe: bool = False

    def shown(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row of the journal with the requested columns."""
        found = dict(row["top"])
        columns = {f"probability_{name}": found.get(name) for name in self.classes}
        return row | {"top": row["top"][: self.n_top]} | columns


def check_output(out: str | None, *, all_probabilities: bool, csv_safe: bool) -> None:
    """Raises UsageError for an unknown file extension and for options without effect."""
    ending = Path(out).suffix.lower() if out is not None else None
    if out is not None and ending not in ENDINGS:
        raise UsageError(f"--out {out}: the name must end in {', '.join(ENDINGS)}.")
    if all_probabilities and out is None:
        raise UsageError("--all-probabilities: needs --out FILE.")
    if csv_safe and ending != ".csv":
        raise UsageError("--csv-safe: needs --out FILE.csv.")


def predict_to_file(
    predictor: Predictor,
    inputs: Sequence[str],
    out: Path,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    n_threads: int | None = None,
    on_row: Callable[[int, Prediction], None] | None = None,
    *,
    layout: Layout | None = None,
    max_reject_fraction: float = 0.1,
) -> dict[str, Any]:
    """Writes the predictions for ``inputs`` to a .csv, .jsonl or .parquet file.

    Args:
        on_row: called with (row number from 1, prediction) before a new row is written.
        max_reject_fraction: an existing file with a larger fraction of errors is replaced.

    Returns:
        ``n_errors``, ``n_resumed`` (rows from an interrupted command), and counts by ``outcomes`` and ``labels``.

    Raises:
        UsageError: unknown file extension, the file exists and may not be replaced, or another process writes it.
        TopworkError: it cannot be written.
    """
    check_output(str(out), all_probabilities=False, csv_safe=False)
    journal = out.with_name(f".{out.name}.journal")
    with locked(out):
        if out.exists() and not overwrite and not _is_of_failed_run(out, max_reject_fraction):
            raise UsageError(f"--out {out}: exists already. Choose another name, or add --overwrite.")
        try:
            n_resumed = _append_rows(predictor, inputs, journal, on_progress, n_threads, on_row)
            counts = _finish(journal, out, layout or Layout())
        except OSError as error:
            reason = error_reason(error)
            raise TopworkError(
                f"{out}: cannot be written: {reason}. The rows written so far are kept; run the command again."
            ) from None
        journal.unlink(missing_ok=True)
    return {"n_errors": counts["outcomes"].get("error", 0), "n_resumed": n_resumed, **counts}


def _is_of_failed_run(out: Path, max_reject_fraction: float) -> bool:
    """Whether the predictions in a file have more errors than allowed."""
    from pyarrow import dataset

    kind = {".jsonl": "json"}.get(out.suffix.lower(), out.suffix.lower()[1:])
    try:
        outcomes = dataset.dataset(out, format=kind).to_table(columns=["outcome"])["outcome"].to_pylist()
    except (OSError, ValueError, TypeError):  # ArrowInvalid is a ValueError
        return False  # not written by topwork
    return bool(outcomes.count("error") > max_reject_fraction * len(outcomes))


# ---- the journal


def _append_rows(
    predictor: Predictor,
    inputs: Sequence[str],
    journal: Path,
    on_progress: Callable[[int, int], None] | None,
    n_threads: int | None,
    on_row: Callable[[int, Prediction], None] | None,
) -> int:
    """Appends the missing rows to the journal, whose first line identifies model and inputs; returns the number found."""
    head = json.dumps({"inputs": _digest(predictor, inputs)})
    n_there, whole_bytes = _whole_rows(journal, head)
    if not n_there:
        with atomic_file(journal) as partial:
            partial.write_text(head + "\n")
        whole_bytes = journal.stat().st_size
    with open(journal, "r+b") as file:
        file.truncate(whole_bytes)
        file.seek(whole_bytes)
        for number, prediction in enumerate(predictor.stream(inputs[n_there:], n_threads), start=n_there + 1):
            if on_row:
                on_row(number, prediction)
            file.write(json.dumps(row_of(prediction)).encode() + b"\n")
            if number % _FLUSH_ROWS == 0:
                file.flush()
            if on_progress:
                on_progress(number, len(inputs))
        file.flush()
        os.fsync(file.fileno())
    return n_there


def _digest(predictor: Predictor, inputs: Sequence[str]) -> str:
    """Identifies the model, the number of classes returned, and the list of inputs."""
    digest = hashlib.sha256((predictor.classifier.backbone.folder / FACTS).read_bytes())
    digest.update(f"{predictor.n_top} {predictor.tta} {predictor.engine.precision}".encode())
    for name in inputs:
        digest.update(os.fsencode(name) + b"\0")
    return digest.hexdigest()


def _whole_rows(journal: Path, head: str) -> tuple[int, int]:
    """Valid rows of a journal for the same work, up to the first damaged one, and their size in bytes."""
    try:
        with open(journal, "rb") as file:
            n_rows, n_bytes = 0, len(head) + 1
            if file.readline() != head.encode() + b"\n":
                return 0, 0
            for line in file:
                if not _is_row(line):
                    break
                n_rows, n_bytes = n_rows + 1, n_bytes + len(line)
    except OSError:
        return 0, 0
    return n_rows, n_bytes


def _is_row(line: bytes) -> bool:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return line.endswith(b"\n") and isinstance(row, dict) and set(row) == set(COLUMNS)


def row_of(prediction: Prediction) -> dict[str, Any]:
    """A prediction as a row of plain values; ``top`` is a list of [class name, probability]."""
    return asdict(prediction) | {"top": [list(pair) for pair in prediction.top]}


# ---- the output


def _finish(journal: Path, out: Path, layout: Layout) -> dict[str, dict[str, int]]:
    """Converts the journal to the requested file; returns counts by outcome and by label."""
    writers = {".csv": _write_csv, ".jsonl": _write_jsonl, ".parquet": _write_parquet}
    outcomes: Counter[str] = Counter()
    labels: Counter[str] = Counter()

    def counted() -> Iterator[dict[str, Any]]:
        with open(journal, encoding="ascii") as file:
            next(file)
            for line in file:
                row = json.loads(line)
                outcomes[row["outcome"]] += 1
                if row["label"] is not None:
                    labels[row["label"]] += 1
                yield row

    with atomic_file(out) as partial:
        writers[out.suffix.lower()](counted(), partial, layout)
    return {"outcomes": dict(outcomes), "labels": dict(labels.most_common())}


def _write_csv(rows: Iterator[dict[str, Any]], path: Path, layout: Layout) -> None:
    """RFC 4180; names that are not valid Unicode are written as their bytes."""
    names = (*COLUMNS, *(f"probability_{name}" for name in layout.classes))
    safe = _safe_cell if layout.is_csv_safe else lambda value: value
    with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([safe(name) for name in names])
        for row in map(layout.shown, rows):
            values = row | {"top": json.dumps(row["top"], ensure_ascii=False)}
            writer.writerow([safe(values[name]) for name in names])


def _safe_cell(value: Any) -> Any:
    """A cell that no spreadsheet evaluates as a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in tuple("=+-@\t\r") else value


def _write_jsonl(rows: Iterator[dict[str, Any]], path: Path, layout: Layout) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.writelines(json.dumps(row) + "\n" for row in map(layout.shown, rows))


def _write_parquet(rows: Iterator[dict[str, Any]], path: Path, layout: Layout) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    top = pa.list_(pa.struct([("label", pa.string()), ("probability", pa.float64())]))
    types = {"probability": pa.float64(), "top": top}
    fields = [(name, types.get(name, pa.string())) for name in COLUMNS]
    fields += [(_text(f"probability_{name}"), pa.float64()) for name in layout.classes]
    schema = pa.schema(fields)
    chunk = []
    with pq.ParquetWriter(path, schema) as writer:
        for row in map(layout.shown, rows):
            pairs = [{"label": _text(label), "probability": p} for label, p in row["top"]]
            values = row | {"top": pairs}
            chunk.append({_text(k): _text(v) if isinstance(v, str) else v for k, v in values.items()})
            if len(chunk) == 10_000:
                writer.write_table(pa.Table.from_pylist(chunk, schema))
                chunk = []
        writer.write_table(pa.Table.from_pylist(chunk, schema))


def _text(value: str) -> str:
    """Parquet strings are UTF-8: other bytes become backslash escapes."""
    return value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
