"""Corrected labels: laid over the data, written so that a kill loses nothing confirmed, refused with the line's number."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drawing import draw_folders
from topwork.data import corrections as module
from topwork.data.corrections import COLUMNS, REMOVED, Correction, Corrections, Journal, read_corrections
from topwork.data.manifest import scan
from topwork.data.samples import Rules
from topwork.errors import TopworkError, UsageError

A, B = "a" * 64, "b" * 64


def written(path: Path, *made: Correction) -> Path:
    journal = Journal(path)
    for correction in made:
        journal.add(correction)
    journal.close()
    return path


def test_the_last_decision_that_was_not_undone_counts() -> None:
    found = Corrections([Correction(A, "x", "relabel", "cat"), Correction(A, "x", "keep"), Correction(A, "x", "undo")])
    standing = found.of(A, "elsewhere")
    assert standing is not None
    assert standing.label == "cat"
    assert found.n_made(A) == 3
    found.add(Correction(A, "x", "undo"))
    found.add(Correction(A, "x", "undo"))
    assert found.of(A, "x") is None
    assert found.standing == {}


def test_labels_are_laid_over_the_images_which_stay_as_they_are(tmp_path: Path) -> None:
    data = draw_folders(tmp_path / "data", n_each=4)
    before = scan(data)
    files = {path: path.read_bytes() for path in data.rglob("*.jpg")}
    first, second, third = (before.samples[row] for row in (0, 1, 2))
    table = written(
        tmp_path / "c.csv",
        Correction(first.content_hash, first.path, "relabel", "square"),
        Correction(second.content_hash, second.path, "remove"),
        Correction(third.content_hash, third.path, "keep"),
        Correction(B, "of another dataset", "remove"),
    )
    after = scan(data, rules=Rules(corrections=table))
    labels = {sample.path: sample.label for sample in after.samples}
    assert labels == {s.path: "square" if s is first else s.label for s in before.samples if s is not second}
    assert [(reject.path, reject.reason) for reject in after.rejects] == [(second.path, REMOVED)]
    assert (
        "c.csv: 1 label changed, 1 image excluded. 1 decision for images that are not in this dataset." in after.notes
    )
    assert {path: path.read_bytes() for path in data.rglob("*.jpg")} == files
    assert after.digest != before.digest


def test_a_table_of_paths_and_labels_is_enough(tmp_path: Path) -> None:
    data = draw_folders(tmp_path / "data", n_each=3)
    path = scan(data).samples[0].path
    (tmp_path / "c.csv").write_text(f"path,label\n{path},triangle\n")
    after = scan(data, rules=Rules(corrections=tmp_path / "c.csv"))
    assert after.samples[0].label == "triangle"
    assert after.classes == ("disc", "square", "triangle")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("path,class\nx,cat\n", "must have the columns path"),
        ("path,label\nx,cat\ny\n", "line 3: does not have as many fields"),
        ("path,label\nx,cat\ny,dog,more\n", "line 3: does not have as many fields"),
        ("path,label\nx,\n", "line 2: has no label"),
        ("path,label\n,cat\n", "line 2: has no image"),
        ("path,label,decision\nx,cat,drop\n", "line 2: decision drop: use relabel"),
        ('path,label\nx,"cat\n', "line [123]: no CSV"),
    ],
)
def test_a_line_that_says_nothing_is_named(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text(text)
    with pytest.raises(UsageError, match=said):
        read_corrections(tmp_path / "c.csv")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none.csv: no such file"):
        read_corrections(tmp_path / "none.csv")


@given(label=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00\r"), min_size=1), data=st.data())
def test_any_label_survives_and_a_torn_line_is_left_out(label: str, data: st.DataObject, tmp_path_factory) -> None:
    """The journal of a killed process: cut anywhere, what was whole is read, and the next decision goes on from there."""
    folder = tmp_path_factory.mktemp("journal")
    whole = written(
        folder / "whole.csv", Correction(A, "x", "relabel", label), Correction(B, "y", "remove"), Correction(A, "x", "undo")
    )  # fmt: skip
    found = read_corrections(whole).standing
    assert set(found) == {B}
    raw = whole.read_bytes()
    cut = data.draw(st.integers(len(",".join(COLUMNS)) + 1, len(raw)))
    torn = folder / "torn.csv"
    torn.write_bytes(raw[:cut])
    n_before = read_corrections(torn).n_made(A)
    stack = read_corrections(torn).of(A, "x")
    assert stack is None or stack.label == label
    written(torn, Correction(A, "x", "keep"))
    assert read_corrections(torn).n_made(A) == n_before + 1
    assert torn.read_bytes().startswith(raw[: len(",".join(COLUMNS)) + 1])


def test_a_confirmed_decision_survives_a_kill(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from topwork.data.corrections import *\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "for n in range(10_000):\n"
        "    journal.add(Correction('%064d' % n, 'x', 'remove'))\n"
        "    print(n, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "c.csv")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(20):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    confirmed = [int(line) for line in process.communicate()[0].split()]
    found = read_corrections(tmp_path / "c.csv").standing
    last = max(confirmed, default=19)
    assert all(f"{n:064d}" in found for n in range(last + 1))
    written(tmp_path / "c.csv", Correction(A, "x", "keep"))  # the lock of the dead is no obstacle


def test_what_cannot_be_written_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk: the decision is refused, and the file holds what it held."""
    journal = Journal(tmp_path / "c.csv")
    journal.add(Correction(A, "x", "keep"))
    before = (tmp_path / "c.csv").read_bytes()

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "fsync", full)
        with pytest.raises(TopworkError, match="no space left on device"):
            journal.add(Correction(B, "y", "remove"))
    assert journal.corrections.of(B, "y") is None
    assert (tmp_path / "c.csv").read_bytes() == before
    journal.add(Correction(B, "y", "keep"))
    journal.close()
    assert set(read_corrections(tmp_path / "c.csv").standing) == {A, B}


def test_one_writer_at_a_time_and_no_stranger_s_file(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "c.csv")
    with pytest.raises(UsageError, match="another review has it open"):
        Journal(tmp_path / "c.csv")
    journal.close()
    (tmp_path / "mine.csv").write_text("path,label\nx,cat\n")
    with pytest.raises(UsageError, match="was not written by topwork review"):
        Journal(tmp_path / "mine.csv")
    assert (tmp_path / "mine.csv").read_text() == "path,label\nx,cat\n"
    with pytest.raises(TopworkError, match=r"d.csv: cannot be written"):
        Journal(tmp_path / "c.csv" / "d.csv")  # below a file
