"""The server under load on loopback: a thousand clients at once, and its latency beside the bare engine.

    python benchmarks/serve.py RUN IMAGE [--clients 1000 --requests 3000]

Clients run in a process of their own. Each opens a connection for each request, sends the image and waits for the
answer; every status is counted. The latency is that of one client alone, the median of 200 requests on a kept
connection, beside the same images given to ``Predictor`` and to the network alone.

Results are in docs/lab-log.md, with the machine they were taken on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from http.client import HTTPConnection
from pathlib import Path
from typing import Any


def main() -> None:
    """Runs and prints all measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=3000)
    asked = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 16_384) if hard > 0 else 16_384, hard))
    photo = asked.image.read_bytes()
    process, port = start(asked.run)
    try:
        latency(asked.run, port, photo)
        crowd(port, photo, asked.clients, asked.requests)
        print(f"resident size after the load: {resident(process.pid)} MB")
        latency(asked.run, port, photo)
    finally:
        process.send_signal(signal.SIGTERM)
        print(f"exit status {process.wait(40)}")


def start(run: Path) -> tuple[subprocess.Popen[str], int]:
    """A ready server on a free port."""
    command = [sys.executable, "-m", "topwork.cli", "serve", str(run), "--port", "0", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    port = int(json.loads(process.stdout.readline())["url"].rpartition(":")[2])
    while True:
        connection = HTTPConnection("127.0.0.1", port)
        try:
            connection.request("GET", "/ready")
            if connection.getresponse().status == 200:
                return process, port
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(0.05)


def latency(run: Path, port: int, photo: bytes, n: int = 200) -> None:
    """Median milliseconds of one image: over HTTP, from the library, and of the network alone."""
    from topwork.export.predictor import Predictor

    predictor = Predictor(run)
    pixels = predictor.load(photo, "").pixels
    assert pixels is not None
    connection = HTTPConnection("127.0.0.1", port)

    def by_http() -> None:
        connection.request("POST", "/predict", photo)
        connection.getresponse().read()

    ways = {
        "HTTP": by_http,
        "library": lambda: predictor.predict([photo]),
        "network": lambda: predictor.engine.run(pixels[None]),
    }
    found = {}
    for name, way in ways.items():
        for _ in range(10):
            way()
        times = []
        for _ in range(n):
            started = time.perf_counter()
            way()
            times.append(1000 * (time.perf_counter() - started))
        found[name] = statistics.median(times)
    print("median of one image: " + ", ".join(f"{name} {ms:.1f} ms" for name, ms in found.items()))


def crowd(port: int, photo: bytes, n_clients: int, n_requests: int) -> None:
    """All clients at once, until every request has been answered."""
    started = time.perf_counter()
    statuses, seconds = asyncio.run(_crowd(port, photo, n_clients, n_requests))
    spent = time.perf_counter() - started
    print(f"{n_clients} clients, {n_requests} requests: {dict(statuses)}, {statuses[200] / spent:.0f} images/s")
    print(f"  answered after: median {statistics.median(seconds):.2f} s, longest {max(seconds):.2f} s")


async def _crowd(port: int, photo: bytes, n_clients: int, n_requests: int) -> tuple[Counter[Any], list[float]]:
    statuses: Counter[Any] = Counter()
    seconds: list[float] = []
    left = iter(range(n_requests))
    ask = (
        f"POST /predict HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(photo)}\r\n\r\n".encode()
        + photo
    )

    async def client() -> None:
        for _ in left:
            started = time.perf_counter()
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(ask)
                answer = await asyncio.wait_for(reader.read(), 90)
                writer.close()
                statuses[int(answer.split(b" ")[1]) if answer else "no answer"] += 1
            except (OSError, TimeoutError) as error:
                statuses[type(error).__name__] += 1
            seconds.append(time.perf_counter() - started)

    await asyncio.gather(*(client() for _ in range(n_clients)))
    return statuses, seconds


def resident(pid: int) -> int:
    """Resident size of a process in MB."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("VmRSS")).split()[1]) // 1024


if __name__ == "__main__":
    main()
