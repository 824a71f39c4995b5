"""The networks that lectures build by hand: plain and residual ones of any depth, ResNet-9, bottleneck blocks, gray input.

In: sizes. Out: torch modules from (B, 3, H, W) images to (B, n_outputs) logits, with their stages under ``blocks`` and
the last layer under ``classifier``, where the training loop expects them. The six-block network is in
``modules.py``. Weights have torch's default initialization.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from topwork.data.transforms import InputSpec
from topwork.errors import UsageError
from topwork.models.modules import classifier_name


def same_padding(kernel_size: int) -> tuple[int, int]:
    """(before, after) zeros that keep a map's side under a convolution of stride 1.

    A convolution gives ``side + before + after - kernel_size + 1`` positions, so before + after must be kernel_size - 1.
    Lectures pad both sides equally: by ``kernel_size - 2``, which is correct for 3 only, or by ``kernel_size // 2``, which
    is correct for odd kernels only. An even kernel needs one more zero on one side; it goes after, as in TensorFlow.
    """
    return (kernel_size - 1) // 2, kernel_size // 2


class SameConv(nn.Module):
    """A convolution whose map has the side of its input (at stride 1), for kernels of any size, even ones too."""

    def __init__(self, before: int, after: int, kernel_size: int = 3, stride: int = 1, bias: bool = True) -> None:
        super().__init__()
        first, last = same_padding(kernel_size)
        even = first != last
        self.pad = nn.ZeroPad2d((first, last, first, last)) if even else nn.Identity()
        self.conv = nn.Conv2d(before, after, kernel_size, stride, 0 if even else first, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, before, H, W) to (B, after, H / stride, W / stride)."""
        y: Tensor = self.conv(self.pad(x))
        return y


class DeepLayer(nn.Module):
    """``relu(conv(x))``, or with a skip connection ``x + relu(conv(x))``: the lecture's residual layer."""

    def __init__(self, width: int, kernel_size: int = 3, residual: bool = False, norm: bool = False) -> None:
        super().__init__()
        self.conv = SameConv(width, width, kernel_size)
        self.norm = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) to the same shape."""
        y = torch.relu(self.norm(self.conv(x)))
        return x + y if self.residual else y


class DeepNetwork(nn.Module):
    """``depth`` equal layers in three stages with 2 x 2 pooling between them: plain, or residual."""

    def __init__(
        self,
        n_outputs: int,
        depth: int,
        width: int = 16,
        *,
        residual: bool = False,
        kernel_size: int = 3,
        norm: bool = False,
    ) -> None:
        super().__init__()
        self.conv_stem = SameConv(3, width, kernel_size)
        share = [depth // 3 + (n < depth % 3) for n in range(3)]
        self.blocks = nn.Sequential(*(
            nn.Sequential(*(DeepLayer(width, kernel_size, residual, norm) for _ in range(n)), nn.MaxPool2d(2))
            for n in share
        ))  # fmt: skip
        self.classifier = nn.Linear(width, n_outputs)
        self.num_classes = n_outputs

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, n_outputs) logits; H and W at least 8."""
        maps: Tensor = self.blocks(torch.relu(self.conv_stem(images)))
        logits: Tensor = self.classifier(maps.mean((2, 3)))
        return logits

    def layers(self) -> list[SameConv]:
        """The convolutions in forward order, the stem first."""
        return [self.conv_stem, *(layer.conv for layer in self.modules() if isinstance(layer, DeepLayer))]


