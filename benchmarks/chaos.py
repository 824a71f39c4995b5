"""Hundreds of runs with one random fault each: is anything lost, wrong, or without a name?

    python benchmarks/chaos.py [--n 200 --seed 0 --minutes 12]

Drawn data and a tiny network, so that what is tested is the handling of faults. Each round gives ``fit`` or ``predict`` a
copy of the data and of the cache (or an empty one) and one fault: SIGKILL at a random moment, a disk that is full from a
random file size on, a bit flipped in a random cache or model file, a cache or model file cut short, a second process with
the same output, an image that vanishes or changes. Afterwards the same command runs without a fault. A round fails if

- a command ended with status 0 and its results are not complete and equal to those of an undisturbed run,
- the command without the fault does not succeed or gives another result, or
- any message is a traceback, an "unexpected" error, or does not name what failed.

Children are forked after the imports, so that a round takes seconds. Results are in docs/lab-log.md.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from drawing import draw, draw_folders

FIT = "fit data --out run --backbone random:test_efficientnet --json --quiet"
PREDICT = "predict model data --out answers.csv --json --quiet"
FAULTS = ("kill", "full disk", "flipped bit", "cut file", "second process", "image")


class Broken(Exception):
    """What a round showed to be wrong."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first round, to repeat one")
    parser.add_argument("--minutes", type=float, default=12.0)
    asked = parser.parse_args()
    import_everything()
    began, counts, failures = time.monotonic(), collections.Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        reference = Reference(Path(folder))
        for number in range(asked.first, asked.first + asked.n):
            if time.monotonic() - began > 60 * asked.minutes:
                break
            rng = random.Random(f"{asked.seed}-{number}")
            command, fault = rng.choice([FIT, FIT, PREDICT]), FAULTS[number % len(FAULTS)]
            name = f"{command.split()[0]}, {fault}"
            try:
                counts[f"{name}: {play(reference, Path(folder, 'round'), command, fault, rng)}"] += 1
            except Broken as broken:
                failures.append(f"round {number} ({name}): {broken}")
                print(failures[-1], flush=True)
    for line, n in sorted(counts.items()):
        print(f"{n:4}  {line}")
    n_rounds = sum(counts.values()) + len(failures)
    print(f"{n_rounds} rounds in {time.monotonic() - began:.0f} s, {len(failures)} failed")
    return 1 if failures else 0


def import_everything() -> None:
    """What the commands import, once and before any fork; no thread may have started."""
    import timm  # noqa: F401
    import torch
    import torch._dynamo  # noqa: F401

    import topwork.cli
    import topwork.commands.fit
    import topwork.export.batch
    import topwork.report.run_page  # noqa: F401


class Reference:
    """Data, cache, and what undisturbed commands gave."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "reference"
        self.folder.mkdir()
        draw_folders(self.folder / "data", n_each=8)
        for command in (FIT, PREDICT):
            if command == PREDICT:
                shutil.copytree(self.folder / "run" / "model", self.folder / "model")
            status, said = Child(self.folder, command).end()
            if status:
                raise SystemExit(said)
        self.predictions = pq.read_table(self.folder / "run" / "predictions.parquet")
        self.answers = (self.folder / "answers.csv").read_bytes()


class Child:
    """A command in a forked process, in a folder with ``cache`` for its cache."""

    def __init__(self, folder: Path, command: str, n_bytes: int | None = None) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the object
        self._pid = os.fork()
        if self._pid == 0:
            status = 99
            try:
                os.chdir(folder)
                os.environ["TOPWORK_CACHE"] = str(folder / "cache")
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                os.dup2(self._log.fileno(), 2)
                if n_bytes is not None:
                    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))
                topwork_main(command.split())
            except SystemExit as ended:
                status = int(ended.code or 0)
            except BaseException:  # noqa: BLE001 - what a user would see
                traceback.print_exc()
            finally:
                os._exit(status)

    def kill(self) -> None:
        """SIGKILL."""
        os.kill(self._pid, signal.SIGKILL)

    def end(self) -> tuple[int, str]:
        """Exit status (negative: a signal) and what was said on stderr."""
        status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        self._log.seek(0)
        return status, self._log.read().decode(errors="replace")


def topwork_main(tokens: list[str]) -> None:
    from topwork.cli import main as run_command

    run_command(tokens)


def play(reference: Reference, place: Path, command: str, fault: str, rng: random.Random) -> str:
    """One round; how the command with the fault ended."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for name in ("data", "model", *(["cache"] if rng.random() < 0.6 or fault in ("flipped bit", "cut file") else [])):
        shutil.copytree(reference.folder / name, place / name)
    damaged, ended = disturb(place, command, fault, rng)
    for status, said in ended:
        check_words(status, said)
    if any(status == 0 for status, _ in ended):
        check_results(reference, place, command)
    if damaged is not None and damaged.is_relative_to(place / "model"):
        shutil.copy(reference.folder / damaged.relative_to(place), damaged)
    for image in (reference.folder / "data").rglob("*.jpg"):
        shutil.copy(image, place / image.relative_to(reference.folder))
    if not all(status == 0 for status, _ in ended):
        is_there = (place / "run" / "evaluation.json").exists() or (place / "answers.csv").exists()
        again = command + (" --overwrite" if is_there else "")
        status, said = Child(place, again).end()
        if status:
            raise Broken(f"the command without the fault: status {status}: {said}")
        check_results(reference, place, command)
    return " and ".join(sorted({"done" if s == 0 else "named error" if s > 0 else "killed" for s, _ in ended}))


