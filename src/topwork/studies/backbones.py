"""The tutorials' backbones and some others: parameters, multiply-adds, images per second here, and accuracy.

Sizes are counted without weights. Speed is that of plain PyTorch in float32 on this machine, eight images at a time. Accuracy is
that of a fitted head on frozen features; it needs pretrained weights, which come with the package for the Lite networks and
must be downloaded for the others.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from topwork.blocks import Chart, Series, Table
from topwork.errors import DownloadError, UsageError
from topwork.models.backbone import load_backbone
from topwork.models.sources import EMBEDDED
from topwork.studies.bench import Bench, Bools
from topwork.studies.study import Findings, Measured, accuracies, accuracy_bars, best_of
from topwork.text import join_names

# (name, timm's name, where it is from)
NETWORKS = (
    ("lite0", "tf_efficientnet_lite0", "topwork's default"),
    ("lite1", "tf_efficientnet_lite1", "topwork"),
    ("lite2", "tf_efficientnet_lite2", "topwork"),
    ("resnet18", "resnet18.tv_in1k", "Fruits-360"),
    ("resnet34", "resnet34.tv_in1k", "Oxford pets"),
    ("resnet50", "resnet50.tv_in1k", "Oxford pets"),
    ("resnet101", "resnet101.tv_in1k", "guns and knives"),
    ("resnet152", "resnet152.tv_in1k", "guns and knives"),
    ("vgg16", "vgg16.tv_in1k", "cats and dogs, Caltech-101"),
    ("mobilenetv3_large_100", "mobilenetv3_large_100.ra_in1k", "small, for phones"),
    ("convnext_tiny", "convnext_tiny.fb_in1k", "newer"),
    ("vit_small_patch16_224", "vit_small_patch16_224.augreg_in1k", "a transformer"),
)
QUICK = ("lite0", "resnet18", "resnet50")
SIDE = 224
BATCH, MIN_SECONDS, MAX_ROUNDS = 8, 1.0, 20


@dataclass(frozen=True)
class Size:
    """What a network costs: parameters with 1,000 classes, multiply-adds per image, images per second here."""

    name: str
    source: str
    n_parameters: int
    multiply_adds: float
    images_per_second: float


def run(bench: Bench) -> Findings:
    """The study."""
    chosen = [row for row in NETWORKS if not bench.quick or row[0] in QUICK]
    if bench.settings.backbone != "auto" and bench.backbone.name not in [name for name, _, _ in chosen]:
        chosen.append((bench.backbone.name, bench.backbone.architecture, "asked for"))
    sizes: list[Size] = []
    answers: dict[str, Bools] = {}
    online = True
    for name, timm_name, source in chosen:
        bench.say(f"backbones: {name}")
        sizes.append(_size(name, timm_name, source, bench.settings.size or (96 if bench.quick else SIDE)))
        if name in EMBEDDED or name == bench.backbone.name or (online and not bench.quick):
            found = _accuracy(bench, name if name in EMBEDDED or name == bench.backbone.name else timm_name)
            online = online and (found is not None or name in EMBEDDED)
            if found is not None:
                answers[name] = found
    ordered = sorted(sizes, key=lambda size: size.multiply_adds)
    points = tuple((size.multiply_adds / 1e9, size.images_per_second) for size in ordered)
    return Findings(
        sentences=tuple(_sentences(sizes, answers, bench.seed)),
        parts=(
            Table(
                "Backbones",
                ("network", "parameters", "billion multiply-adds", "images per second", "accuracy of a fitted head", "from"),
                tuple(
                    (
                        s.name, s.n_parameters, round(s.multiply_adds / 1e9, 2), round(s.images_per_second, 1),
                        Measured.of(answers[s.name]) if s.name in answers else None, s.source,
                    )
                    for s in sizes
                ),
                "Parameters with the layer for 1,000 classes. A dash: the weights are not on this machine and could not be downloaded.",
            ),
            *([accuracy_bars("Accuracy of a fitted head", answers)] if answers else []),
            Chart(
                "Multiply-adds and speed", "billion multiply-adds per image", "images per second", (Series("networks", points),),
                x_scale="log", y_scale="log", note="From left to right: " + ", ".join(size.name for size in ordered) + ".",
            ),
        ),
        values={
            "n_parameters": {size.name: size.n_parameters for size in sizes},
            "multiply_adds": {size.name: size.multiply_adds for size in sizes},
            "images_per_second": {size.name: round(size.images_per_second, 2) for size in sizes},
            "accuracy": accuracies(answers),
        },
        facts=bench.facts(threads=torch.get_num_threads()),
    )  # fmt: skip


def _size(name: str, timm_name: str, source: str, side: int) -> Size:
    import timm

    with torch.device("meta"):
        network: Any = timm.create_model(timm_name.partition(".")[0], pretrained=False).eval()
    _, height, width = network.pretrained_cfg["input_size"]
    fixed = bool(network.pretrained_cfg.get("fixed_input_size"))
    shape = (height, width) if fixed or side == SIDE else (side, side)
    n_parameters = sum(parameter.numel() for parameter in network.parameters())
    return Size(name, source, n_parameters, multiply_adds(network, shape), _speed(network, shape))


def multiply_adds(network: Any, shape: tuple[int, int]) -> float:
    """Multiply-adds of one image of (height, width), counted on a network without values (device ``meta``)."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, *shape, device="meta"))
    return float(counter.get_total_flops()) / 2


def _speed(network: Any, shape: tuple[int, int]) -> float:
    """Images per second of a forward pass, the best of a few rounds, with made-up weights."""
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
    """Of a fitted head on its frozen features; None if the weights are not available."""
    try:
        backbone = bench.backbone if name == bench.backbone.name else load_backbone(name)
    except (DownloadError, UsageError):
        return None
    if bench.settings.size:
        backbone = backbone.with_spec(height=bench.settings.size, width=bench.settings.size)
    features = bench.features(backbone)
    return bench.correct(bench.probe(features), features)


def _sentences(sizes: list[Size], answers: dict[str, Bools], seed: int) -> list[str]:
    fast, slow = (f(sizes, key=lambda size: size.images_per_second) for f in (max, min))
    said = [
        f"{fast.name} is the fastest here with {fast.images_per_second:.0f} images per second, {slow.name} the slowest with "
        f"{slow.images_per_second:.1f}: {fast.images_per_second / slow.images_per_second:.0f} times, for "
        f"{slow.multiply_adds / fast.multiply_adds:.0f} times the multiply-adds."
    ]
    ranks = np.corrcoef(
        np.argsort(np.argsort([size.n_parameters for size in sizes])),
        np.argsort(np.argsort([-size.images_per_second for size in sizes])),
    )[0, 1]
    if len(sizes) > 2:
        how = "well" if ranks > 0.8 else "roughly" if ranks > 0.5 else "poorly"
        said.append(f"The number of parameters predicts the time per image {how} (rank correlation {ranks:.2f}).")
    if len(answers) > 1:
        said.append(best_of(answers, seed))
    missing = [size.name for size in sizes if size.name not in answers]
    if missing:
        said.append(f"Not measured, because the weights are not available here: {join_names(missing)}.")
    return said
