"""Vanishing gradients: gradient magnitudes by layer in plain and residual networks of increasing depth.

Measured on one batch, at the start and after some training. Without skip connections, each layer multiplies the gradient by
less than one; with ``x + f(x)`` there is a path that multiplies it by one. Also solves the lecture's exercise on which padding
keeps the size of a feature map.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from topwork.blocks import AnyCell, Chart, Series, Table
from topwork.models.modules import count_parameters
from topwork.models.small_networks import Bottleneck, DeepNetwork, ResNet9, SameConv, layer_gradients
from topwork.studies.bench import Bench
from topwork.studies.learning import Learned, Task, learn, seeded, task_of
from topwork.studies.study import Findings, compared, measured
from topwork.training.recipe import TuneSettings

N_BATCH = 32
KERNELS = range(1, 9)
VANISHED = 0.02  # relative to the shallowest network; below, the gradient decays with depth


@dataclass(frozen=True, eq=False)
class Measurement:
    """Gradients of one network, layer by layer from the first after the stem, before and after training."""

    kind: str
    depth: int
    start: list[float]
    end: list[float]
    learned: Learned

    @property
    def ratio(self) -> float:
        """Gradient of the first layer over that of the last, at the start."""
        return self.start[0] / max(self.start[-1], 1e-30)

    @property
    def ratio_after(self) -> float:
        """The same after training."""
        return self.end[0] / max(self.end[-1], 1e-30)


def run(bench: Bench) -> Findings:
    """Runs the study."""
    epochs, depths = bench.pick(6, 1), bench.pick((4, 8, 16, 32), (4, 12))
    task = task_of(bench, bench.scaled(32))
    found = []
    for kind in ("plain", "residual"):
        for depth in depths:
            bench.reporter.step(f"residual: {kind}, {depth} layers")
            found.append(_measure(kind, depth, task, epochs))
    plain, residual = (m.learned for m in found if m.depth == depths[-1])
    kernels = [_kernel_row(k) for k in KERNELS]
    rows = tuple(
        (m.kind, m.depth, m.ratio, m.ratio_after, measured(m.learned.correct), m.learned.n_parameters) for m in found
    )
    return Findings(
        sentences=(
            *_gradient_sentences(found),
            compared(plain.name, plain.correct, residual.name, residual.correct, bench.seed),
            padding_sentence(kernels),
        ),
        parts=(
            _chart("Gradient by layer at the start", found, "start"),
            _chart("Gradient by layer after training", found, "end"),
            Table(
                "Depth",
                ("network", "layers", "first / last gradient at the start", "after training", "accuracy", "parameters"),
                rows,
                "16 channels, no batch norm.",
            ),
            Table(
                "Padding that keeps the size",
                ("kernel", "padding kernel - 2", "padding kernel // 2", "padding that keeps the size (before, after)"),
                tuple(kernels),
                "Size of a 16 px feature map after the convolution. x + f(x) needs 16.",
            ),
            _blocks(),
        ),
        values={
            "first_by_last": {f"{m.kind} {m.depth}": m.ratio for m in found},
            "first_by_last_after": {f"{m.kind} {m.depth}": m.ratio_after for m in found},
        },
        facts=task.facts(bench, epochs),
    )


def _measure(kind: str, depth: int, task: Task, epochs: int) -> Measurement:
    network = seeded(lambda: DeepNetwork(task.n_classes, depth, residual=kind == "residual"), task.seed)
    start = _gradients(network, task)
    settings = TuneSettings(strategy="scratch", epochs=epochs, augment="none", lr="2e-3", batch_size=16)
    learned = learn(f"{kind}, {depth} layers", network, settings, task)
    return Measurement(kind, depth, start, _gradients(network, task), learned)


def _gradients(network: nn.Module, task: Task) -> list[float]:
    """Root mean square of the gradient of the loss on the first images, for each layer after the stem."""
    copied = copy.deepcopy(network).train().requires_grad_(True)
    logits = task.dataset().wrap(copied)(torch.from_numpy(task.train[:N_BATCH]))
    loss = F.cross_entropy(logits, torch.from_numpy(task.train_labels[:N_BATCH]))
    return layer_gradients(copied, copied.layers(), loss)[1:]  # type: ignore[operator]


def _chart(title: str, found: list[Measurement], when: str) -> Chart:
    series = []
    for m in found:
        values = enumerate(getattr(m, when))
        points = tuple((n / max(1, m.depth - 1), max(value, 1e-12)) for n, value in values)
        series.append(Series(m.learned.name, points, kind="dashed" if m.kind == "residual" else "line"))
    x_label = "position of the layer (0: input, 1: classifier)"
    note = "Values below 1e-12 are drawn as 1e-12."
    return Chart(title, x_label, "gradient (root mean square)", tuple(series), y_scale="log", note=note)


def _gradient_sentences(found: list[Measurement]) -> list[str]:
    said = []
    for kind in ("plain", "residual"):
        shallow, *_, deep = sorted((m for m in found if m.kind == kind), key=lambda m: m.depth)
        decays = deep.ratio < VANISHED * shallow.ratio
        said.append(
            f"In {kind} networks, the gradient of the first layer is {shallow.ratio:.2g} times that of the last with "
            f"{shallow.depth} layers and {deep.ratio:.2g} times with {deep.depth}: it {'decays' if decays else 'does not decay'} with depth."
        )
    return said


def _kernel_row(kernel: int) -> tuple[int, int | None, int, str]:
    """Sides of a map of 16 after a convolution under the two usual rules, and the padding that keeps it."""

    def side(padding: int) -> int:
        return int(nn.Conv2d(1, 1, kernel, padding=padding)(torch.zeros(1, 1, 16, 16)).shape[-1])

    conv = SameConv(1, 1, kernel)
    before, after = conv.pad.padding[:2] if isinstance(conv.pad, nn.ZeroPad2d) else (conv.conv.padding[0],) * 2
    assert conv(torch.zeros(1, 1, 16, 16)).shape[-1] == 16
    return kernel, side(kernel - 2) if kernel >= 2 else None, side(kernel // 2), f"{before}, {after}"


def padding_sentence(rows: list[tuple[int, int | None, int, str]]) -> str:
    """For which kernel sizes the lecture's padding works."""
    by_two = [str(kernel) for kernel, side, _, _ in rows if side == 16]
    by_half = [str(kernel) for kernel, _, side, _ in rows if side == 16]
    return (
        f"x + f(x) needs feature maps of the same size. For kernel sizes 1 to {rows[-1][0]}, padding by kernel - 2 works for "
        f"{', '.join(by_two)} only and padding by kernel // 2 for {', '.join(by_half)}; even kernels need asymmetric padding."
    )