def disturb(place: Path, command: str, fault: str, rng: random.Random) -> tuple[Path | None, list[tuple[int, str]]]:
    """Runs the command with its fault; the damaged file, and how each process ended."""
    seconds = rng.uniform(0, 4.0 if command == FIT else 1.0)
    if fault == "full disk":
        return None, [Child(place, command, int(10 ** rng.uniform(1.5, 6))).end()]
    if fault in ("flipped bit", "cut file"):
        folders = ["cache", "model"] if command == PREDICT else ["cache"]
        path = rng.choice(sorted(p for name in folders for p in (place / name).rglob("*") if p.is_file()))
        damage(path, fault, rng)
        return path, [Child(place, command).end()]
    first = Child(place, command)
    if fault == "second process":
        time.sleep(seconds / 4)
        second = Child(place, command)
        return None, [first.end(), second.end()]
    time.sleep(seconds)
    if fault == "kill":
        first.kill()
    else:
        image = rng.choice(sorted((place / "data").rglob("*.jpg")))
        change: Callable[[], object] = rng.choice(
            [image.unlink, lambda: draw("cross", 77).save(image), lambda: os.truncate(image, 700)]
        )
        change()
        status, said = first.end()
        check_words(status, said)
        # What it saw depends on the moment: only its words are checked.
        shutil.rmtree(place / "run", ignore_errors=True)
        (place / "answers.csv").unlink(missing_ok=True)
        return None, [(status or 3, said)]
    return None, [first.end()]


def damage(path: Path, fault: str, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if fault == "cut file":
        path.write_bytes(data[: rng.randrange(len(data))])
    elif data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)


def check_words(status: int, said: str) -> None:
    """No traceback, no unnamed error; a failure says one line."""
    if "Traceback" in said or "unexpected " in said:
        raise Broken(said)
    lines = [line for line in said.splitlines() if line.startswith("topwork: ")]
    if status in (1, 2) and (len(lines) != 1 or ": " not in lines[0][9:]):
        raise Broken(f"status {status} with {said!r}")
    if status > 3:
        raise Broken(f"status {status} with {said!r}")


def check_results(reference: Reference, place: Path, command: str) -> None:
    """What was reported as done is there, complete, and what an undisturbed command gives."""
    if command == PREDICT:
        if (place / "answers.csv").read_bytes() != reference.answers:
            raise Broken("other answers")
        return
    for name in ("evaluation.json", "report.html", "model/model.safetensors", "manifest.parquet", "split.json"):
        if not (place / "run" / name).is_file():
            raise Broken(f"run/{name} is missing")
    if not pq.read_table(place / "run" / "predictions.parquet").equals(reference.predictions):
        raise Broken("other predictions")


if __name__ == "__main__":
    sys.exit(main())
