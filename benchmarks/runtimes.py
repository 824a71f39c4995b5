"""Images per second of the network of a model in every runtime that is installed: the order that ``auto`` follows.

    python benchmarks/runtimes.py RUN [--rounds 3]

Batches of 16 drawn images of the input's size, so that decoding has no part in it; torch with as many threads as there
are cores. Results are in docs/lab-log.md, with the machine they were taken on.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from topwork.errors import UsageError
from topwork.export.runtime import engine_of
from topwork.features.engine import Engine, drawn_images
from topwork.models.classifier import load_classifier


def main() -> None:
    """Measures some times and prints the best of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    classifier = load_classifier(asked.run)
    pixels = np.concatenate([drawn_images(classifier.backbone.spec)] * 4)
    for runtime in ("openvino", "onnxruntime", "torch"):
        try:
            engine = engine_of(classifier, runtime)
        except UsageError as error:
            print(error)
            continue
        engine.run(pixels)
        rate = len(pixels) / min(_seconds(engine, pixels) for _ in range(asked.rounds))
        print(f"{runtime:>12}: {rate:7.1f} images/s")


def _seconds(engine: Engine, pixels: np.ndarray) -> float:
    started = time.perf_counter()
    engine.run(pixels)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
