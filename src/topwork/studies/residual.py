"""Vanishing gradients: the length of the gradient in each layer of plain and residual networks of growing depth.

Measured on one batch at the start and after some training. Without a skip connection each layer multiplies the gradient
by something below one; with ``x + f(x)`` there is a way back on which it is multiplied by one. Sizes of kernels and the
padding that keeps a map's side are worked out, too: the lecture asks when its own breaks.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from topwork.blocks import Chart, Series, Table
from topwork.models.modules import count_parameters
from topwork.models.small_networks import Bottleneck, DeepNetwork, ResNet9, SameConv, layer_gradients
from topwork.studies.bench import Bench
from topwork.studies.learning import Learned, Task, learn, seeded, task_of
from topwork.studies.study import Findings, Measured
from topwork.text import count
from topwork.training.recipe import TuneSettings

SIDE, QUICK_SIDE = 32, 24
DEPTHS, QUICK_DEPTHS = (4, 8, 16, 32), (4, 12)
N_TRAIN, N_HELD_OUT, N_BATCH = 240, 200, 32
EPOCHS, QUICK_EPOCHS = 6, 1
KERNELS = range(1, 9)
VANISHED = 0.02  # a share of the gradient that falls below this part of that of the shallowest network decays


@dataclass(frozen=True, eq=False)
class Measurement:
    """Gradients of one network, layer by layer from the first after the stem, before and after training."""

    kind: str
    depth: int
    start: list[float]
    end: list[float]
    learned: Learned

    @property
    def share(self) -> float:
        """What of the last layer's gradient the first one gets, at the start."""
        return self.start[0] / max(self.start[-1], 1e-30)

    @property
    def share_after(self) -> float:
        """The same after training."""
        return self.end[0] / max(self.end[-1], 1e-30)


def run(bench: Bench) -> Findings:
    """The study."""
    side, epochs = bench.side(SIDE, QUICK_SIDE), QUICK_EPOCHS if bench.quick else EPOCHS
    task = task_of(bench, side, N_TRAIN, N_HELD_OUT)
    found = []
    for kind in ("plain", "residual"):
        for depth in QUICK_DEPTHS if bench.quick else DEPTHS:
            bench.say(f"residual: {kind}, {depth} layers")
            found.append(_measure(kind, depth, task, epochs))
    kernels = [_kernel_row(k) for k in KERNELS]
    return Findings(
        sentences=(*_gradient_sentences(found), _training_sentence(found), padding_sentence(kernels)),
        parts=(
            _plot("Gradient by layer at the start", found, "start"),
            _plot("Gradient by layer after training", found, "end"),
            Table(
                "Depth",
                ("network", "layers", "first / last gradient, start", "after training", "accuracy", "parameters"),
                tuple(
                    (m.kind, m.depth, m.share, m.share_after, Measured.of(m.learned.correct), m.learned.n_parameters)
                    for m in found
                ),
                f"16 channels, no batch norm, {count(epochs, 'epoch')} on {len(task.train)} images at {side} px.",
            ),
            Table(
                "When does the padding break?",
                ("kernel", "padding kernel - 2", "padding kernel // 2", "what keeps the side: before, after"),
                tuple(kernels),
                "Side of the map after a convolution of a 16 px map. x + f(x) needs 16.",
            ),
            _blocks(),
        ),
        values={
            "first_by_last": {f"{m.kind} {m.depth}": m.share for m in found},
            "first_by_last_after": {f"{m.kind} {m.depth}": m.share_after for m in found},
        },
        facts=bench.facts(side=side, epochs=epochs, n_train=len(task.train), n_held_out=len(task.held_out)),
    )


def _measure(kind: str, depth: int, task: Task, epochs: int) -> Measurement:
    network = seeded(lambda: DeepNetwork(task.n_classes, depth, residual=kind == "residual"), task.seed)
    start = _gradients(network, task)
    settings = TuneSettings(strategy="scratch", epochs=epochs, augment="none", lr="2e-3", batch_size=16)
    learned = learn(f"{kind}, {depth} layers", network, settings, task)
    return Measurement(kind, depth, start, _gradients(network, task), learned)


def _gradients(network: nn.Module, task: Task) -> list[float]:
    """Of the loss on the first images, for each layer after the stem."""
    some = replace(task, held_out=task.train[:N_BATCH], held_out_labels=task.train_labels[:N_BATCH])
    copied = copy.deepcopy(network).train().requires_grad_(True)
    logits = some.inputs(copied)(torch.from_numpy(some.held_out))
    loss = F.cross_entropy(logits, torch.from_numpy(some.held_out_labels))
    return layer_gradients(copied, copied.layers(), loss)[1:]  # type: ignore[operator]


