"""A ``predict`` over thousands of images, killed again and again and started again: is the file that of an undisturbed one?

    python benchmarks/kill_predict.py RUN IMAGES [--n 5000 --kills 5 --seed 0]

SIGKILL comes after a random number of rows. Where there are fewer images than asked the list is repeated. Prints rows,
kills and whether the two files are equal byte for byte. Results are in docs/lab-log.md.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path


def main() -> int:
    """Runs both ways and compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--n", type=int, default=5000)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    files = sorted(str(p) for p in asked.images.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    names = "\n".join(islice(cycle(files), asked.n))
    rng = random.Random(asked.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, torn = Path(folder, "whole.csv"), Path(folder, "torn.csv")
        predict(asked.run, names, whole).wait()
        stops = sorted(rng.randrange(asked.n) for _ in range(asked.kills))
        resumed = [killed_at(asked.run, names, torn, stop) for stop in stops]
        last = predict(asked.run, names, torn)
        n_resumed = json.loads(last.communicate()[0])["n_resumed"]
        same = whole.read_bytes() == torn.read_bytes()
        n_rows = whole.read_bytes().count(b"\n") - 1
    print(
        f"{n_rows} rows; killed {asked.kills} times with {resumed} rows written, the last start took over {n_resumed}"
    )
    print("the same file, byte for byte" if same else "ANOTHER FILE")
    return 0 if same else 1


def predict(run: Path, names: str, out: Path) -> subprocess.Popen[str]:
    """The command, with its list of images given."""
    command = [sys.executable, "-m", "topwork.cli", "predict", str(run), "-", "--out", str(out), "--json", "--quiet"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    process.stdin.write(names)
    process.stdin.close()
    process.stdin = None
    return process


def killed_at(run: Path, names: str, out: Path, n_rows: int) -> int:
    """Starts the command, kills it once its journal has so many rows, and returns how many it has."""
    process, journal = predict(run, names, out), out.with_name(f".{out.name}.journal")
    while process.poll() is None and rows_of(journal) < n_rows:
        time.sleep(0.01)
    process.kill()
    process.wait()
    return rows_of(journal)


def rows_of(journal: Path) -> int:
    """Whole rows in a journal; its first line is about the work."""
    return max(0, journal.read_bytes().count(b"\n") - 1) if journal.is_file() else 0


if __name__ == "__main__":
    sys.exit(main())
