"""Does fine-tuning with default settings beat the probe? Test accuracy of both on the same images, for several datasets.

    python benchmarks/defaults.py FOLDER [FOLDER ...] [--mode tune|auto] [--time-budget 10min] [--seeds 0 1] [--set size=64 ...]

For each folder and seed: ``fit`` with the defaults (a probe), then with ``--mode`` and ``--time-budget``. Both have the same
test part; the probe trains on the rest, while tuning holds out a valid part of it. Prints what ``fit`` said about the expected
gain and about its decision, and the paired difference on the test images.
"""

from __future__ import annotations

import argparse
import ast
import tempfile
import time
from pathlib import Path

import topwork
from topwork.paired import paired
from topwork.settings import FitSettings, with_options
from topwork.text import points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--mode", default="auto", choices=["tune", "auto"])
    parser.add_argument("--time-budget", default="10min")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="settings of both, such as size=64"
    )
    asked = parser.parse_args()
    options = {name: _value(text) for name, text in (item.split("=", 1) for item in asked.set)}
    for folder in asked.folders:
        for seed in asked.seeds:
            compare(folder, with_options(FitSettings(seed=seed), options), asked.mode, asked.time_budget)


def _value(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def compare(folder: Path, settings: FitSettings, mode: str, budget: str) -> None:
    """Fits twice and prints one paragraph."""
    correct, seconds = [], []
    with tempfile.TemporaryDirectory() as place:
        for name, chosen in (("probe", {}), ("tuned", {"mode": mode, "time_budget": budget})):
            began = time.perf_counter()
            run = topwork.fit(folder, Path(place) / name, settings, **chosen)
            seconds.append(time.perf_counter() - began)
            test = run.predictions["test"]
            correct.append(dict(zip(test.sample_indices.tolist(), test.correct.tolist(), strict=True)))
    probe, tuned = correct
    assert probe.keys() == tuned.keys(), "the same test images"
    gain = paired([tuned[row] for row in probe], list(probe.values()))
    accuracies = [100 * sum(part.values()) / len(part) for part in correct]
    print(
        f"{folder.name}, seed {settings.seed}: {len(run.split.train)} train, {len(probe)} test; probe {accuracies[0]:.1f}% "
        f"in {seconds[0]:.0f} s, --mode {mode} {accuracies[1]:.1f}% in {seconds[1]:.0f} s (mode of the result: "
        f"{run.recipe['mode']}): {points(gain.mean)} ± {100 * gain.error:.1f} points",
        *run.recipe.get("words", []),
        sep="\n  ",
        flush=True,
    )


if __name__ == "__main__":
    main()
