"""Batch prediction into a file: one row for each input, in input order, errors included, resumable.

Rows are appended to a journal beside the output while they come; after a kill the same command goes on after the last
whole row. The output appears at its name only when every row is in it.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from topwork.data.folders import is_hidden
from topwork.errors import TopworkError, UsageError
from topwork.export.predictor import Prediction, Predictor
from topwork.files import atomic_file
from topwork.models.classifier import FACTS
from topwork.text import natural_key

COLUMNS = ("path", "outcome", "label", "probability", "top", "error")
ENDINGS = (".csv", ".jsonl", ".parquet")
_FLUSH_ROWS = 64


def list_inputs(names: Sequence[str]) -> list[str]:
    """Files to predict on: names as given, folders walked in natural order, patterns expanded, archives listed.

    Members of a tar or zip archive are named ``ARCHIVE/MEMBER``, in the order of the archive; what its reader sets aside
    (links, names that lead outside, hidden files) has its row too.

    A name that does not exist stays in the list and becomes an error row: each input has its row.

    Raises:
        UsageError: nothing to predict on.
    """
    inputs: list[str] = []
    for name in names:
        if not name:
            continue
        if Path(name).is_dir():
            inputs += _files_below(name)
        elif members := _members(name):
            inputs += members
        elif not os.path.lexists(name) and glob.has_magic(name):
            found = sorted(glob.glob(name, recursive=True), key=natural_key)  # noqa: PTH207 - keeps names as given
            inputs += found or [name]
        else:
            inputs.append(name)
    if not inputs:
        raise UsageError("No images: give files, folders, patterns in quotes, or - for a list on stdin.")
    return inputs


def predict_to_file(
    predictor: Predictor,
    inputs: Sequence[str],
    out: Path,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    n_threads: int | None = None,
    on_row: Callable[[int, Prediction], None] | None = None,
) -> dict[str, int]:
    """Writes the predictions for ``inputs`` to a .csv, .jsonl or .parquet file.

    Args:
        on_row: called with (row number from 1, prediction) before a new row is written.

    Returns:
        Counts: ``n_errors``, ``n_resumed`` (rows taken over from an interrupted command).

    Raises:
        UsageError: unknown ending, or the file exists and may not be replaced.
        TopworkError: it cannot be written.
    """
    if out.suffix.lower() not in ENDINGS:
        raise UsageError(f"--out {out}: the name must end in {', '.join(ENDINGS)}.")
    if out.exists() and not overwrite:
        raise UsageError(f"--out {out}: exists already. Choose another name, or add --overwrite.")
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: there is no folder {out.parent}.")
    journal = out.with_name(f".{out.name}.journal")
    try:
        n_resumed = _append_rows(predictor, inputs, journal, on_progress, n_threads, on_row)
        n_errors = _finish(journal, out)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise TopworkError(f"{out}: cannot be written: {reason}. The rows so far are kept; run it again.") from None
    journal.unlink(missing_ok=True)
    return {"n_errors": n_errors, "n_resumed": n_resumed}


def _files_below(folder: str) -> list[str]:
    """Regular files, hidden ones left out; links to folders are not followed, so the walk ends."""
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not is_hidden(name)]
        for name in files:
            path = str(Path(place, name))
            if not is_hidden(name) and _is_regular(path):
                found.append(path)
    return sorted(found, key=natural_key)


def _members(name: str) -> list[str]:
    """The members of an archive, the rejected ones last; none where it is no archive that can be read."""
    from topwork.data.archives import is_archive, open_archive

    if not Path(name).is_file() or not is_archive(Path(name)):
        return []
    try:
        archive = open_archive(Path(name))
    except UsageError:
        return []  # an image with such a beginning, or damaged: it is one row, with the reason
    return [f"{name}/{member}" for member in (*archive.names, *(reject.path for reject in archive.rejects))]


def _is_regular(path: str) -> bool:
    try:
        return stat.S_ISREG(Path(path).stat().st_mode)
    except OSError:
        return True  # named as an error row


# ---- the journal


def _append_rows(
    predictor: Predictor,
    inputs: Sequence[str],
    journal: Path,
    on_progress: Callable[[int, int], None] | None,
    n_threads: int | None,
    on_row: Callable[[int, Prediction], None] | None,
) -> int:
    """Appends the missing rows to the journal; its first line names model and inputs. Returns how many were there."""
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
    """Changes with the model, the number of classes named, and the list of inputs."""
    digest = hashlib.sha256((predictor.classifier.backbone.folder / FACTS).read_bytes())
    digest.update(f"{predictor.n_top} {predictor.tta} {predictor.engine.precision}".encode())
    for name in inputs:
        digest.update(os.fsencode(name) + b"\0")
    return digest.hexdigest()


def _whole_rows(journal: Path, head: str) -> tuple[int, int]:
    """Whole rows of a journal for the same work, and the bytes they fill; a torn last line is dropped."""
    try:
        lines = journal.read_bytes().split(b"\n")[:-1]
    except OSError:
        return 0, 0
    if not lines or lines[0] != head.encode():
        return 0, 0
    n_bytes = sum(len(line) + 1 for line in lines)
    return len(lines) - 1, n_bytes


def row_of(prediction: Prediction) -> dict[str, Any]:
    """A prediction as a row of plain values; ``top`` is a list of [class name, probability]."""
    return asdict(prediction) | {"top": [list(pair) for pair in prediction.top]}


# ---- the output


def _finish(journal: Path, out: Path) -> int:
    """Turns the journal into the file asked for; returns the number of error rows."""
    writers = {".csv": _write_csv, ".jsonl": _write_jsonl, ".parquet": _write_parquet}
    with atomic_file(out) as partial:
        return writers[out.suffix.lower()](_rows(journal), partial)


def _rows(journal: Path) -> Iterator[dict[str, Any]]:
    with open(journal, encoding="ascii") as file:
        next(file)
        for line in file:
            yield json.loads(line)


def _write_csv(rows: Iterator[dict[str, Any]], path: Path) -> int:
    """RFC 4180; names that are not valid Unicode come back as their bytes."""
    import csv

    n_errors = 0
    with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in rows:
            n_errors += row["outcome"] == "error"
            writer.writerow(row | {"top": json.dumps(row["top"], ensure_ascii=False)})
    return n_errors


def _write_jsonl(rows: Iterator[dict[str, Any]], path: Path) -> int:
    n_errors = 0
    with open(path, "w", encoding="ascii") as file:
        for row in rows:
            n_errors += row["outcome"] == "error"
            file.write(json.dumps(row) + "\n")
    return n_errors


def _write_parquet(rows: Iterator[dict[str, Any]], path: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    top = pa.list_(pa.struct([("label", pa.string()), ("probability", pa.float64())]))
    types = {"probability": pa.float64(), "top": top}
    schema = pa.schema([(name, types.get(name, pa.string())) for name in COLUMNS])
    n_errors, chunk = 0, []
    with pq.ParquetWriter(path, schema) as writer:
        for row in rows:
            n_errors += row["outcome"] == "error"
            pairs = [{"label": _text(label), "probability": p} for label, p in row["top"]]
            chunk.append({k: _text(v) if isinstance(v, str) else v for k, v in row.items()} | {"top": pairs})
            if len(chunk) == 10_000:
                writer.write_table(pa.Table.from_pylist(chunk, schema))
                chunk = []
        writer.write_table(pa.Table.from_pylist(chunk, schema))
    return n_errors


def _text(value: str) -> str:
    """Parquet strings are UTF-8: bytes that are not come as backslash escapes."""
    return value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
