"""Good and hostile requests mixed: the good ones are all answered rightly, the others never get a 5xx but 503 and 504.

    python benchmarks/hostile_serve.py RUN IMAGE [--requests 20000] [--clients 32] [--seed 0]

A third are sound requests for one image whose answer is known. The rest: mutated requests, random bytes, broken
forms, wrong lengths, wrong types, truncated images, huge heads, connections that say nothing and leave, and some that
are too slow. The seed fixes them all. Results are in docs/lab-log.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))
from serve import resident, start

ALLOWED = {200, 400, 404, 405, 408, 411, 413, 415, 422, 503, 504}


def main() -> None:
    """Runs the requests and prints the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    photo = asked.image.read_bytes()
    process, port = start(asked.run)
    try:
        expected = asyncio.run(send(port, sound(photo)))
        before, started = resident(process.pid), time.perf_counter()
        counts = asyncio.run(mixed(port, photo, asked, expected))
        print(
            f"{asked.requests} requests in {time.perf_counter() - started:.0f} s, resident {before} -> {resident(process.pid)} MB"
        )
        for kind, found in sorted(counts.items()):
            print(f"  {kind:>10}: {dict(sorted(found.items(), key=str))}")
        statuses = {status for found in counts.values() for status in found if isinstance(status, int)}
        print(f"statuses that are not allowed: {sorted(statuses - ALLOWED) or 'none'}")
        print(f"wrong answers to sound requests: {counts['sound']['other answer']}")
        print(f"still alive: {process.poll() is None}")
    finally:
        process.send_signal(signal.SIGTERM)
        print(f"exit status {process.wait(40)}")


def sound(photo: bytes, more: str = "") -> bytes:
    """A good request."""
    return (
        f"POST /predict HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{more}Content-Length: {len(photo)}\r\n\r\n".encode()
        + photo
    )


def hostile(photo: bytes, rng: random.Random) -> tuple[str, bytes]:
    """A bad request and its kind."""
    kind = rng.choice(["mutated", "mutated", "random", "form", "length", "type", "truncated", "head", "silent", "path"])
    if kind == "mutated":
        data = bytearray(sound(photo))
        for _ in range(rng.randint(1, 8)):
            place = rng.randrange(200) if rng.random() < 0.5 else rng.randrange(len(data))
            data[place : place + rng.randint(0, 4)] = rng.randbytes(rng.randint(0, 4))
        return kind, bytes(data)
    if kind == "random":
        return kind, rng.randbytes(rng.randint(1, 3000))
    if kind == "form":
        parts = b"".join(
            rng.choice(
                [b"--b\r\n", b"Content-Disposition: form-data; filename=a\r\n\r\n", photo[:500], b"\r\n", b"--b--"]
            )
            for _ in range(9)
        )
        return kind, sound(parts, "Content-Type: multipart/form-data; boundary=b\r\n")
    if kind == "length":
        length = rng.choice(["-1", "99999999999", "1e9", "0", "12", "20000001", "abc", "+5"])
        return (
            kind,
            f"POST /predict HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n".encode()
            + photo[:100],
        )
    if kind == "type":
        return kind, sound(
            photo[:200], f"Content-Type: {rng.choice(['application/json', 'text/html', 'multipart/mixed', 'x'])}\r\n"
        )
    if kind == "truncated":
        return kind, sound(photo[: rng.randrange(len(photo))])
    if kind == "head":
        return kind, b"GET / HTTP/1.1\r\nHost: x\r\n" + b"".join(
            b"X-%d: %s\r\n" % (n, b"y" * 900) for n in range(rng.randint(1, 60))
        ) + b"Connection: close\r\n\r\n"
    if kind == "silent":
        return kind, b""
    return (
        kind,
        f"GET /{'%2e' * rng.randint(0, 9)}/{rng.randbytes(20).hex()} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode(),
    )


async def mixed(port: int, photo: bytes, asked: Any, expected: tuple[Any, Any]) -> dict[str, Counter[Any]]:
    """Status counts of every kind of request."""
    rng = random.Random(asked.seed)
    counts: dict[str, Counter[Any]] = {"sound": Counter()}
    left = iter(range(asked.requests))

    async def client() -> None:
        for _ in left:
            if rng.random() < 1 / 3:
                status, answer = await send(port, sound(photo))
                counts["sound"][status] += 1
                if status == 200 and answer != expected[1]:
                    counts["sound"]["other answer"] += 1
            else:
                kind, data = hostile(photo, rng)
                status, _ = await send(port, data, has_end=rng.random() < 0.8)
                counts.setdefault(kind, Counter())[status] += 1

    await asyncio.gather(*(client() for _ in range(asked.clients)))
    return counts


async def send(port: int, data: bytes, has_end: bool = False) -> tuple[Any, Any]:
    """Status and body; "closed" where the server closed without a word, "left" where the client gave up."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(data)
        if has_end and writer.can_write_eof():
            writer.write_eof()
        answer = await asyncio.wait_for(reader.read(), 60 if data else 0.05)
        writer.close()
    except TimeoutError:
        writer.close()
        return "left", None
    except OSError:
        return "closed", None
    if not answer:
        return "closed", None
    head, _, body = answer.partition(b"\r\n\r\n")
    try:
        return int(head.split(b" ")[1]), json.loads(body)
    except ValueError:
        return int(head.split(b" ")[1]), body


if __name__ == "__main__":
    main()
