"""Ray on this machine: the same features and predictions as without, what is known is not done again, and what fails."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from drawing import draw_folders
from topwork.cli import plain_tokens
from topwork.data import archives
from topwork.data.manifest import scan
from topwork.errors import ModelError, TopworkError, UsageError
from topwork.export.predictor import Predictor
from topwork.export.runtime import engine_of
from topwork.features import cluster
from topwork.features.cluster import Cluster
from topwork.features.embed import Embedder, FeatureStore, embed
from topwork.features.engine import BATCH
from topwork.models.classifier import load_classifier
from topwork.settings import ClusterSettings

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),  # Ray's own code warns of Ray's own settings
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "format-2"
LOCAL = ClusterSettings(ray="local")


@pytest.fixture(scope="module")
def local(cache_folder):
    """Two workers on this machine, which import the package from here."""
    pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT / "src"))
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)  # each worker would compile the package again
        patch.setattr(cluster, "default_threads", lambda: 2)
        patch.setattr(cluster, "CHUNK", BATCH)  # so that a few dozen images are several chunks
        yield Cluster(LOCAL)
        import ray

        ray.shutdown()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    root = draw_folders(tmp_path_factory.mktemp("drawn"), n_each=2 * BATCH)
    (root / "disc" / "broken.jpg").write_bytes(b"\xff\xd8\xff no image")
    shutil.copy(root / "disc" / "disc_1.jpg", root / "disc" / "zz_copy.jpg")  # in the other chunk than its original
    return root


@pytest.fixture(scope="module")
def network():
    """A tiny network with its engine; OpenVINO, so that the workers need not import torch."""
    classifier = load_classifier(GOLDEN)
    return classifier.backbone, engine_of(classifier)


def embedder(network, folder: Path, **options) -> Embedder:
    return Embedder(*network, FeatureStore(folder, "test"), **options)


def test_same_manifest_and_features_as_on_one_machine(local, drawn, network, tmp_path):
    """By one worker, which starts sooner than two; the slow tests have two."""
    one = Cluster(ClusterSettings(ray="local", num_cpus_per_worker=2))
    here, there = embedder(network, tmp_path / "a"), embedder(network, tmp_path / "b", load=one.load_images)
    seen: list[tuple[int, int]] = []
    expected, found = (
        scan(drawn, visitor=here),
        scan(drawn, visitor=there, load=there.load, on_progress=lambda *n: seen.append(n)),
    )
    here.flush()
    there.flush()
    assert found == expected
    assert seen == [(n + 1, len(found.samples) + 1) for n in range(len(found.samples) + 1)]
    assert [reject.path for reject in found.rejects] == ["disc/broken.jpg"]
    hashes = sorted({sample.content_hash for sample in found.samples})
    assert there.n_embedded >= len(hashes) == here.n_embedded == len(there.store)
    for block in ("last", "stages"):
        np.testing.assert_array_equal(there.store.load(hashes, block), here.store.load(hashes, block))


@pytest.mark.slow
def test_a_second_run_goes_on_from_the_store(local, drawn, network, tmp_path):
    here = embedder(network, tmp_path / "b")
    expected = scan(drawn, visitor=here)
    here.flush()
    hashes = sorted({sample.content_hash for sample in expected.samples})
    again = embedder(network, tmp_path / "b", load=local.load_images)
    assert scan(drawn, visitor=again, load=again.load) == expected
    assert again.n_embedded == 0
    part = embedder(network, tmp_path / "c", load=local.load_images)
    part.store.put(hashes[:50], {name: here.store.load(hashes[:50], name) for name in ("last", "stages")})
    features = embed(part.backbone, expected, embedder=part)
    assert part.n_embedded == len(hashes) - 50
    np.testing.assert_array_equal(
        features.block("stages"), here.store.load([s.content_hash for s in expected.samples], "stages")
    )


@pytest.mark.slow
def test_workers_read_shards_themselves(local, drawn, tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "000.tar", "w") as file:
        for number, path in enumerate(sorted(drawn.rglob("[ds]*_?.jpg"))):
            (tmp_path / "cls").write_text(path.parent.name)
            file.add(path, f"{number:03}.jpg")
            file.add(tmp_path / "cls", f"{number:03}.cls")
    (tmp_path / "cls").unlink()
    expected = scan(tmp_path)
    read = archives.read_member

    def not_here(root, name):
        assert not name.endswith(".jpg"), "the driver reads an image"
        return read(root, name)

    monkeypatch.setattr(archives, "read_member", not_here)
    assert scan(tmp_path, load=local.load_images).samples == expected.samples
    assert len(expected.samples) == 20


def test_workers_are_not_sent_the_listing(drawn):
    sent = []

    def load(entries, read, *_):
        sent.append((len(pickle.dumps(read)), len(pickle.dumps(entries))))
        return iter(())

    with pytest.raises(UsageError, match="usable image"):
        scan(drawn, load=load)
    ((n_read, n_entries),) = sent
    assert n_read < 1000 < n_entries


@pytest.mark.slow
def test_scan_without_a_network(local, drawn):
    assert scan(drawn, load=local.load_images) == scan(drawn)


@pytest.mark.slow
def test_same_predictions_as_on_one_machine(local, drawn):
    names = [*sorted(map(str, drawn.rglob("*.jpg"))), str(drawn / "gone.jpg")]
    expected, found = Predictor(GOLDEN), Predictor(GOLDEN, cluster=LOCAL)
    assert list(found.stream(names)) == list(expected.stream(names))


@pytest.mark.slow
def test_what_a_worker_raises_is_what_the_user_reads(local):
    def fails(chunk):
        raise ModelError("weights.bin: damaged")

    def cannot_start():
        raise ModuleNotFoundError("No module named 'topwork'")

    with pytest.raises(ModelError, match=r"^weights\.bin: damaged$"):
        list(local.map(lambda: fails, [1]))
    with pytest.raises(TopworkError, match="--ray: a worker failed: ZeroDivisionError: division by zero"):
        list(local.map(lambda: lambda chunk: chunk / 0, [1]))
    with pytest.raises(TopworkError, match=r"--ray: a worker failed: ModuleNotFoundError: No module named 'topwork'"):
        list(local.map(cannot_start, [1]))


@pytest.mark.slow
def test_the_chunk_of_a_killed_worker_is_done_by_another(local, tmp_path):
    def killed_once(mark, chunk):
        if chunk == 3 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return chunk * chunk

    found = list(local.map(lambda: partial(killed_once, tmp_path / "mark"), range(8)))
    assert (tmp_path / "mark").exists()
    assert found == [n * n for n in range(8)]


@pytest.mark.slow
def test_a_killed_node_changes_nothing():
    """Three nodes, one of them killed after a third of the images."""
    command = [sys.executable, ROOT / "benchmarks" / "cluster.py", "--images", "600", "--model", GOLDEN, "--kill-only"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["same_after_kill"] is True


@pytest.mark.slow
def test_a_running_cluster_that_asks_for_a_token(drawn, tmp_path, free_ports):
    """Ray's client sends a token only if it is told to."""
    words = ["start", "--head", "--block", "--num-cpus=1", "--include-dashboard=false"]
    ports = [f"--port={free_ports[0]}", f"--ray-client-server-port={free_ports[1]}"]
    outside = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    env = outside | {"PYTHONPATH": str(ROOT / "src"), "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
    head = subprocess.Popen(
        [Path(sys.executable).parent / "ray", *words, *ports], env=env | {"RAY_AUTH_MODE": "token"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        while not answers(free_ports[1]):
            assert head.poll() is None
        address = f"ray://127.0.0.1:{free_ports[1]}"
        command = [sys.executable, "-m", "topwork.cli", "scan", str(drawn), "--ray", address, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env, check=False)
        assert json.loads(done.stdout)["n_used"] == len(list(drawn.rglob("*.jpg"))) - 1, done.stderr
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        head.wait()


@pytest.mark.slow
def test_the_running_cluster_of_this_machine(drawn, free_ports):
    """``--ray auto``, the cluster that RAY_ADDRESS or Ray's own files name."""
    port = f"{free_ports[0]}"
    outside = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    env = outside | {"PYTHONPATH": str(ROOT / "src"), "RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": f"127.0.0.1:{port}"}
    words = ["start", "--head", "--block", "--num-cpus=1", "--include-dashboard=false", f"--port={port}"]
    head = subprocess.Popen(
        [Path(sys.executable).parent / "ray", *words], env={**env, "RAY_ADDRESS": ""},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        while not answers(free_ports[0]):
            assert head.poll() is None
        command = [sys.executable, "-m", "topwork.cli", "scan", str(drawn), "--quick", "--ray", "auto", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env, check=False)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["n_used"] == len(list(drawn.rglob("*.jpg"))) - 1
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        head.wait()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["ray://127.0.0.1:{}", "127.0.0.1:{}"])
def test_an_address_that_does_not_answer_within_30_seconds(form, drawn):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = form.format(silent.getsockname()[1])
        command = [sys.executable, "-m", "topwork.cli", "scan", str(drawn), "--quick", "--ray", address]
        env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
        done = subprocess.run(command, capture_output=True, text=True, timeout=150, env=env, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"topwork: --ray {address}: cannot be reached: ")


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


@pytest.fixture
def free_ports() -> list[int]:
    with socket.socket() as a, socket.socket() as b:
        a.bind(("127.0.0.1", 0))
        b.bind(("127.0.0.1", 0))
        return [a.getsockname()[1], b.getsockname()[1]]


def test_an_address_where_nobody_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UsageError, match=rf"--ray ray://127\.0\.0\.1:{port}: cannot be reached: connection refused"):
        cluster._check_answers(f"ray://127.0.0.1:{port}")


def test_without_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"--ray: Ray is not installed \(pip install 'topwork\[cluster\]'\)"):
        Cluster(LOCAL)


@pytest.mark.parametrize(
    ("typed", "parsed"),
    [
        (["scan", "--ray"], ["scan", "--ray=local"]),
        (["predict", "m", "--ray", "a.jpg"], ["predict", "m", "--ray=local", "a.jpg"]),
        (["scan", "--ray", "--json"], ["scan", "--ray=local", "--json"]),
        (["scan", "--ray", "auto", "x"], ["scan", "--ray", "auto", "x"]),
        (["scan", "--ray", "ray://head:10001"], ["scan", "--ray", "ray://head:10001"]),
        (["scan", "--ray", "10.0.0.1:6379"], ["scan", "--ray", "10.0.0.1:6379"]),
    ],
)
def test_ray_may_stand_without_an_address(typed, parsed):
    assert plain_tokens(typed) == parsed