def _blocks() -> Table:
    """The blocks of the lectures and their parameters."""
    made: list[tuple[str, str, nn.Module, tuple[int, int, int]]] = [
        ("identity block", "1x1, 3x3 and 1x1 convolutions with a shortcut", Bottleneck(256, (64, 64, 256)), (256, 16, 16)),
        ("identity block, kernel 4", "an even kernel", Bottleneck(256, (64, 64, 256), 4), (256, 16, 16)),
        ("convolution block", "1x1 convolution in the shortcut", Bottleneck(64, (64, 64, 256), stride=1), (64, 16, 16)),
        ("convolution block, stride 2", "halves the feature map", Bottleneck(256, (128, 128, 512), stride=2), (256, 16, 16)),
        ("ResNet-9", "ten classes", ResNet9(10), (3, 32, 32)),
    ]  # fmt: skip
    rows: list[tuple[AnyCell, ...]] = []
    for name, words, module, shape in made:
        with torch.no_grad():
            after = tuple(module.eval()(torch.zeros(1, *shape)).shape[1:])
        sides = [" x ".join(map(str, s)) for s in (shape, after)]
        rows.append((name, words, *sides, count_parameters(module)[0]))
    return Table("Blocks", ("block", "description", "input", "output", "parameters"), tuple(rows))
