"""Backbones of the tutorials and others: parameters, multiply-adds, speed and accuracy.

Sizes are counted without weights. Speed is that of plain PyTorch in float32 on this machine, eight images at a time.
Accuracy is that of a fitted head on frozen features; it needs pretrained weights, which are included for the Lite
networks and downloaded for the others.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch

from topwork.blocks import Chart, Series, Table
from topwork.errors import DownloadError, UsageError
from topwork.models.backbone import load_backbone
from topwork.models.sources import EMBEDDED
from topwork.studies.bench import Bench, Bools
from topwork.studies.study import Findings, accuracies, accuracy_bars, best_of, measured
from topwork.text import join_names

# name: (timm's name, source)
NETWORKS = {
    "lite0": ("tf_efficientnet_lite0", "topwork's default"),
    "lite1": ("tf_efficientnet_lite1", "topwork"),
    "lite2": ("tf_efficientnet_lite2", "topwork"),
    "resnet18": ("resnet18.tv_in1k", "Fruits-360"),
    "resnet34": ("resnet34.tv_in1k", "Oxford pets"),
    "resnet50": ("resnet50.tv_in1k", "Oxford pets"),
    "resnet101": ("resnet101.tv_in1k", "guns and knives"),
    "resnet152": ("resnet152.tv_in1k", "guns and knives"),
    "vgg16": ("vgg16.tv_in1k", "cats and dogs, Caltech-101"),
    "mobilenetv3_large_100": ("mobilenetv3_large_100.ra_in1k", "small, for phones"),
    "convnext_tiny": ("convnext_tiny.fb_in1k", "newer"),
    "vit_small_patch16_224": ("vit_small_patch16_224.augreg_in1k", "a transformer"),
}
QUICK = ("lite0", "resnet18", "resnet50")
SIDE = 224
BATCH, MIN_SECONDS, MAX_ROUNDS = 8, 1.0, 20


class Size(NamedTuple):
    """Cost of a network: parameters with 1,000 classes, billions of multiply-adds per image, images per second here."""

    n_parameters: int
    multiply_adds: float
    images_per_second: float


def run(bench: Bench) -> Findings:
    """Runs the study."""
    own = bench.backbone.name
    chosen = {name: row for name, row in NETWORKS.items() if not bench.settings.quick or name in QUICK}
    if bench.settings.backbone != "auto":
        chosen.setdefault(own, (bench.backbone.architecture, "requested"))
    sizes: dict[str, Size] = {}
    answers: dict[str, Bools] = {}
    online = not bench.settings.quick
    for name, (timm_name, _) in chosen.items():
        bench.reporter.step(f"backbones: {name}")
        sizes[name] = size_of(timm_name, bench.settings.size or bench.pick(SIDE, 96))
        is_here = name in EMBEDDED or name == own
        found = _accuracy(bench, name if is_here else timm_name) if is_here or online else None
        online = online and (found is not None or is_here)
        if found is not None:
            answers[name] = found
    ordered = sorted(sizes, key=lambda name: sizes[name].multiply_adds)
    points = tuple((sizes[name].multiply_adds, sizes[name].images_per_second) for name in ordered)
    rows = [
        (name, size.n_parameters, size.multiply_adds, size.images_per_second, measured(answers[name]) if name in answers else None, chosen[name][1])
        for name, size in sizes.items()
    ]  # fmt: skip
    return Findings(
        sentences=tuple(_sentences(sizes, answers, bench.seed)),
        parts=(
            Table(
                "Backbones",
                ("network", "parameters", "billion multiply-adds", "images per second", "accuracy of a probe", "used by"),
                tuple(rows),
                "Parameters include the layer for 1,000 classes. A dash means that the weights are not available on this machine.",
            ),
            *([accuracy_bars("Accuracy of a probe", answers)] if answers else []),
            Chart(
                "Multiply-adds vs. speed", "billion multiply-adds per image", "images per second", (Series("networks", points),),
                x_scale="log", y_scale="log", note="From left to right: " + ", ".join(ordered) + ".",
            ),
        ),
        values={
            **{key: {name: getattr(size, key) for name, size in sizes.items()} for key in Size._fields},
            "accuracy": accuracies(answers),
        },
        facts=bench.facts(threads=torch.get_num_threads()),
    )  # fmt: skip


def size_of(timm_name: str, side: int) -> Size:
    """Counts a timm network on the ``meta`` device, then measures its speed with dummy weights."""
    import timm
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        network: Any = timm.create_model(timm_name.partition(".")[0], pretrained=False).eval()
    _, height, width = network.pretrained_cfg["input_size"]
    fixed = network.pretrained_cfg.get("fixed_input_size") or side == SIDE
    shape = (height, width) if fixed else (side, side)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, *shape, device="meta"))
    n_parameters = sum(parameter.numel() for parameter in network.parameters())
    return Size(n_parameters, round(counter.get_total_flops() / 2e9, 3), round(_speed(network, shape), 2))


def _speed(network: Any, shape: tuple[int, int]) -> float:
    """Images per second of a forward pass, the best of a few rounds, with dummy weights."""
    network.to_empty(device="cpu")
    with torch.no_grad():
        for name, value in network.state_dict().items():
            value.fill_(1.0 if "var" in name else 0.01) if value.is_floating_point() else value.zero_()
    network.to(memory_format=torch.channels_last)
    images = torch.rand(BATCH, 3, *shape).to(memory_format=torch.channels_last)
    times: list[float] = []
    with torch.inference_mode():
        network(images[:1])
        while len(times) < MAX_ROUNDS and (len(times) < 2 or sum(times) < MIN_SECONDS):
            started = time.perf_counter()
            network(images)
            times.append(time.perf_counter() - started)
    return BATCH / min(times)


def _accuracy(bench: Bench, name: str) -> Bools | None:
    """Accuracy of a fitted head on frozen features; None if the weights are not available."""
    try:
        backbone = bench.backbone if name == bench.backbone.name else load_backbone(name)
    except (DownloadError, UsageError):
        return None
    if bench.settings.size:
        backbone = backbone.with_spec(height=bench.settings.size, width=bench.settings.size)
    features = bench.features(backbone)
    return bench.correct(bench.probe(features), features)


def _sentences(sizes: dict[str, Size], answers: dict[str, Bools], seed: int) -> list[str]:
    fast, slow = (find(sizes, key=lambda name: sizes[name].images_per_second) for find in (max, min))
    _, flops, speed = (b / a for a, b in zip(sizes[fast], sizes[slow], strict=True))
    said = [
        f"{fast} is the fastest with {sizes[fast].images_per_second:.0f} images per second, {slow} the slowest with "
        f"{sizes[slow].images_per_second:.1f}: {1 / speed:.0f} times slower, with {flops:.0f} times the multiply-adds."
    ]
    if len(answers) > 1:
        said.append(best_of(answers, seed))
    missing = [name for name in sizes if name not in answers]
    if missing:
        said.append(f"Accuracy not measured, because the weights are not available: {join_names(missing)}.")
    return said
