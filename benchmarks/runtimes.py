"""Images a second of the network of a model in every runtime that is installed: the order that ``auto`` goes by.

    python benchmarks/runtimes.py RUN [--rounds 3]

Batches of 16 drawn images of the input's size, so that decoding has no part in it; torch with as many threads as there
are cores. Results are in docs/lab-log.md, with the machine they were taken on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from topwork.export.runtime import measure
from topwork.models.classifier import load_classifier


def main() -> None:
    """Measures some times and prints the best of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    classifier = load_classifier(asked.run)
    found = [measure(classifier) for _ in range(asked.rounds)]
    for name in found[0]:
        print(f"{name:>12}: {max(rates[name] for rates in found):7.1f} images/s")


if __name__ == "__main__":
    main()
