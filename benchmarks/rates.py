"""Which learning rates suit tuning by default? Loss and accuracy on valid at several spreads, on several datasets.

    python benchmarks/rates.py FOLDER [FOLDER ...] [--lr 1e-5:1e-4 5e-5:2e-4 ...] [--epochs 8] [--seeds 0 1] [--limit N]

The product's own path: the probe's head, then the whole network with the recipe of ``fit --mode tune``. Sets and spreads
take turns. Two fifths of the images are valid, so that small differences show in the loss; nothing is chosen on them here
(no mixtures of weights), and the figures are those of the best epoch by loss, beside the last one's. There is no test part.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from topwork.commands.prepare import fitted_probe, prepare_data
from topwork.progress import Reporter, Stopwatch
from topwork.settings import FitSettings
from topwork.training.finetune import TuningInputs, plan_tuning, tune


def figures(logits, labels):
    """Cross-entropy and accuracy in percent."""
    logits = logits - logits.max(1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return -float(logs[np.arange(len(labels)), labels].mean()), 100 * float((logits.argmax(1) == labels).mean())


def run(folder, settings):
    """Probe and tuned network on valid."""
    data = prepare_data(folder, settings, Stopwatch(), Reporter())
    probe = fitted_probe(data, Stopwatch(), Reporter()).probe
    valid = data.parts.valid
    before = figures(probe.head.logits(data.features.blocks(probe.head.transform.blocks, valid)), data.labels[valid])
    ready = plan_tuning(
        TuningInputs(data.backbone, data.manifest, data.features, data.parts, probe, settings), lambda *_: None
    )  # fmt: skip
    began = time.perf_counter()
    done = tune(data.backbone, ready.recipe, ready.train, ready.valid, head=ready.spec, probe=ready.start)
    history = done.result.history
    best = min(history, key=lambda record: record["valid_loss"])
    return data, probe, before, best, history[-1], time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--lr", nargs="+", default=["1e-5:1e-4", "5e-5:2e-4", "1e-4:4e-4"])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--limit", type=int, default=None, help="images of each class")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = {lr: [] for lr in options.lr}
    for seed in options.seeds:
        for folder in options.folders:
            for lr in options.lr:
                settings = FitSettings(
                    mode="tune", lr=lr, epochs=options.epochs, seed=seed, valid_fraction=0.4, test_fraction=0.0,
                    near_duplicates=False, limit_per_class=options.limit, interpolate=False,
                )  # fmt: skip
                data, probe, before, best, last, seconds = run(folder, settings)
                found[lr].append((best["valid_loss"] - before[0], 100 * best["valid_accuracy"] - before[1]))
                print(
                    f"{folder}, seed {seed}: {len(data.parts.train)} train, {len(data.parts.valid)} valid; {probe.head.kind} "
                    f"probe {before[0]:.4f} {before[1]:.1f} %; lr {lr}: epoch {best['epoch']} {best['valid_loss']:.4f} "
                    f"{100 * best['valid_accuracy']:.1f} %, last {last['valid_loss']:.4f} "
                    f"{100 * last['valid_accuracy']:.1f} %; {seconds:.0f} s",
                    flush=True,
                )
    for lr, rows in found.items():
        loss, accuracy = np.mean(rows, 0)
        print(
            f"lr {lr}: against the probe, cross-entropy {loss:+.4f}, accuracy {accuracy:+.2f} points ({len(rows)} runs)"
        )


if __name__ == "__main__":
    main()
