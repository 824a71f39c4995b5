"""A Ray cluster of three nodes on this machine against threads: rate, equality, a node killed in the middle, waiting reads.

    python benchmarks/cluster.py [--images 2000] [--model RUN] [--kill-only]
    python benchmarks/cluster.py --remote [--images 2000]

With ``--remote``, without Ray: a scan with features of images behind a URL, whose file system waits 20 ms before each read,
against the same images on the disk.

The nodes are ray.cluster_utils.Cluster: a head without CPUs and two nodes with one CPU each, so that both ways have the same two
cores. Rates are from the first chunk to the last; starting the workers is given apart. Two cores, lite0 in f32, 2,000 images of
96 px (2026-11-28): threads 84 images/s, two nodes 106 after 22 s of start, the same features; a node killed after a third:
the same features again. With reads that wait 20 ms, one at a time: one node 45 images/s, two nodes 93.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
os.environ["PYTHONPATH"] = str(ROOT / "src")
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_BACKEND_LOG_LEVEL="fatal")

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem

from drawing import draw_folders
from topwork.data.listing import read_image
from topwork.data.loader import FactsStore, Loader, load_images
from topwork.data.manifest import scan
from topwork.data.samples import Entry
from topwork.export.runtime import engine_of
from topwork.features.cluster import CHUNK, Cluster
from topwork.features.embed import Embedder, FeatureStore
from topwork.features.engine import load_engine
from topwork.models.backbone import load_backbone
from topwork.models.classifier import load_classifier
from topwork.settings import ClusterSettings


def waiting(root: Path, seconds: float, entry: Entry) -> bytes:
    """A read that waits as one over a network does."""
    time.sleep(seconds)
    return read_image(root, entry.path)


def embedded(network, entries, read, load: Loader, on_row: Callable[[int], None] = lambda _: None, threads=None):
    """The store, images per second from the first result on, and the seconds until then."""
    folder = Path(tempfile.mkdtemp())
    embedder = Embedder(*network, FeatureStore(folder, "benchmark"), load)
    started, first, at = time.perf_counter(), 0.0, 0.0
    for number, loaded in enumerate(load(entries, read, FactsStore(folder), embedder, threads), start=1):
        if loaded.pixels is not None:
            embedder.take(loaded.content_hash, loaded.pixels)
        if number == CHUNK:  # the first chunk of every worker comes with its start
            first, at = time.perf_counter() - started, time.perf_counter()
        on_row(number)
    embedder.flush()
    return embedder.store, (len(entries) - CHUNK) / (time.perf_counter() - at), first


class Waiting(LocalFileSystem):
    """The disk behind ``waiting:/``, with a wait before each read."""

    protocol = "waiting"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + str(path).removeprefix("waiting:").strip("/")

    def cat_file(self, path: str, *args: Any, **options: Any) -> bytes:
        """As on the disk, later."""
        time.sleep(0.02)
        return bytes(super().cat_file(path, *args, **options))


def remote(root: Path) -> dict[str, Any]:
    """Seconds to scan and embed the images from the disk and from behind a URL, with nothing in the cache."""
    fsspec.register_implementation("waiting", Waiting)
    backbone = load_backbone()
    engine, seconds, digests = load_engine(backbone), {}, set()
    for name, source in (("warm", str(root)), ("disk", str(root)), ("waiting", f"waiting:/{root}")):
        os.environ["TOPWORK_CACHE"] = tempfile.mkdtemp()
        embedder = Embedder(backbone, engine, FeatureStore(Path(tempfile.mkdtemp()), name))
        started = time.perf_counter()
        digests.add(scan(source, visitor=embedder).digest)
        embedder.flush()
        seconds[name] = round(time.perf_counter() - started, 1)
    assert len(digests) == 1
    return {"seconds": seconds, "ratio": round(seconds["waiting"] / seconds["disk"], 2)}


def same(a: FeatureStore, b: FeatureStore, hashes: list[str]) -> bool:
    return all(np.array_equal(a.load(hashes, block), b.load(hashes, block)) for block in ("last", "stages"))


def nodes(n: int) -> Iterator[tuple[Any, list[Any]]]:
    os.environ["RAY_AUTH_MODE"] = "disabled"  # its nodes know of no token that this machine may have
    import ray
    from ray.cluster_utils import Cluster as Nodes

    made = Nodes(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    more = [made.add_node(num_cpus=1) for _ in range(n)]
    made.wait_for_nodes()
    yield made, more
    ray.shutdown()
    made.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--model", help="a model folder; by default lite0")
    parser.add_argument("--kill-only", action="store_true")
    parser.add_argument("--remote", action="store_true")
    asked = parser.parse_args()
    root = draw_folders(Path(tempfile.mkdtemp()), n_each=asked.images // 2)
    if asked.remote:
        print(json.dumps({"images": asked.images, **remote(root)}))
        return
    entries = [Entry(path.relative_to(root).as_posix(), path.parent.name) for path in sorted(root.rglob("*.jpg"))]
    if asked.model:
        classifier = load_classifier(asked.model)
        network = classifier.backbone, engine_of(classifier)
    else:
        backbone = load_backbone()
        network = backbone, load_engine(backbone, "openvino", "f32")
    read = partial(read_image_of, root)
    found: dict[str, Any] = {"images": len(entries)}
    here, rate, _ = embedded(network, entries, read, load_images)
    hashes = sorted(here._index)
    found["threads"] = round(rate, 1)
    for made, (_, second) in nodes(2):
        cluster = Cluster(ClusterSettings(ray=made.address))
        if not asked.kill_only:
            there, rate, start = embedded(network, entries, read, cluster.load_images)
            found |= {"nodes": round(rate, 1), "start_seconds": round(start, 1), "same": same(here, there, hashes)}
            found["ratio"] = round(found["nodes"] / found["threads"], 2)
            slow = partial(waiting, root, 0.02)
            _, rate, _ = embedded(network, entries, slow, cluster.load_images, threads=1)
            found["two_nodes_waiting"] = round(rate, 1)

        def kill(number: int, made: Any = made, second: Any = second) -> None:
            if number == len(entries) // 3:
                made.remove_node(second, allow_graceful=False)

        there, rate, _ = embedded(network, entries, read, cluster.load_images, kill)
        found |= {"after_kill": round(rate, 1), "same_after_kill": same(here, there, hashes)}
        if not asked.kill_only:  # one node is left
            _, rate, _ = embedded(network, entries, slow, cluster.load_images, threads=1)
            found["one_node_waiting"] = round(rate, 1)
            found["speedup_waiting"] = round(found["two_nodes_waiting"] / rate, 2)
    print(json.dumps(found))


def read_image_of(root: Path, entry: Entry) -> bytes:
    return read_image(root, entry.path)


if __name__ == "__main__":
    main()
