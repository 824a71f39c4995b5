"""A disk that is full, read-only or failing: one clear line that names the file, and the previous result stays whole."""

from __future__ import annotations

import ctypes
import errno
import json
import logging
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from drawing import draw_folders
from topwork import files
from topwork.commands.fit import fit
from topwork.errors import TopworkError
from topwork.export.batch import predict_to_file
from topwork.export.predictor import Predictor
from topwork.files import writable_folder
from topwork.settings import FitSettings

SETTINGS = FitSettings(backbone="random:test_efficientnet", near_duplicates=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return draw_folders(tmp_path_factory.mktemp("data"), n_each=6, shapes=("disc", "square"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A finished run, and its bytes."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    fit(data, folder, SETTINGS)
    return folder


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def file_size_limit(n_bytes: int) -> Iterator[None]:
    """No file may grow beyond this, as on a full disk: the C++ libraries meet the same error as Python."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("n_bytes", [1_000, 30_000])
def test_a_full_disk_is_named_and_the_old_run_stays_whole(data, run, tmp_path, monkeypatch, n_bytes):
    monkeypatch.setenv("TOPWORK_CACHE", str(tmp_path / "cache"))
    before = contents(run)
    with pytest.raises(TopworkError) as raised, file_size_limit(n_bytes):
        fit(data, run, SETTINGS, overwrite=True)
    text = str(raised.value)
    assert "large" in text or "space" in text or "written" in text
    assert str(tmp_path) in text or str(run.parent) in text, "the file or folder is named"
    assert "\n" not in text
    assert contents(run) == before
    fit(data, tmp_path / "after", SETTINGS)  # once there is space, nothing that was left behind is in the way


@contextmanager
def permissions_that_count(folder: Path) -> Iterator[None]:
    """Nothing below a folder may be written, not even by root: a container's user meets the same with a mounted cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    rights = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
    assert libc.capget(header, rights) == 0
    everything = rights[0]
    inside = [folder, *folder.rglob("*")]
    for path in inside:
        path.chmod(0o555 if path.is_dir() else 0o444)
    rights[0] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    assert libc.capset(header, rights) == 0
    try:
        yield
    finally:
        rights[0] = everything
        assert libc.capset(header, rights) == 0
        for path in inside:
            path.chmod(0o755 if path.is_dir() else 0o644)


@pytest.mark.skipif(sys.platform != "linux", reason="takes root's rights away as Linux does")
def test_a_cache_that_may_not_be_written_is_read_with_one_note(data, tmp_path, own_cache, monkeypatch):
    # A logger of the test's own: what other libraries in this process do to the shared ones does not matter.
    notes, log = [], logging.Logger("topwork.cache")
    log.addFilter(lambda record: notes.append(record.getMessage()))
    monkeypatch.setattr(files, "_LOG", log)
    cache = own_cache
    fit(data, tmp_path / "run", SETTINGS)
    before = contents(cache)
    writable_folder.cache_clear()
    with permissions_that_count(cache):
        with pytest.raises(PermissionError):
            (cache / "x").touch()
        fit(data, tmp_path / "again", SETTINGS)
        more = draw_folders(tmp_path / "more", n_each=7, shapes=("disc", "square"))  # one new image per class
        fit(more, tmp_path / "with new images", SETTINGS)
    writable_folder.cache_clear()
    assert contents(cache) == before
    assert answers(tmp_path / "again") == answers(tmp_path / "run")
    timing = json.loads((tmp_path / "again" / "evaluation.json").read_text())["timing"]
    assert timing["n_embedded"] == 0, timing
    assert notes == [
        f"{cache}: cannot be written (permission denied): what is there is used, and nothing new is kept. "
        "TOPWORK_CACHE names another folder."
    ]


def test_without_a_cache_a_command_works_and_leaves_no_temporary_folder(data, tmp_path):
    command = [sys.executable, "-m", "topwork.cli", "scan", str(data), "--quick", "--json"]
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "temporary").mkdir()
    environment = os.environ | {
        "TOPWORK_CACHE": str(tmp_path / "file" / "cache"),
        "TMPDIR": str(tmp_path / "temporary"),
    }
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert json.loads(ended.stdout)["n_used"] == 12
    assert ended.stderr.count("TOPWORK_CACHE") == 1
    assert "file/cache: cannot be written (not a directory)" in ended.stderr
    assert not list((tmp_path / "temporary").glob("topwork*"))
    assert (tmp_path / "file").read_text() == "in the way"


def answers(folder: Path) -> tuple[bytes, dict[str, object]]:
    """What a run answers: its logits, and its figures without times."""
    evaluation = json.loads((folder / "evaluation.json").read_text())
    return (folder / "predictions.parquet").read_bytes(), {
        key: evaluation[key] for key in evaluation if key != "timing"
    }


def flipped(data: bytes) -> bytes:
    """One bit in every hundredth byte is another."""
    changed = bytearray(data)
    changed[50::100] = bytes(byte ^ 0x40 for byte in changed[50::100])
    return bytes(changed)


@pytest.mark.parametrize(
    "damage",
    [
        flipped,
        pytest.param(lambda data: data[: len(data) // 2], id="half", marks=pytest.mark.slow),
        pytest.param(lambda data: b"", id="empty", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_cache_changes_no_answer_of_a_fit(data, tmp_path, own_cache, damage):
    fit(data, tmp_path / "run", SETTINGS)
    before = answers(tmp_path / "run")
    for part in ("facts", "traits", "features", "backbones"):
        files = [path for path in own_cache.rglob("*") if path.is_file() and f"/{part}" in path.as_posix()]
        assert files
        for path in files:
            path.write_bytes(damage(path.read_bytes()))
        fit(data, tmp_path / part, SETTINGS)
        assert answers(tmp_path / part) == before, part


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["replace", "fsync", "mkdir"])
def test_every_operation_may_fail(data, run, tmp_path, monkeypatch, operation):
    """The 1st, 2nd, 3rd ... call fails, until a fit gets through."""
    before, real = contents(run), getattr(os, operation)
    for number in range(200):
        calls = 0
        monkeypatch.setenv("TOPWORK_CACHE", str(tmp_path / f"cache-{number}"))

        def failing(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == number + 1:  # noqa: B023 - called within the round
                raise OSError(errno.EIO, os.strerror(errno.EIO), args[0] if isinstance(args[0], str | Path) else None)
            return real(*args, **kwargs)

        out = tmp_path / f"run-{number}"
        with monkeypatch.context() as patch:
            patch.setattr(os, operation, failing)
            try:
                fit(data, out, SETTINGS)
            except TopworkError as error:
                assert "input/output error" in str(error).lower()  # noqa: PT017
                assert "\n" not in str(error)  # noqa: PT017
                assert not (out / "evaluation.json").exists(), "no success is ever recorded"
        if calls <= number:
            assert (out / "evaluation.json").exists()
            break
    else:
        pytest.fail("it never got through")
    assert number > 2, "the operation is used"
    assert contents(run) == before


def test_predictions_on_a_full_disk_are_named_and_go_on(data, run, tmp_path):
    predictor, inputs = Predictor(run), sorted(str(path) for path in data.rglob("*.jpg"))
    out = tmp_path / "p.csv"
    with pytest.raises(TopworkError, match=r"p\.csv"), file_size_limit(600):
        predict_to_file(predictor, inputs, out)
    assert not out.exists()
    predict_to_file(predictor, inputs, out)
    assert len(out.read_text().splitlines()) == 1 + len(inputs)


@pytest.mark.parametrize(
    ("command", "unbuffered"),
    [
        ("predict RUN IMAGE --json", ""),
        pytest.param("models", "1", marks=pytest.mark.slow),
        ("fit missing --json", ""),
        pytest.param("fit --help", "", marks=pytest.mark.slow),
        ("--version", "1"),
    ],
)
def test_an_answer_that_cannot_be_printed_is_one_line(command, unbuffered, data, run):
    words = command.replace("RUN", str(run)).replace("IMAGE", str(data / "disc" / "disc_0.jpg")).split()
    start = [sys.executable, "-m", "topwork.cli", *words]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        ended = subprocess.run(start, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    assert ended.returncode != 0
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert ("no space left" in ended.stderr) != ("missing" in command), (
        "an error is said rather than where it was printed"
    )
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(start, stdout=writing, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    os.close(writing)
    assert ended.returncode != 0
    assert ended.stderr.count("\n") == ("missing" in command), "who closed the pipe needs no message"


def test_a_stderr_that_cannot_be_written_ends_no_work(data, tmp_path):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "topwork.cli", "fit", str(data), "--backbone", "random:test_efficientnet"]
        subprocess.run([*command, "--out", str(tmp_path / "run")], stdout=subprocess.PIPE, stderr=full, check=True)
    assert (tmp_path / "run" / "report.html").is_file()
