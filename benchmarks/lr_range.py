"""Is the range test's suggestion within a factor of 10 of the best rate that a sweep finds?

    python benchmarks/lr_range.py FOLDER... [--size 96] [--epochs 2] [--head linear|64:0.1] [--limit 300]

For each dataset: the suggestion of ``topwork lr-range`` for tuning everything, and a sweep of short trainings at rates half
a decade apart, each judged by its lowest loss on valid. With a linear head, which starts from the probe's, the
loss can hardly fall; with hidden layers it starts at random. Both read the same images.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace

import torch

from topwork.commands.prepare import prepare_data
from topwork.progress import Reporter, Steps
from topwork.settings import FitSettings
from topwork.training.finetune import make_network, plan_tuning
from topwork.training.loop import fit
from topwork.training.lr_range import range_test
from topwork.training.recipe import plan

RATES = [10 ** (exponent / 2) for exponent in range(-10, -1)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--head", nargs="+", default=["linear", "64:0.1"])
    parser.add_argument("--limit", type=int, default=None, help="images of each class")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for folder in options.folders:
        for head in options.head:
            compare(folder, head, options)


def compare(folder, head, options):
    from topwork.features.probe import fit_probe

    settings = FitSettings(
        mode="tune", size=options.size, limit_per_class=options.limit, near_duplicates=False, epochs=options.epochs,
        hidden=None if head == "linear" else head, interpolate=False,
    )  # fmt: skip
    data = prepare_data(folder, settings, Steps(Reporter()))
    probe = fit_probe(data.features, data.labels, len(data.manifest.classes), rows=data.parts.train, head="plain")
    ready = plan_tuning(data.backbone, data.manifest, data.features, data.parts, probe, settings)

    def network(recipe):
        return make_network(data.backbone, ready.spec, recipe, ready.start)

    found = range_test(network(ready.recipe), ready.recipe, ready.train, n_steps=60)
    scores = {}
    for rate in RATES:
        swept = replace(settings, lr=f"{rate / 10:g}:{rate:g}")
        recipe = plan(swept, ready.facts, data.backbone.stage_names, head_is_fitted=ready.spec.starts_from_probe)
        recipe = replace(recipe, phases=recipe.phases[-1:], clip_norm=1.0)
        try:
            history = fit(network(recipe), recipe, ready.train, ready.valid).history
            scores[rate] = min(record["valid_loss"] for record in history)
        except Exception as error:  # noqa: BLE001 - a rate at which training breaks is a result
            print(f"  {rate:.1e}: {error}")
            scores[rate] = math.inf
    best = min(scores, key=scores.get)
    factor = max(found.suggestion / best, best / found.suggestion)
    print(
        f"{folder} ({len(data.parts.train)} training images), {head} head: suggested {found.suggestion:.1e}, best of the sweep "
        f"{best:.1e}, factor {factor:.1f}; " + ", ".join(f"{r:.0e} {v:.3f}" for r, v in scores.items()),
        flush=True,
    )
    print(f"  {found.reason} ({', '.join(f'{name} {rate:.1e}' for name, rate in found.rules.items())})", flush=True)


if __name__ == "__main__":
    main()
