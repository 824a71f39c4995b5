"""The examples in deploy/ ask for options that exist, end the server as it wants to be ended, and listen on this machine."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from topwork.server.web import SHUTDOWN_SECONDS
from topwork.settings import ServeSettings

DEPLOY = Path(__file__).parents[2] / "deploy"
OPTIONS = {f"--{item.name.replace('_', '-')}" for item in fields(ServeSettings)} | {"--quiet", "--json", "--no-auth"}


def commands() -> dict[str, list[str]]:
    """What each example runs."""
    docker, compose, unit = ((DEPLOY / name).read_text() for name in ("Dockerfile", "compose.yaml", "topwork.service"))
    return {
        "Dockerfile": [
            word for line in re.findall(r"^(?:ENTRYPOINT|CMD) (.*)", docker, re.MULTILINE) for word in json.loads(line)
        ],
        "compose.yaml": ["topwork", "serve", *json.loads(re.findall(r"command: (.*)", compose)[0])],
        "topwork.service": shlex.split(re.findall(r"ExecStart=(.*)", unit)[0]),
    }


@pytest.mark.parametrize("name", ["Dockerfile", "compose.yaml", "topwork.service"])
def test_every_option_is_one_of_serve(name):
    words = commands()[name]
    assert words[1] == "serve"
    assert {word for word in words if word.startswith("--")} <= OPTIONS


def test_there_is_time_to_answer_what_was_accepted():
    for name, pattern in (("compose.yaml", r"stop_grace_period: (\d+)s"), ("topwork.service", r"TimeoutStopSec=(\d+)")):
        assert int(re.findall(pattern, (DEPLOY / name).read_text())[0]) > SHUTDOWN_SECONDS


def test_nobody_outside_this_machine_is_let_in_unasked():
    assert "127.0.0.1:8000:8000" in (DEPLOY / "compose.yaml").read_text()
    assert "--host" not in commands()["topwork.service"]
    assert re.search(r"^USER \d+", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
