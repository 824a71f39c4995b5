"""Fifty SIGKILLs at random moments, each resumed: are the final weights those of an uninterrupted run, bit for bit?

    PYTHONPATH=src python benchmarks/kill_resume.py [--kills 50]

Drawn data and a tiny network (tests/training/killed_run.py), so that what is tested is the resuming: phases that unfreeze
stages, moving batch-norm statistics, mixup, color augmentation, moving averages of weights, averages of best epochs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "tests" / "training" / "killed_run.py"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    options = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        # four steps an epoch; a process gets a few steps far before it is killed
        epochs = str(2 * options.kills + 8)
        ended = subprocess.run(
            [sys.executable, str(SCRIPT), folder, "--kills", str(options.kills), "--epochs", epochs],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
    import json

    report = json.loads(ended.stdout)
    same = report["uninterrupted"] == report["killed_and_resumed"]
    print(
        f"{report['n_killed']} kills in {time.perf_counter() - began:.0f} s: {'the same bits' if same else 'DIFFERENT'}"
    )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
