"""How fast ``predict`` is beside transformers' image-classification pipeline, and whether its memory stays flat.

    python benchmarks/predict.py RUN IMAGES [--n 1000 --many 20000] [--rounds 3]

Both ways answer the same image files with the same model folder in the same process state (a fresh process each, two
torch threads), turn about, ``--rounds`` times; the ratio of the best rounds is what counts, not seconds. Beside it stands
the ratio of processor time, which other work on the machine moves less. Where there are fewer files than asked, the list is repeated. Memory: the largest resident size of a ``predict`` over ``--n`` and over
``--many`` images. The last line is the time from the start of the command to the answer for one image.

Results are in docs/lab-log.md, with the machine they were taken on.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

OURS = """
import sys, time, json
from topwork.export.predictor import Predictor
paths = sys.stdin.read().splitlines()
predictor = Predictor(sys.argv[1])
predictor.predict(paths[:32])
started, cpu = time.perf_counter(), time.process_time()
labels = [p.label for p in predictor.stream(paths)]
print(json.dumps({"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu, "labels": labels}))
"""
THEIRS = """
import sys, time, json, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(2)
from transformers import pipeline
from transformers.utils import logging
logging.set_verbosity_error()
paths = sys.stdin.read().splitlines()
ask = pipeline("image-classification", model=sys.argv[1], device="cpu")
ask(paths[:32], batch_size=int(sys.argv[2]))
started, cpu = time.perf_counter(), time.process_time()
labels = [rows[0]["label"] for rows in ask(paths, top_k=1, batch_size=int(sys.argv[2]))]
print(json.dumps({"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu, "labels": labels}))
"""


def main() -> None:
    """Runs and prints all three measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--many", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    files = sorted(str(p) for p in asked.images.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    paths = list(islice(cycle(files), asked.n))
    model = asked.run / "model" if (asked.run / "model").is_dir() else asked.run
    predict_rates(model, paths, asked.rounds)
    for n in (asked.n, asked.many):
        print(f"predict over {n} images: largest resident size {memory(model, list(islice(cycle(files), n)))} MB")
    print(f"from the command to the answer for one image: {cold(model, files[0]):.2f} s")


def predict_rates(model: Path, paths: list[str], n_rounds: int) -> tuple[dict[str, float], int]:
    """Prints and returns images per second by name, and on how many images topwork and transformers agree."""
    best: dict[str, float] = {}
    cpu: dict[str, float] = {}
    labels: dict[str, list[str]] = {}
    for _ in range(n_rounds):
        for name, arguments in {
            "topwork": [OURS],
            "transformers 1": [THEIRS, "1"],
            "transformers 16": [THEIRS, "16"],
        }.items():
            command = [sys.executable, "-c", arguments[0], str(model), *arguments[1:]]
            done = subprocess.run(command, input="\n".join(paths), capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            best[name] = max(best.get(name, 0.0), len(paths) / found["seconds"])
            cpu[name] = min(cpu.get(name, float("inf")), 1000 * found["cpu"] / len(paths))
            labels[name] = found["labels"]
    for name, rate in best.items():
        print(f"{name:>16}: {rate:7.1f} images/s, {cpu[name]:.1f} ms of processor time an image")
    same = sum(a == b for a, b in zip(labels["topwork"], labels["transformers 1"], strict=True))
    theirs = max(best["transformers 1"], best["transformers 16"])
    ratio = min(cpu["transformers 1"], cpu["transformers 16"]) / cpu["topwork"]
    print(
        f"ratio to the better batch size: {best['topwork'] / theirs:.1f}, in processor time {ratio:.1f}; "
        f"same class on {same} of {len(paths)} images"
    )
    return best, same


def memory(model: Path, paths: list[str]) -> int:
    """Largest resident size in MB of the command over some images."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "topwork.cli",
            "predict",
            str(model),
            "-",
            "--out",
            f"{folder}/rows.jsonl",
            "--quiet",
        ]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        assert process.stdin is not None
        process.stdin.write("\n".join(paths))
        process.stdin.close()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
    return int(usage.ru_maxrss // (1024 if sys.platform == "linux" else 1024**2))


def cold(model: Path, image: str, n_rounds: int = 5) -> float:
    """Least seconds of the whole command for one image."""
    seconds = []
    for _ in range(n_rounds):
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "topwork.cli", "predict", str(model), image], capture_output=True, check=True
        )
        seconds.append(time.perf_counter() - started)
    return min(seconds)


if __name__ == "__main__":
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY, (
        "a limit on memory would hide its growth"
    )
    main()