class Bottleneck(nn.Module):
    """Three convolutions, 1 x 1, k x k and 1 x 1, each with batch norm, around a shortcut (He et al. 2015, 1512.03385).

    With ``stride`` None it is an identity block: the input is added unchanged, so it must have ``widths[2]`` channels.
    With a stride it is a convolution block: the shortcut is a 1 x 1 convolution, and size and channels may change.
    """

    def __init__(
        self, before: int, widths: tuple[int, int, int], kernel_size: int = 3, stride: int | None = None
    ) -> None:
        super().__init__()
        if stride is None and before != widths[2]:
            raise UsageError(f"An identity block adds its input: {before} channels cannot be added to {widths[2]}.")
        inner, middle, outer = widths
        self.residual = nn.Sequential(
            *_normed(before, inner, 1), nn.ReLU(), *_normed(inner, middle, kernel_size, stride or 1), nn.ReLU(),
            *_normed(middle, outer, 1),
        )  # fmt: skip
        self.shortcut: nn.Module = (
            nn.Identity() if stride is None else nn.Sequential(*_normed(before, outer, 1, stride))
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, before, H, W) to (B, widths[2], H / stride, W / stride)."""
        return torch.relu(self.residual(x) + self.shortcut(x))


class ResNet9(nn.Module):
    """ResNet-9, the small residual network of many courses: 6,575,370 parameters at width 64 and ten classes.

    Four convolutions of 1, 2, 4 and 8 times ``width`` channels, two residual pairs, three poolings; the last map is
    max-pooled, so any input of at least 8 pixels works.
    """

    def __init__(self, n_outputs: int = 10, width: int = 64) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            nn.Sequential(*_activated(3, width)),
            nn.Sequential(*_activated(width, 2 * width), nn.MaxPool2d(2)),
            Residual(nn.Sequential(*_activated(2 * width, 2 * width), *_activated(2 * width, 2 * width))),
            nn.Sequential(*_activated(2 * width, 4 * width), nn.MaxPool2d(2)),
            nn.Sequential(*_activated(4 * width, 8 * width), nn.MaxPool2d(2)),
            Residual(nn.Sequential(*_activated(8 * width, 8 * width), *_activated(8 * width, 8 * width))),
        )
        self.classifier = nn.Linear(8 * width, n_outputs)
        self.num_classes = n_outputs

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, n_outputs) logits."""
        logits: Tensor = self.classifier(self.blocks(images).amax((2, 3)))
        return logits


class Residual(nn.Module):
    """``x + inner(x)``."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """To the shape of the input."""
        y: Tensor = x + self.inner(x)
        return y


def _normed(before: int, after: int, kernel_size: int, stride: int = 1) -> list[nn.Module]:
    return [SameConv(before, after, kernel_size, stride, bias=False), nn.BatchNorm2d(after)]


def _activated(before: int, after: int) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]


# ---- gray images and a color backbone


class LearnedColors(nn.Module):
    """A learned convolution from 1 to 3 channels in front of a color network: the lecture's exercise.

    It starts as the plain repetition of the gray channel (each brought to its channel's own mean and deviation), so the
    network's first answers are those for the repeated image. Takes (B, 3, H, W) whose channels are equal, and reads one.
    """

    def __init__(self, network: nn.Module, spec: InputSpec, kernel_size: int = 3) -> None:
        super().__init__()
        self.colors = SameConv(1, 3, kernel_size)
        self.network = network
        # tells the training loop where the classifier is
        self.pretrained_cfg = {"classifier": f"network.{classifier_name(network)}"}
        mean, std = (torch.tensor(values) for values in (spec.mean, spec.std))
        center = same_padding(kernel_size)[0]
        with torch.no_grad():
            self.colors.conv.weight.zero_()
            self.colors.conv.weight[:, 0, center, center] = std[0] / std
            assert self.colors.conv.bias is not None
            self.colors.conv.bias.copy_((mean[0] - mean) / std)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to the logits of the network."""
        logits: Tensor = self.network(self.colors(images[:, :1]))
        return logits


class FirstChannel(nn.Module):
    """A network of one input channel that is given (B, 3, H, W) with equal channels."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to the logits of the network."""
        logits: Tensor = self.network(images[:, :1])
        return logits


def fold_first_convolution(network: nn.Module) -> nn.Module:
    """Makes a color network take one channel: the first convolution's kernels are summed over their input channels.

    The logits equal those for the gray channel repeated three times, with a third of the first layer's multiplications,
    if the three channels have the same mean and deviation (as for the Lite networks). Changed in place and returned.

    Raises:
        UsageError: its first convolution does not take three channels.
    """
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None or first.in_channels != 3 or first.groups != 1:
        raise UsageError(f"{type(network).__name__}: its first convolution does not take three channels.")
    with torch.no_grad():
        first.weight = nn.Parameter(first.weight.sum(1, keepdim=True))
    first.in_channels = 1
    return network


def layer_gradients(network: nn.Module, layers: Sequence[nn.Module], loss: Tensor) -> list[float]:
    """Root mean square of the loss gradient over the weights of each layer's convolution."""
    weights: list[Any] = [next(layer.parameters()) for layer in layers]
    gradients = torch.autograd.grad(loss, weights)
    network.zero_grad(set_to_none=True)
    return [float(gradient.square().mean().sqrt()) for gradient in gradients]
