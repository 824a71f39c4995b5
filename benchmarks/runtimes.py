"""Images per second of a network in every runtime that is installed: the order that ``auto`` follows.

    python benchmarks/runtimes.py RUN [--rounds 3]
    python benchmarks/runtimes.py --backbones random:resnet18 random:vit_tiny_patch16_224 [--rounds 5]

Batches of 16 drawn images of the input's size, so that decoding has no part in it; torch (eager) with as many threads as
there are cores. The runtimes take turns, so that other work on the machine meets all of them. Results are in
docs/lab-log.md, with the machine they were taken on.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from topwork.errors import UsageError
from topwork.export.runtime import engine_of
from topwork.features.engine import Engine, drawn_images, load_engine
from topwork.models.backbone import load_backbone
from topwork.models.classifier import Classifier, load_classifier


def main() -> None:
    """Measures in turns and prints the median of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--backbones", nargs="*", default=[])
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    if asked.run is not None:
        classifier = load_classifier(asked.run)
        _compare(str(asked.run), _engines(classifier), drawn_images(classifier.backbone.spec), asked.rounds)
    for name in asked.backbones:
        backbone = load_backbone(name)
        engines = {kind: load_engine(backbone, kind, device="cpu") for kind in ("openvino", "torch")}
        _compare(name, engines, drawn_images(backbone.spec), asked.rounds)


def _engines(classifier: Classifier) -> dict[str, Engine]:
    found = {}
    for runtime in ("openvino", "onnxruntime", "torch"):
        try:
            found[runtime] = engine_of(classifier, runtime)
        except UsageError as error:
            print(error)
    return found


def _compare(name: str, engines: dict[str, Engine], drawn: np.ndarray, n_rounds: int) -> None:
    pixels = np.concatenate([drawn] * 4)
    seconds = [{kind: _seconds(engine, pixels) for kind, engine in engines.items()} for _ in range(n_rounds + 1)][1:]
    rates = {kind: len(pixels) / np.median([one[kind] for one in seconds]) for kind in engines}
    print(name, *(f"{kind} {rate:.1f} images/s" for kind, rate in rates.items()), sep=", ")
    for kind in engines:
        print(f"  {kind}: {np.median([one['torch'] / one[kind] for one in seconds]):.2f} times eager torch", flush=True)


def _seconds(engine: Engine, pixels: np.ndarray) -> float:
    started = time.perf_counter()
    engine.run(pixels)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