def _plot(title: str, found: list[Measurement], when: str) -> Chart:
    series = [
        Series(f"{m.kind}, {m.depth} layers", tuple(
            (n / max(1, m.depth - 1), max(value, 1e-12)) for n, value in enumerate(getattr(m, when))
        ), kind="dashed" if m.kind == "residual" else "line")
        for m in found
    ]  # fmt: skip
    return Chart(
        title, "place of the layer: 0 is next to the image, 1 next to the classifier", "gradient (root mean square)",
        tuple(series), y_scale="log", note="Values below 1e-12 are drawn at 1e-12.",
    )  # fmt: skip


def _gradient_sentences(found: list[Measurement]) -> list[str]:
    said = []
    for kind in ("plain", "residual"):
        own = sorted((m for m in found if m.kind == kind), key=lambda m: m.depth)
        shallow, deep = own[0], own[-1]
        facts = (
            f"In {kind} networks the first layer gets {_times(shallow.share)} of the last one's gradient with {shallow.depth} "
            f"layers and {_times(deep.share)} with {deep.depth}"
        )
        fall = shallow.share / max(deep.share, 1e-30)
        if deep.share < VANISHED * shallow.share:
            said.append(f"{facts}: it decays with depth, {_fold(fall)}.")
        else:
            said.append(
                f"{facts}: it does not decay away with depth, it stays within a factor of {max(fall, 1 / fall):.1f}."
            )
    return said


def _training_sentence(found: list[Measurement]) -> str:
    deepest = {kind: max((m for m in found if m.kind == kind), key=lambda m: m.depth) for kind in ("plain", "residual")}
    plain, residual = (Measured.of(deepest[kind].learned.correct) for kind in ("plain", "residual"))
    facts = (
        f"Trained alike, the deepest plain network is right for {100 * plain.value:.1f} %, the deepest residual one for "
        f"{100 * residual.value:.1f} %"
    )
    if plain.overlaps(residual):
        return f"{facts}: no clear difference, their intervals overlap."
    return f"{facts}: the {'residual' if residual.value > plain.value else 'plain'} one is clearly better."


def _fold(fall: float) -> str:
    return f"{fall:,.0f} times" if fall < 1e4 else f"by {round(math.log10(fall))} orders of magnitude"


def _times(share: float) -> str:
    return f"{share:.2g} times" if share >= 0.01 else f"{share:.0e}".replace("e-0", "e-") + " times"


def _kernel_row(kernel: int) -> tuple[int, int | None, int, str]:
    """Sides of a map of 16 after a convolution under the two usual rules, and what keeps it."""
    conv = SameConv(1, 1, kernel)
    before, after = conv.pad.padding[:2] if isinstance(conv.pad, nn.ZeroPad2d) else (conv.conv.padding[0],) * 2
    assert conv(torch.zeros(1, 1, 16, 16)).shape[-1] == 16
    by_two = _side(kernel, kernel - 2) if kernel >= 2 else None
    return kernel, by_two, _side(kernel, kernel // 2), f"{before}, {after}"


def _side(kernel: int, padding: int) -> int:
    return int(nn.Conv2d(1, 1, kernel, padding=padding)(torch.zeros(1, 1, 16, 16)).shape[-1])


def padding_sentence(rows: list[tuple[int, int | None, int, str]]) -> str:
    """When the lecture's padding breaks, read off the table."""
    by_two = [str(kernel) for kernel, side, _, _ in rows if side == 16]
    by_half = [str(kernel) for kernel, _, side, _ in rows if side == 16]
    return (
        f"x + f(x) needs a map of the same side: of kernels 1 to {rows[-1][0]}, padding by kernel - 2 gives that for "
        f"{', '.join(by_two)} only, padding by kernel // 2 for {', '.join(by_half)}; even kernels need one zero more on one side."
    )


def _blocks() -> Table:
    """The blocks of the lectures and what they hold."""
    made: list[tuple[str, str, nn.Module, tuple[int, int, int]]] = [
        ("identity block", "1 x 1, 3 x 3, 1 x 1 around x", Bottleneck(256, (64, 64, 256)), (256, 16, 16)),
        ("identity block, kernel 4", "an even kernel", Bottleneck(256, (64, 64, 256), 4), (256, 16, 16)),
        ("convolution block", "the shortcut is a 1 x 1 convolution", Bottleneck(64, (64, 64, 256), stride=1), (64, 16, 16)),
        ("convolution block, stride 2", "halves the map", Bottleneck(256, (128, 128, 512), stride=2), (256, 16, 16)),
        ("ResNet-9", "ten classes", ResNet9(10), (3, 32, 32)),
    ]  # fmt: skip
    rows = []
    for name, words, module, shape in made:
        with torch.no_grad():
            after = tuple(module.eval()(torch.zeros(1, *shape)).shape[1:])
        rows.append((name, words, _shape(shape), _shape(after), count_parameters(module)[0]))
    return Table("Blocks", ("block", "what it is", "from", "to", "parameters"), tuple(rows))


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(str(n) for n in shape)
