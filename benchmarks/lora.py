"""LoRA against tuning everything: trained parameters, peak memory and time per step.

    python benchmarks/lora.py [--backbone vit_small_patch16_224] [--batch 32] [--steps 5] [--device cpu|cuda]

Each way in a process of its own, on random pixels and random weights. Memory is the peak of the process (CPU, less that before
the network was made) or of the device. Result on two cores without bf16: see docs/lab-log.md, 2026-11-28.
"""

import argparse
import json
import multiprocessing
import resource
import time

import numpy as np
import torch

from topwork.models.backbone import load_backbone
from topwork.models.head import HeadSpec
from topwork.training.batches import ImageDataset
from topwork.training.finetune import data_facts, make_network, stage_names
from topwork.training.loop import TrainableNetwork
from topwork.training.losses import Loss
from topwork.training.optimizer import set_rates, stage_table, start_phase
from topwork.training.recipe import TuneSettings, plan


def measure(strategy, options, answers):
    """Trains a few steps and sends the figures."""
    import peft  # noqa: F401 - its import takes memory, too: not what is compared

    torch.set_num_threads(2)
    backbone = load_backbone(f"random:{options.backbone}")
    spec, labels = backbone.spec, np.arange(options.batch) % 2
    pixels = np.random.default_rng(0).integers(0, 255, (options.batch, spec.height, spec.width, 3), np.uint8)
    data = ImageDataset(pixels, labels, spec)
    facts = data_facts(labels, 2, 10)
    recipe = plan(TuneSettings(strategy=strategy, augment="none"), facts, stage_names(backbone.module(1)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    network = make_network(backbone, HeadSpec(), recipe)
    table = stage_table(network, recipe)
    net, phase = TrainableNetwork(network, recipe, data, options.device), recipe.phases[-1]
    optimizer, loss_of = start_phase(net.core, recipe, phase), Loss(recipe, options.device)
    set_rates(optimizer, recipe, phase, 0.5)
    kept = net.state()  # as the moving average is
    seconds = []
    for _ in range(options.steps + 1):
        began = time.perf_counter()
        optimizer.zero_grad()
        loss_of.mean(net.logits(net.inputs(data.load(np.arange(options.batch), 0))), loss_of.targets(labels)).backward()
        optimizer.step()
        if options.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if options.device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    answers.put(
        {
            "strategy": strategy, "trained": sum(row.n_trained for row in table), "peak_mb": round(peak),
            "seconds_per_step": round(float(np.median(seconds[1:])), 3), "precision": recipe.precision,
            "kept_mb": round(sum(value.nbytes for value in kept.values()) / 2**20),
        }
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="vit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    for strategy in ("all", "lora", "all", "lora"):
        answers = context.Queue()
        process = context.Process(target=measure, args=(strategy, options, answers))
        process.start()
        print(json.dumps(answers.get()), flush=True)
        process.join()


if __name__ == "__main__":
    main()
