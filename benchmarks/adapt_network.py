"""Fine-tuning the network on both domains against adapting the head alone, through the command, on folders of two domains.

    python benchmarks/adapt_network.py ../shared/data/pacs-mini/photo ../shared/data/pacs-mini/art_painting [--seeds 0 1 2]
        [--both-ways]

For each seed a probe is fitted on the source (its split is the seed's) and adapted twice: the head alone, and then the
network, too. Class folders of the target are used to judge alone. Prints accuracy on the target and on the source's test
part, what the guard rails decided, and seconds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from topwork.commands.adapt import adapt
from topwork.commands.fit import fit
from topwork.settings import AdaptSettings, FitSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--both-ways", action="store_true")
    asked = parser.parse_args()
    pairs = [(asked.source, asked.target), (asked.target, asked.source)]
    for source, target in pairs[: 1 + asked.both_ways]:
        gains = [one(source, target, seed) for seed in asked.seeds]
        print(
            f"{source.name} > {target.name}: gain of fine-tuning the network {np.mean(gains):+.1f} points, least {min(gains):+.1f}"
        )


def one(source: Path, target: Path, seed: int) -> float:
    """Prints one seed; accuracy on the target of what is kept, against that of the adapted head, in points."""
    with tempfile.TemporaryDirectory() as folder:
        run = fit(source, Path(folder) / "run", FitSettings(seed=seed, near_duplicates=False)).folder
        head = adapt(run, target, Path(folder) / "head", AdaptSettings(seed=seed))
        began = time.perf_counter()
        moved = adapt(run, target, Path(folder) / "moved", AdaptSettings(seed=seed, mode="tune"))
        seconds = time.perf_counter() - began
    before, after = (result.evaluation["domains"] for result in (head, moved))
    value = [
        100 * found["accuracy"]["value"]
        for found in (before["target"]["before"], before["target"]["after"], after["target"]["after"])
    ]
    on_source = [100 * found["source"]["after"]["accuracy"]["value"] for found in (before, after)]
    print(
        f"{source.name} > {target.name}, seed {seed}: {value[0]:.1f}, head {value[1]:.1f}, tuned {value[2]:.1f} "
        f"({moved.choice.method}); source {on_source[0]:.1f}, {on_source[1]:.1f}; {seconds:.0f} s; {moved.choice.reason}",
        flush=True,
    )
    return value[2] - value[1]


if __name__ == "__main__":
    main()
