"""A server process with a small model, and clients for it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any


@dataclass
class Served:
    """A running server."""

    process: subprocess.Popen[str]
    port: int

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, body (parsed when JSON) and headers of one request on a connection of its own."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            content = response.read()
            names = {key.lower(): value for key, value in response.getheaders()}
            is_json = names.get("content-type") == "application/json"
            return response.status, json.loads(content) if is_json else content.decode(), names
        finally:
            connection.close()

    def fetch(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        """Status, raw body and headers of one GET."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read(), {key.lower(): value for key, value in response.getheaders()}
        finally:
            connection.close()

    def talk(self, data: bytes, seconds: float = 20.0) -> bytes:
        """Whatever comes back for some raw bytes, until the server closes or the time is over."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as connection:
            with contextlib.suppress(OSError):
                connection.sendall(data)
            return read_all(connection)

    def end(self, seconds: float = 40.0) -> int:
        """SIGTERM; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)


def read_all(connection: socket.socket) -> bytes:
    """Everything until the other side closes."""
    found = b""
    with contextlib.suppress(OSError):
        while chunk := connection.recv(65536):
            found += chunk
    return found


# `topwork app` asks for no backbone: this one makes a model in seconds.
SMALL_APP = """
import sys
from functools import partial
from topwork import cli
from topwork.server import start
start.FitSettings = partial(start.FitSettings, backbone="random:test_efficientnet", size=64, near_duplicates=False)
cli.main(sys.argv[1:])
"""


@contextlib.contextmanager
def serving(*models: Path | str, verb: str = "serve", ready: str = "/ready", **settings: object) -> Iterator[Served]:
    """``topwork serve``, or another verb that serves, on a free port, ready."""
    options = [text for key, value in settings.items() for text in (f"--{key.replace('_', '-')}", str(value))]
    start = ["-c", SMALL_APP] if verb == "app" else ["-m", "topwork.cli"]
    command = [sys.executable, *start, verb, *map(str, models), "--port", "0", "--json", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    try:
        assert process.stdout is not None
        served = Served(process, int(json.loads(process.stdout.readline())["url"].rpartition(":")[2]))
        wait_until(lambda: served.ask("GET", ready)[0] == 200)
        yield served
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def wait_until(condition: Any, seconds: float = 60.0) -> None:
    """Waits for something that takes a moment."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if condition():
                return
        time.sleep(0.05)
    raise AssertionError("it did not happen in time")


def form(*files: tuple[str, bytes], boundary: str = "--border--") -> tuple[bytes, dict[str, str]]:
    """Body and headers of a form with files."""
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="images"; filename="{name}"\r\n\r\n'.encode()
        + data
        + b"\r\n"
        for name, data in files
    ]
    return b"".join([*parts, f"--{boundary}--\r\n".encode()]), {
        "Content-Type": f'multipart/form-data; boundary="{boundary}"'
    }
