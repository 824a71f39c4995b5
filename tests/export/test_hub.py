"""push and pull with the real client against a small stand-in of the hub on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

GOLDEN = Path(__file__).parents[1] / "golden" / "format-1"
COMMIT = "c0ffee" + "0" * 34


class Hub(BaseHTTPRequestHandler):
    """The calls of the hub that uploading and downloading a model make; files live in memory."""

    files: ClassVar[dict[str, bytes]] = {}
    log: ClassVar[list[str]] = []

    def log_message(self, *args: object) -> None:
        self.log.append(f"{self.command} {self.path}")

    def answer(self, value: object = None, status: int = 200, body: bytes | None = None, **headers: str) -> None:
        content = json.dumps(value).encode() if body is None else body
        self.send_response(status)
        for key, text in headers.items():
            self.send_header(key.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/api/repos/create":
            self.answer({"url": "https://huggingface.co/user/insects", "name": "user/insects", "id": "1"})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self.answer(
                {
                    "commitOid": COMMIT,
                    "commitUrl": f"https://huggingface.co/user/insects/commit/{COMMIT}",
                    "success": True,
                }
            )
        elif "/paths-info/" in self.path:
            self.answer([])
        elif self.path.startswith("/api/validate-yaml"):
            self.answer({"errors": [], "warnings": []})
        else:
            self.answer({"error": "not here"}, 404)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if "/resolve/" in path:
            name = path.rpartition("/")[2]
            if name in self.files:
                digest = hashlib.sha256(self.files[name]).hexdigest()
                self.answer(body=self.files[name], X_Repo_Commit=COMMIT, ETag=f'"{digest}"')
            else:
                self.answer({"error": "no entry"}, 404, X_Error_Code="EntryNotFound")
        elif path.startswith("/api/models/user/insects/tree/"):
            self.answer(
                [
                    {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                    for n, d in self.files.items()
                ]
            )
        elif path.startswith("/api/models/user/insects"):
            siblings = [{"rfilename": name} for name in self.files]
            self.answer(
                {
                    "_id": "1",
                    "id": "user/insects",
                    "modelId": "user/insects",
                    "sha": COMMIT,
                    "siblings": siblings,
                    "tags": [],
                    "downloads": 0,
                    "likes": 0,
                    "private": False,
                }
            )
        else:
            self.answer({"error": "no repository"}, 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET


@pytest.fixture
def hub():
    Hub.files, Hub.log = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def topwork(endpoint: str, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS"))
    }
    environment |= {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(folder / "hf"),
        "HF_TOKEN": "hf_standin",
        "HF_HUB_DISABLE_XET": "1",
    }
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "topwork.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=folder)


def test_a_model_and_nothing_else_goes_to_the_hub_and_comes_back(hub, tmp_path):
    shutil.copytree(GOLDEN / "model", tmp_path / "mine")
    (tmp_path / "mine" / "secret.txt").write_text("mine")
    done = topwork(hub, tmp_path, "push", tmp_path / "mine", "user/insects", "--json")
    assert done.returncode == 0, (done.stderr, Hub.log)
    assert json.loads(done.stdout) == {"url": f"{hub}/user/insects", "commit": COMMIT}
    assert {n: d for n, d in Hub.files.items() if n != ".gitattributes"} == {
        path.name: path.read_bytes() for path in (GOLDEN / "model").iterdir()
    }
    pushed = dict(Hub.files)
    Hub.files["evil.py"] = b"print()"
    done = topwork(hub, tmp_path, "pull", "user/insects", "--out", tmp_path / "model", "--json")
    assert done.returncode == 0, (done.stderr, Hub.log)
    assert json.loads(done.stdout)["commit"] == COMMIT
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == pushed
    assert all(COMMIT in line for line in Hub.log if "/resolve/" in line), "pinned before anything was downloaded"
    again = topwork(hub, tmp_path, "pull", "user/insects", "--out", tmp_path / "model")
    assert again.returncode == 2
    assert "exists already" in again.stderr
    done = topwork(hub, tmp_path, "pull", "user/insects", "--json")
    assert json.loads(done.stdout)["folder"] == "runs/insects"
    assert (tmp_path / "runs" / "insects" / "topwork.json").is_file()


def test_an_altered_model_is_not_kept(hub, tmp_path):
    Hub.files = {path.name: path.read_bytes() for path in (GOLDEN / "model").iterdir()}
    Hub.files["model.safetensors"] = Hub.files["model.safetensors"][:-1] + b"\x99"
    done = topwork(hub, tmp_path, "pull", "user/insects", "--out", tmp_path / "model")
    assert done.returncode == 1
    assert "damaged or modified" in done.stderr
    assert [p.name for p in tmp_path.iterdir() if p.name != "hf"] == []


@pytest.mark.parametrize(
    ("repository", "words"), [("user/other", "no such repository"), ("a b c", "not a valid repository name")]
)
def test_a_wrong_repository_is_named(hub, tmp_path, repository, words):
    done = topwork(hub, tmp_path, "pull", repository, "--out", tmp_path / "model")
    assert done.returncode in (1, 2)
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("verb", ["push", "pull"])
def test_without_a_network_there_is_one_clear_line(tmp_path, verb):
    arguments = ["push", GOLDEN / "model", "user/x"] if verb == "push" else ["pull", "user/x", "--out", tmp_path / "m"]
    done = topwork("http://127.0.0.1:9", tmp_path, *arguments)
    assert done.returncode == 1
    assert "the hub cannot be reached" in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("topwork:")]) == 1
    assert "Traceback" not in done.stderr


@pytest.mark.slow  # models/test_sources.py reads such a folder
def test_a_model_of_transformers_on_the_hub_is_a_backbone(hub, tmp_path):
    import transformers

    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "theirs")
    Hub.files = {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()}
    done = topwork(hub, tmp_path, "models", "--check", "hf-hub:user/insects", "--json")
    assert done.returncode == 0, (done.stdout, done.stderr, Hub.log)
    (found,) = json.loads(done.stdout)["backbones"]
    assert (found["size"], found["n_features"], found["problem"]) == (32, 32, None)
    del Hub.files["model.safetensors"]
    done = topwork(hub, tmp_path / "again", "models", "--check", "hf-hub:user/insects@main", "--json")
    assert "its repository has no model.safetensors" in json.loads(done.stdout)["backbones"][0]["problem"]
