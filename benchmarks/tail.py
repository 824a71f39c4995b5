"""Tail tuning from cached activations against plain tuning of the same stages: time, and what valid says.

    python benchmarks/tail.py FOLDER [--last-stages 1] [--epochs 12] [--views 2] [--augment flip] [--limit 60] [--seeds 0 1]

Same recipe, images, head and seeds; turns are taken. Plain tuning runs the whole network on freshly augmented images, tail
tuning runs the frozen part once for each view and then only the rest; its time includes that. Processor seconds stand
beside wall seconds, because a shared machine stretches the latter. The goal is at most 40 % of the time at equal accuracy.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from topwork.commands.prepare import gather
from topwork.features.probe import fit_probe
from topwork.progress import Reporter, Stopwatch
from topwork.settings import FitSettings
from topwork.training.finetune import tune
from topwork.training.recipe import plan
from topwork.training.tuning import Tuning, prepare


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--last-stages", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--augment", default="flip")
    parser.add_argument("--limit", type=int, default=None, help="images of each class")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = {"plain": [], "tail": []}
    for seed in options.seeds:
        settings = FitSettings(
            mode="tune", strategy="last", last_stages=options.last_stages, epochs=options.epochs, augment=options.augment,
            limit_per_class=options.limit, near_duplicates=False, interpolate=False, seed=seed,
        )  # fmt: skip
        data = gather(options.folder, settings, Stopwatch(), Reporter())
        probe = fit_probe(data.features, data.labels, len(data.manifest.classes), rows=data.parts.train, head="plain")
        tuning = Tuning(data.backbone, data.manifest, data.features, data.parts, probe, settings)
        ready = prepare(tuning, lambda *_: None)
        for name, views in (("plain", None), ("tail", options.views)):
            recipe = plan(
                FitSettings(**{**vars(settings), "tail_views": views}), ready.facts, tuning.stage_names, seed
            )  # fmt: skip
            began, worked = time.perf_counter(), time.process_time()
            done = tune(data.backbone, recipe, ready.train, ready.valid, probe=ready.start)
            took = time.perf_counter() - began, time.process_time() - worked
            best = next(record for record in done.tuned.history if record["epoch"] == done.tuned.best_epoch)
            rows[name].append((*took, best["valid_loss"], best["valid_accuracy"]))
            print(
                f"seed {seed}, {name}: {took[0]:.0f} s, {took[1]:.0f} processor s; valid loss {best['valid_loss']:.4f}, "
                f"accuracy {100 * best['valid_accuracy']:.1f} %",
                flush=True,
            )
    plain, tail = (np.mean(rows[name], 0) for name in ("plain", "tail"))
    print(
        f"{len(data.parts.train)} training images, {options.epochs} epochs, last {options.last_stages}: tail takes "
        f"{100 * tail[1] / plain[1]:.0f} % of the processor seconds ({100 * tail[0] / plain[0]:.0f} % of the wall seconds); valid "
        f"loss {plain[2]:.4f} and {tail[2]:.4f}, accuracy {100 * plain[3]:.1f} and {100 * tail[3]:.1f} %"
    )


if __name__ == "__main__":
    main()
