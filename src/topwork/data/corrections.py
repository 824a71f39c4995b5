"""Corrected labels, kept in a separate file and applied to the data; images and folders are never changed.

In: a CSV, written by ``topwork review`` or by hand. Out: :class:`Corrections`, which ``scan`` asks about every image.
:class:`Journal` is the same file open for one writer: a decision is on disk before it is confirmed, nothing that was
written is ever changed, and undoing is one more line.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, cast, get_args

from topwork.data.samples import Reject, Sample
from topwork.data.tables import decoded
from topwork.errors import TopworkError, UsageError
from topwork.files import error_reason, flush_folder, locked
from topwork.text import canonical, count, escape

Decision = Literal["relabel", "keep", "remove", "undo"]
COLUMNS = ("content_hash", "path", "was", "decision", "label", "time")
REMOVED = "excluded in a review"
_TIME_LENGTH = len("2026-01-01T00:00:00+00:00")


@dataclass(frozen=True)
class Correction:
    """One decision about one image.

    Attributes:
        content_hash: identifies the image; "" in a file written by hand, which uses the path.
        decision: another label, the label it has, no use of the image, or the decision before the last.
        label: the label it gets, with ``relabel``.
        was: the label it had when this was decided.
    """

    content_hash: str
    path: str
    decision: Decision
    label: str = ""
    was: str = ""
    time: str = ""

    @property
    def key(self) -> str:
        """Identifier of the image."""
        return self.content_hash or f"path {canonical(self.path)}"


class Corrections:
    """Decisions in the order they were made; for each image the last one counts that was not undone."""

    def __init__(self, made: Iterable[Correction] = ()) -> None:
        self._stacks: dict[str, list[Correction]] = {}
        self._counts: Counter[str] = Counter()
        for correction in made:
            self.add(correction)

    def add(self, correction: Correction) -> None:
        """Adds a decision."""
        stack = self._stacks.setdefault(correction.key, [])
        self._counts[correction.key] += 1
        if correction.decision != "undo":
            stack.append(correction)
        elif stack:
            stack.pop()

    def of(self, content_hash: str, path: str) -> Correction | None:
        """The decision about an image: by its content, else by its path."""
        stack = self._stacks.get(content_hash) or self._stacks.get(f"path {canonical(path)}")
        return stack[-1] if stack else None

    def n_made(self, content_hash: str) -> int:
        """How many decisions about an image there are in all, undone ones and undoing included."""
        return self._counts[content_hash]

    @property
    def standing(self) -> dict[str, Correction]:
        """The current decisions, by image."""
        return {key: stack[-1] for key, stack in self._stacks.items() if stack}


def read_corrections(path: str | os.PathLike[str]) -> Corrections:
    """Reads a corrections file: all columns of :data:`COLUMNS`, or at least ``path`` (or ``content_hash``) and ``label``.

    A last line that was cut off while it was written is left out; it was never confirmed.

    Raises:
        UsageError: no such file, or an invalid line, with its number.
    """
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error_reason(error)
        raise UsageError(f"--corrections {escape(str(path))}: {reason}.") from None
    text = raw.decode("utf-8-sig", "surrogateescape")
    return _parsed(_whole_lines(text) if _is_journal(text) else decoded(str(path), raw)[0], escape(str(path)))


def _parsed(text: str, name: str) -> Corrections:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = set(reader.fieldnames or ())
        if "label" not in columns or not columns & {"path", "content_hash"}:
            raise UsageError(
                f"--corrections {name}: must have the columns path (or content_hash) and label, as written by topwork review."
            )
        made = [_correction(row, f"--corrections {name}, line {reader.line_num}") for row in reader]
    except csv.Error as error:
        raise UsageError(f"--corrections {name}, line {reader.line_num}: no CSV ({error}).") from None
    return Corrections(made)


def _correction(row: dict[str, str | None], where: str) -> Correction:
    if None in row or any(value is None for value in row.values()):
        raise UsageError(f"{where}: does not have as many fields as the header.")
    values = {name: str(row.get(name) or "") for name in COLUMNS}
    decision = values.pop("decision") or "relabel"
    if decision not in get_args(Decision):
        raise UsageError(f"{where}: decision {escape(decision)}: use relabel, keep, remove or undo.")
    if decision == "relabel" and not values["label"]:
        raise UsageError(f"{where}: has no label. Add one, or put keep or remove in the column decision.")
    if not values["content_hash"] and not values["path"]:
        raise UsageError(f"{where}: has no image.")
    return Correction(decision=cast(Decision, decision), **values)


# ---- applying corrections


def with_corrections(
    samples: list[Sample], corrections: Corrections, name: str
) -> tuple[list[Sample], list[Reject], str]:
    """The samples with their corrected labels, the excluded images, and a sentence on what the file ``name`` changed."""
    kept: list[Sample] = []
    rejects: list[Reject] = []
    n_changed, met = 0, set()
    forms = {canonical(sample.label): sample.label for sample in samples}
    for sample in samples:
        found = corrections.of(sample.content_hash, sample.path)
        if found is not None:
            met.add(found.key)
        if found is None or found.decision == "keep":
            kept.append(sample)
        elif found.decision == "remove":
            rejects.append(Reject(sample.path, REMOVED))
        else:
            label = forms.get(canonical(found.label), found.label)
            n_changed += label != sample.label
            kept.append(replace(sample, label=label))
    n_strange = len(corrections.standing.keys() - met)
    note = f"{escape(name)}: {count(n_changed, 'label')} changed, {count(len(rejects), 'image')} excluded."
    if n_strange:
        note += f" {count(n_strange, 'decision')} for images that are not in this dataset."
    return kept, rejects, note


# ---- writing


class Journal:
    """A corrections file open for one writer.

    Raises:
        UsageError: another review has it open, or it is not a corrections file.
        TopworkError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None
        self._lock = contextlib.ExitStack()
        self._lock.enter_context(
            locked(path, "another review has it open. Close that one, or use another --corrections file.")
        )
        try:
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 - open for its life
            self.corrections = self._begin()
        except OSError as error:
            self.close()
            raise _cannot_write(path, error) from None
        except BaseException:
            self.close()
            raise

    def _begin(self) -> Corrections:
        """Reads what is there, and leaves the file ready for the next line."""
        self._file.seek(0)
        text = self._file.read().decode("utf-8", "surrogateescape")
        if not text:
            self._write(_line(COLUMNS))
            flush_folder(self.path.parent)
            return Corrections()
        if not _is_journal(text):
            raise UsageError(
                f"{escape(str(self.path))}: was not written by topwork review. Use another --corrections file."
            )
        whole = _whole_lines(text)
        made = _parsed(whole, escape(str(self.path)))
        self._file.truncate(len(whole.encode("utf-8", "surrogateescape")))
        if len(whole) > len(text):
            self._write("\n")
        return made

    def add(self, correction: Correction) -> Correction:
        """Writes one decision and flushes it to disk.

        Raises:
            TopworkError: it could not be written, and does not count.
        """
        stamped = replace(correction, time=datetime.now(UTC).isoformat(timespec="seconds"))
        end = self._file.seek(0, os.SEEK_END)
        try:
            self._write(_line([getattr(stamped, column) for column in COLUMNS]))
        except OSError as error:
            self._file.truncate(end)
            raise _cannot_write(self.path, error) from None
        self.corrections.add(stamped)
        return stamped

    def close(self) -> None:
        """Releases the file for other writers."""
        if self._file is not None:
            self._file.close()
        self._lock.close()

    def _write(self, text: str) -> None:
        data = text.encode("utf-8", "surrogateescape")
        while data:  # without a buffer, which would keep what a full disk refused and write it later
            data = data[self._file.write(data) :]
        os.fsync(self._file.fileno())


def _is_journal(text: str) -> bool:
    return text.partition("\n")[0].rstrip("\r") == ",".join(COLUMNS)


def _whole_lines(text: str) -> str:
    """Without what was being written when the writer was killed: the time, which ends every line, is not whole."""
    last = text[text.rfind("\n") + 1 :]
    if len(last) > _TIME_LENGTH and text.count('"') % 2 == 0 and _is_time(last[-_TIME_LENGTH:]):
        return text + "\n"  # whole but for its end: an editor leaves that out
    text = text[: len(text) - len(last)]
    while text.count('"') % 2:  # the line began further up: a label may hold a line break
        text = text[: text.rstrip("\n").rfind("\n") + 1]
    return text


def _is_time(text: str) -> bool:
    try:
        return datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        return False


def _line(values: Iterable[str]) -> str:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\n").writerow(values)
    return buffer.getvalue()


def _cannot_write(path: Path, error: OSError) -> TopworkError:
    return TopworkError(f"{escape(str(path))}: cannot be written: {error_reason(error)}.")
