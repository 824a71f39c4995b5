"""What augmentation costs: views per second of each pipeline, and its share of a training step of lite0.

    python benchmarks/augment.py [--device cpu|cuda] [--batch 32] [--threads 2]

Prepared pixels of 224 px inputs; everything that a step does for its images: gathering, drawing, copying, computing. Results:
docs/lab-log.md, 2026-11-28.
"""

import argparse
import time

import numpy as np
import torch

from topwork.data.augment import PIPELINES, pipeline
from topwork.data.transforms import InputSpec
from topwork.training.batches import ImageDataset, to_device


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    spec, rng, rows = InputSpec(height=224, width=224), np.random.default_rng(0), np.arange(options.batch)
    for name in PIPELINES:
        prepared = pipeline(name).prepared(spec)
        pixels = rng.integers(0, 255, (options.batch, prepared.height, prepared.width, 3), np.uint8)
        data = ImageDataset(pixels, rows % 2, spec, name)
        seconds = []
        for epoch in range(12):
            began = time.perf_counter()
            views = to_device(data.load(rows, epoch), options.device)
            float(views[0, 0, 0, 0])  # waits for the device
            seconds.append(time.perf_counter() - began)
        print(f"{name:20} {options.batch / np.median(seconds[2:]):8.0f} images/s on {options.device}")


if __name__ == "__main__":
    main()
