"""Depthwise convolutions with a backward pass that CPUs can do in reasonable time.

In: a network. Out: the same network, its depthwise convolutions computing the same values and gradients by other
means. Nothing else changes, and on GPUs there is no reason to use this.

oneDNN's own backward of depthwise convolutions takes most of a training step of an EfficientNet. Measured on two
cores, batch 32, bf16, channels-last: gradient by the input at stride 2, 144 channels, 56 px: 97 ms, here 8; gradient by
a 5×5 weight, 240 channels, 28 px: 87 ms, here 20. Two identities help:

* The gradient by the input at stride s is the one at stride 1 of the output gradient with s - 1 zeros between its
  elements, and that is a forward convolution with the flipped weight, which is fast.
* The gradient by a 5×5 weight is four gradients by 3×3 weights on shifted windows, for which there is a fast kernel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork.models.modules import replace_module


def use_fast_depthwise(network: nn.Module) -> int:
    """Replaces the depthwise convolutions of a network in place; returns how many."""
    found = [(name, module) for name, module in network.named_modules() if _is_depthwise(module)]
    for name, module in found:
        assert isinstance(module, nn.Conv2d)
        replace_module(network, name, FastDepthwise(module))
    return len(found)


def _is_depthwise(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and not isinstance(module, FastDepthwise)
        and module.groups == module.in_channels == module.out_channels > 1
        and module.kernel_size in ((3, 3), (5, 5))
        and module.stride in ((1, 1), (2, 2))
        and module.dilation == (1, 1)
        and module.padding_mode == "zeros"
        and (type(module) is nn.Conv2d or type(module).__name__ == "Conv2dSame")
        and not isinstance(module.padding, str)
    )


class FastDepthwise(nn.Conv2d):
    """Takes over the parameters of a depthwise convolution, TensorFlow's "same" padding included."""

    def __init__(self, conv: nn.Conv2d) -> None:
        nn.Module.__init__(self)
        for name in (
            "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "transposed",
            "output_padding", "groups", "padding_mode",
        ):  # fmt: skip
            setattr(self, name, getattr(conv, name))
        self.weight, self.bias = conv.weight, conv.bias
        self.pads_same = type(conv).__name__ == "Conv2dSame"

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H', W')."""
        stride, padding = self.stride[0], int(self.padding[0])
        if self.pads_same:
            before, after = zip(
                *(_same_padding(size, self.kernel_size[0], stride) for size in x.shape[2:]), strict=True
            )
            if before == after and before[0] == before[1]:
                padding = before[0]
            else:
                x, padding = F.pad(x, (before[1], after[1], before[0], after[0])), 0
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled(x.device.type):
            kind = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(kind), weight.to(kind), None if bias is None else bias.to(kind)
        result: Tensor = _Depthwise.apply(x, weight, bias, stride, padding)
        return result


def _same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    missing = max((-(size // -stride) - 1) * stride + kernel - size, 0)
    return missing // 2, missing - missing // 2


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding, ctx.has_bias = stride, padding, bias is not None
        return F.conv2d(x, weight, bias, stride, padding, groups=weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, weight = ctx.saved_tensors
        gradient = gradients[0]
        by_x = by_weight = by_bias = None
        if ctx.needs_input_grad[0]:
            by_x = _by_input(gradient, x, weight, ctx.stride, ctx.padding)
        if ctx.needs_input_grad[1]:
            by_weight = _by_weight(gradient, x, weight, ctx.stride, ctx.padding)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            by_bias = gradient.sum((0, 2, 3))
        return by_x, by_weight, by_bias, None, None


def _by_input(gradient: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    kernel = weight.shape[-1]
    if stride > 1:
        full = [size + 2 * padding - kernel + 1 for size in x.shape[2:]]
        spread = torch.zeros(
            (*gradient.shape[:2], *full), dtype=gradient.dtype, device=x.device,
        ).contiguous(memory_format=torch.channels_last)  # fmt: skip
        spread[:, :, ::stride, ::stride] = gradient
        gradient = spread
    return F.conv2d(gradient, weight.flip(2, 3), None, 1, kernel - 1 - padding, groups=weight.shape[0])


def _by_weight(gradient: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    if weight.shape[-1] == 3:
        return _one_by_weight(gradient, x, weight, stride, padding)
    padded = F.pad(x, (padding,) * 4)
    high, wide = ((size - 1) * stride + 3 for size in gradient.shape[2:])
    result = torch.empty_like(weight)
    for top in (0, 2):
        for left in (0, 2):  # row and column 2 are computed twice, with the same result
            window = padded[:, :, top : top + high, left : left + wide].contiguous(memory_format=torch.channels_last)
            part = _one_by_weight(gradient, window, weight[:, :, :3, :3].contiguous(), stride, 0)
            result[:, :, top : top + 3, left : left + 3] = part
    return result


def _one_by_weight(gradient: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """What autograd itself would do."""
    channels = weight.shape[0]
    by_weight: Tensor = torch.ops.aten.convolution_backward(
        gradient, x, weight, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], channels, [False, True, False]
    )[1]
    return by_weight
