"""How fast images become features, against the two things that bound it, in one run.

    python benchmarks/embed.py FOLDER [--rounds 5]

Three rates in images per second, interleaved over several rounds so that a noisy machine treats them alike:
``engine`` runs the network on pixels that are ready; ``decode`` reads, decodes and resizes with all cores and no
network; ``embed`` is what topwork does, cold, into a fresh store. Both bounds use all cores, so where decoding is not
free the best possible is their harmonic sum, 1 / (1 / engine + 1 / decode): it is printed as ``both``.

With ``--memory N1 N2`` it embeds N1 and then N2 images (repeating the folder's, each copy made different by a comment in
its bytes) in fresh processes and prints the peak memory of each.

Measured figures and the machine they come from stand in docs/lab-log.md.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backbone", default="lite0")
    parser.add_argument("--memory", type=int, nargs="*", help="numbers of images to measure the peak memory with")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        embed_many(arguments.folder, arguments.one, arguments.backbone)
    elif arguments.memory:
        measure_memory(arguments)
    else:
        measure_rates(arguments)


def measure_rates(arguments: argparse.Namespace) -> None:
    """Prints median images per second of engine, decode and embed, and their ratios."""
    import numpy as np

    from topwork.data.folders import read_regular_file
    from topwork.data.images import decode
    from topwork.data.loader import in_order
    from topwork.data.manifest import scan
    from topwork.data.transforms import fit_to_input
    from topwork.features.embed import Embedder, FeatureStore
    from topwork.features.engine import BATCH, load_engine
    from topwork.models.backbone import load_backbone

    os.environ["TOPWORK_CACHE"] = tempfile.mkdtemp()
    backbone = load_backbone(arguments.backbone)
    engine = load_engine(backbone)
    paths = [path for path in sorted(arguments.folder.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
    ready = np.random.default_rng(0).integers(
        0, 256, (16 * BATCH, backbone.spec.height, backbone.spec.width, 3), np.uint8
    )

    def load(path: Path) -> object:
        return fit_to_input(decode(read_regular_file(path), min_side=backbone.spec.min_side).pixels, backbone.spec)

    rates: dict[str, list[float]] = {"engine": [], "decode": [], "embed": []}
    for number in range(arguments.rounds + 1):
        started = time.perf_counter()
        engine.run(ready)
        rates["engine"].append(len(ready) / (time.perf_counter() - started))
        started = time.perf_counter()
        n_decoded = sum(1 for _ in in_order(load, paths))
        rates["decode"].append(n_decoded / (time.perf_counter() - started))
        os.environ["TOPWORK_CACHE"] = tempfile.mkdtemp()
        embedder = Embedder(backbone, engine, FeatureStore(Path(tempfile.mkdtemp()), "bench"))
        started = time.perf_counter()
        manifest = scan(arguments.folder, visitor=embedder)
        embedder.flush()
        rates["embed"].append(len(manifest.samples) / (time.perf_counter() - started))
        if number == 0:  # warm-up
            rates = {name: [] for name in rates}
    median = {name: statistics.median(values) for name, values in rates.items()}
    both = 1 / (1 / median["engine"] + 1 / median["decode"])
    print(
        f"{len(paths)} images, {backbone.name}, {engine.kind} {engine.precision}, {arguments.rounds} rounds, images/s:"
    )
    for name, values in rates.items():
        print(f"  {name:8s} median {median[name]:7.1f}   range {min(values):.1f} to {max(values):.1f}")
    print(f"  both     {both:14.1f}   what the cores allow when decoding and network share them")
    slower = min(median["engine"], median["decode"])
    print(f"embed / slower bound = {median['embed'] / slower:.2f}   embed / both = {median['embed'] / both:.2f}")


def measure_memory(arguments: argparse.Namespace) -> None:
    """Prints the peak resident memory of processes that embed different numbers of images."""
    peaks = []
    for n in arguments.memory:
        command = [sys.executable, __file__, str(arguments.folder), "--one", str(n), "--backbone", arguments.backbone]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        print(text, end="", flush=True)
        peaks.append(float(text.split("peak")[1].split()[0]))
    print(f"last / first = {peaks[-1] / peaks[0]:.3f}")


def embed_many(folder: Path, n: int, backbone_name: str) -> None:
    """Embeds ``n`` images in this process; copies differ by bytes after the end-of-image mark."""
    from topwork.data.manifest import scan
    from topwork.features.embed import Embedder
    from topwork.models.backbone import load_backbone

    load_backbone(backbone_name)
    with tempfile.TemporaryDirectory() as root:
        originals = sorted(folder.rglob("*.jpg"))
        for number in range(n):
            source = originals[number % len(originals)]
            target = Path(root, "data", source.parent.name)
            target.mkdir(parents=True, exist_ok=True)
            (target / f"{number}.jpg").write_bytes(source.read_bytes() + str(number).encode())
        os.environ["TOPWORK_CACHE"] = root + "/cache"
        backbone = load_backbone(backbone_name)
        embedder = Embedder(backbone)
        started = time.perf_counter()
        manifest = scan(Path(root, "data"), visitor=embedder)
        embedder.flush()
        seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{len(manifest.samples)} images in {seconds:.1f} s: {n / seconds:.0f}/s, peak {peak:.0f} MiB")


if __name__ == "__main__":
    main()
