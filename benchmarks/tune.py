"""Images per second of tuning, against a plain fp32 NCHW PyTorch loop of the same work.

    python benchmarks/tune.py [--backbone lite0] [--rounds 3] [--steps 6] [--threads 2] [--batch 32] [--device cuda]

Same network, images, batch size, augmentation and optimizer; frozen batch-norm statistics in both; processes take turns,
so that both see the same machine. The plain loop is what tutorials show: float32, NCHW, torch's own depthwise kernels,
eval-mode batch norms, AdamW. Prints the median rates and their ratio (the goal is 2 or more), by the clock and by the
processor's, which a busy machine does not stretch.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import numpy as np
import torch

from topwork.models.backbone import load_backbone
from topwork.models.head import HeadSpec
from topwork.training.batches import ImageDataset, InputNetwork, to_device
from topwork.training.finetune import data_facts, make_network
from topwork.training.loop import TrainableNetwork
from topwork.training.losses import Loss
from topwork.training.optimizer import start_phase
from topwork.training.recipe import TuneSettings, plan


def finish(device):
    """Waits for a GPU, whose work is queued, so that a step is timed whole."""
    if device == "cuda":
        torch.cuda.synchronize()


def plain_step(backbone, recipe, stream, batch, device):
    """One step of the plain loop, as a function of nothing."""
    network = InputNetwork(make_network(backbone, HeadSpec(), recipe), backbone.spec).to(device)
    network.train()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4)
    rows = np.arange(batch)

    def step():
        images = to_device(stream.load(rows, 0), device)
        normalized = ((images.permute(0, 3, 1, 2).float() - network.mean) / network.std).contiguous()
        labels = torch.from_numpy(stream.labels[rows]).to(device)
        loss = torch.nn.functional.cross_entropy(network.network(normalized), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        finish(device)

    return step


def our_step(backbone, recipe, stream, batch, device):
    """One step of the package's loop."""
    phase = recipe.phases[0]
    net, loss_of = (
        TrainableNetwork(make_network(backbone, HeadSpec(), recipe), recipe, stream, device),
        Loss(recipe, device),
    )
    optimizer = start_phase(net.core, recipe, phase)
    rows = np.arange(batch)

    def step():
        loss = loss_of.mean(net.logits(net.inputs(stream.load(rows, 0))), loss_of.targets(stream.labels[rows]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.core.parameters(), 1.0)
        optimizer.step()
        finish(device)

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="lite0")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="in each round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", choices=tuple(STEPS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options)))
        return
    rounds = {name: [] for name in STEPS}
    for _ in range(options.rounds):
        for name, found in rounds.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
            found.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout.splitlines()[-1]))
    for number, title in enumerate(("by the clock", "by processor time")):
        rates = {
            name: options.batch / float(np.median([step[number] for steps, _ in found for step in steps]))
            for name, found in rounds.items()
        }
        told = ", ".join(f"{name} {rate:.1f} images/s" for name, rate in rates.items())
        print(f"{title}: {told}; ratio {rates['topwork'] / rates['plain loop']:.2f}")
    precision = rounds["topwork"][0][1]
    print(
        f"topwork in {precision}, the plain loop in f32, {options.device}, {options.threads} threads, batches of "
        f"{options.batch}, median of {options.rounds} rounds of {options.steps} steps"
    )


def measure(options):
    """Seconds by the clock and of the processor of each step of one contestant, and the precision."""
    torch.set_num_threads(options.threads)
    backbone = load_backbone(options.backbone)
    side, batch = backbone.spec.height, options.batch
    pixels = np.random.default_rng(0).integers(0, 255, (batch, side, side, 3), np.uint8)
    labels = np.arange(batch) % 2
    facts = data_facts(np.arange(1000) % 2, 2, 100)
    recipe = plan(TuneSettings(augment="light", batch_size=batch), facts, [stage.name for stage in backbone.stages])
    stream = ImageDataset(pixels, labels, backbone.spec, recipe.augmentation)
    step = STEPS[options.only](backbone, recipe, stream, batch, options.device)
    taken = []
    for _ in range(2 + options.steps):
        started, worked = time.perf_counter(), time.process_time()
        step()
        taken.append((time.perf_counter() - started, time.process_time() - worked))
    return taken[2:], recipe.precision


STEPS = {"plain loop": plain_step, "topwork": our_step}

if __name__ == "__main__":
    main()
