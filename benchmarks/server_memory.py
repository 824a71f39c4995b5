"""Memory of a serving process over rounds of large uploads: it has to come back.

    python benchmarks/server_memory.py RUN [--rounds 10] [--uploads 200] [--megapixels 10] [--clients 8] [--no-trim]

Uploads one photograph of that size again and again, ``clients`` at a time, and prints the resident memory of the server
after each round. ``--no-trim`` keeps the server from asking glibc for its memory back, as on systems without
malloc_trim. Results are in docs/lab-log.md.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

UNTRIMMED = """
import topwork.server.queue
topwork.server.queue.give_memory_back = lambda: None
from topwork.cli import main
main()
"""


def main() -> None:
    """Starts a server, uploads, measures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--uploads", type=int, default=200)
    parser.add_argument("--megapixels", type=float, default=10)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--format", default="JPEG")
    parser.add_argument("--no-trim", action="store_true")
    asked = parser.parse_args()
    side = round((asked.megapixels * 1e6) ** 0.5)
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side // 40, side // 40, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((side, side), Image.Resampling.BICUBIC).save(buffer, asked.format)
    start = ["-c", UNTRIMMED] if asked.no_trim else ["-m", "topwork.cli"]
    command = [sys.executable, *start, "serve", str(asked.run), "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        wait(url)
        print(f"at rest: {resident(process.pid):.0f} MB")
        with ThreadPoolExecutor(asked.clients) as clients:
            for number in range(1, asked.rounds + 1):
                started = time.perf_counter()
                list(clients.map(lambda _: post(url, buffer.getvalue()), range(asked.uploads)))
                seconds = time.perf_counter() - started
                print(
                    f"round {number}: {resident(process.pid):.0f} MB, {asked.uploads / seconds:.0f} uploads/s",
                    flush=True,
                )
        process.terminate()


def wait(url: str) -> None:
    """Until the server is ready."""
    while True:
        try:
            urllib.request.urlopen(f"{url}/ready", timeout=2)
        except OSError:
            time.sleep(0.1)
        else:
            return


def post(url: str, data: bytes) -> None:
    """One upload."""
    headers = {"Content-Type": "application/octet-stream"}
    urllib.request.urlopen(urllib.request.Request(f"{url}/predict", data, headers), timeout=60).read()


def resident(pid: int) -> float:
    """MB of a process."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
