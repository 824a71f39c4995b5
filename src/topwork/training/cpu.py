"""Training on CPUs: batch norm folded into convolutions, fast depthwise convolutions, and a crash of oneDNN avoided.

In: a network. Out: one that computes the same values and gradients faster; :class:`Folding` converts back to a state
dict of the original network.

With frozen statistics a batch norm is a scale and a shift per channel, so it can be folded into the weight and bias of
the convolution, which are trained instead. Measured with EfficientNet-Lite0 on two cores (fp32, channels-last): 13
images per second with separate norms, 24 with folded ones.

In bf16, oneDNN's own backward pass of depthwise convolutions takes most of a training step of an EfficientNet; in f32
its kernels are the faster ones. Measured on two cores, batch 32, bf16, channels-last: gradient of the input at stride
2, 144 channels, 56 px: 97 ms, here 8; gradient of a 5×5 weight, 240 channels, 28 px: 87 ms, here 20. Two identities
help:

* The gradient of the input at stride s is the one at stride 1 of the output gradient with s - 1 zeros between its
  elements, and that is a forward convolution with the flipped weight, which is fast.
* The gradient of a 5×5 weight consists of four gradients of 3×3 weights on shifted windows, which have a fast kernel.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from topwork.models.modules import replace_module

State = dict[str, torch.Tensor]
TOLERANCE = 1e-3  # relative to the spread of the outputs; folding only reorders float32 operations


@dataclass(frozen=True)
class Folding:
    """Which norm was folded into which convolution.

    Attributes:
        pairs: (name of convolution, name of norm, epsilon of the norm).
        template: the original state, with names, shapes and everything that was not folded.
    """

    pairs: tuple[tuple[str, str, float], ...]
    template: State

    def unfold(self, state: State) -> State:
        """An equivalent state dict for the original network.

        Each norm gets mean 0, variance 1 and scale sqrt(1 + eps), so that it only adds its bias: dividing the weights
        by the old scale would lose precision if it is near zero.
        """
        result = {name: state.get(name, value) for name, value in self.template.items()}
        for conv, norm, epsilon in self.pairs:
            bias = state[f"{conv}.bias"]
            result[f"{norm}.running_mean"] = torch.zeros_like(bias)
            result[f"{norm}.running_var"] = torch.ones_like(bias)
            result[f"{norm}.weight"] = torch.full_like(bias, 1 + epsilon).sqrt()
            if f"{conv}.bias" in self.template:
                result[f"{conv}.bias"] = torch.zeros_like(bias)
            result[f"{norm}.bias"] = bias
        return {name: value.detach().clone() for name, value in result.items()}


def fold_batch_norm(network: nn.Module, shape: tuple[int, ...]) -> Folding | None:
    """Folds every batch norm of a network in place.

    Args:
        shape: (C, H, W) of an input to try it with.

    Returns:
        The folding; None, with the network unchanged, if some norm does not directly follow a convolution.
    """
    norms = [name for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return None
    trial = copy.deepcopy(network).eval()
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pairs = _pairs(trial, images)
        if sorted(norm for _, norm in pairs) != sorted(norms):
            return None
        expected = trial(images)
        for pair in pairs:
            _fold(trial, *pair)
        error = (trial(images) - expected).abs().max()
        if not error <= TOLERANCE * expected.std().clamp_min(1e-3):  # an output that is also read elsewhere
            return None
        template = {name: value.detach().clone() for name, value in network.state_dict().items()}
        return Folding(tuple((conv, norm, _fold(network, conv, norm)) for conv, norm in pairs), template)


def _pairs(network: nn.Module, images: torch.Tensor) -> list[tuple[str, str]]:
    """Pairs (convolution, norm) such that the output of the first is the input of the second."""
    outputs: list[tuple[torch.Tensor, str]] = []
    pairs: list[tuple[str, str]] = []

    def watch(name: str, module: nn.Module) -> Any:
        if isinstance(module, nn.Conv2d):
            return module.register_forward_hook(lambda _m, _i, output: outputs.append((output, name)))

        def seen(_module: nn.Module, inputs: Any) -> None:
            pairs.extend((conv, name) for output, conv in outputs[-1:] if output is inputs[0])

        return module.register_forward_pre_hook(seen)

    hooks = [watch(n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    network(images)
    for hook in hooks:
        hook.remove()
    return pairs


def _fold(network: nn.Module, conv_name: str, norm_name: str) -> float:
    """Folds one pair; returns the norm's epsilon."""
    conv: Any = network.get_submodule(conv_name)
    norm: Any = network.get_submodule(norm_name)
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    conv.weight.requires_grad_(True)
    conv.bias.requires_grad_(True)
    # timm's norms may include activation and dropout
    rest = [part for part in (getattr(norm, "drop", None), getattr(norm, "act", None)) if part is not None]
    replace_module(network, norm_name, nn.Sequential(*rest) if rest else nn.Identity())
    return float(norm.eps)


def avoid_strided_pointwise(network: nn.Module) -> int:
    """Lets the 1×1 convolutions with a stride and few channels see only the pixels they use; returns how many.

    For the gradient of their weights oneDNN writes outside its memory in channels-last (torch 2.15, AVX2 and AVX-512,
    2 to 12 input channels at 256 px), which ends the process. FastViT, MobileOne and RepVGG have one at the input.
    """

    def slice_input(stride: tuple[int, ...], _module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        return inputs[0][:, :, :: stride[0], :: stride[1]]

    found = [module for module in network.modules() if _is_strided_pointwise(module)]
    for module in found:
        assert isinstance(module, nn.Conv2d)
        module.register_forward_pre_hook(partial(slice_input, module.stride))
        module.stride = (1, 1)
    return len(found)


def _is_strided_pointwise(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride != (1, 1)
        and module.padding in ((0, 0), "valid")
        and module.groups == 1
        and module.in_channels < 16
    )


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
    """A fast depthwise convolution with the parameters of another, including TensorFlow's "same" padding."""

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
    """The gradients as autograd computes them."""
    channels = weight.shape[0]
    by_weight: Tensor = torch.ops.aten.convolution_backward(
        gradient, x, weight, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], channels, [False, True, False]
    )[1]
    return by_weight
