"""One model folder, seven ways to ask it: do all name the same class, and how far apart are the probabilities?

    python benchmarks/ways.py RUN IMAGES

The ways: the library (the reference), ``topwork predict``, HTTP, the ONNX export with its stand-alone script, the
OpenVINO export likewise, timm (``local-dir:``) and transformers' image-classification pipeline; the last two for plain
heads only. Each starts from the image files. Results are in docs/lab-log.md, with the machine they were taken on.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from export.test_equality import by_command, by_http, by_library, by_script, by_timm, by_transformers
from topwork.models.classifier import load_classifier


def main() -> None:
    """Asks in every way and prints the table."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("images", type=Path)
    asked = parser.parse_args()
    paths = sorted(str(p) for p in asked.images.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    classifier = load_classifier(asked.run)
    classes, run = classifier.classes, asked.run
    reference = by_library(run, paths, classes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ways = {
            "topwork predict": lambda: by_command(run, paths, classes, folder),
            "HTTP": lambda: by_http(run, paths, classes),
            "ONNX, predict.py": lambda: by_script(run, "onnx", paths, folder),
            "OpenVINO, predict.py": lambda: by_script(run, "openvino", paths, folder),
        }
        if classifier.is_timm:
            ways["timm local-dir"] = lambda: by_timm(run, paths)
            ways["transformers pipeline"] = lambda: by_transformers(run, paths, classes)
        print(
            f"{run.name}, {classifier.precision}, {classifier.head.kind} head, {len(paths)} images, against the library:"
        )
        for way, ask in ways.items():
            found = ask()
            other = [paths[row] for row in np.flatnonzero(found.argmax(1) != reference.argmax(1))]
            gaps = np.abs(found - reference).max(1)
            print(
                f"{way:>22}: same class on {len(paths) - len(other)} of {len(paths)}, probabilities differ by "
                f"{gaps.max():.1e} at most, {np.median(gaps):.1e} in the middle {' '.join(other[:3])}",
                flush=True,
            )


if __name__ == "__main__":
    main()
