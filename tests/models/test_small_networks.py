"""The lectures' networks: shapes, parameter counts, gradients, and when hand-written padding breaks."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from topwork.data.transforms import InputSpec
from topwork.errors import UsageError
from topwork.models.modules import SixBlockNetwork, count_parameters
from topwork.models.small_networks import (
    Bottleneck,
    DeepLayer,
    DeepNetwork,
    FirstChannel,
    LearnedColors,
    ResNet9,
    SameConv,
    fold_first_convolution,
    layer_gradients,
    same_padding,
)


def size_after(kernel_size, padding, side=16):
    return nn.Conv2d(1, 1, kernel_size, padding=padding)(torch.zeros(1, 1, side, side)).shape[-1]


def test_when_the_lectures_padding_breaks():
    """kernel_size - 2 keeps the size for 3 alone, kernel_size // 2 for odd kernels alone; ours for all."""
    sizes = range(2, 10)
    assert [k for k in sizes if size_after(k, k - 2) == 16] == [3]
    assert [k for k in sizes if size_after(k, k // 2) == 16] == [3, 5, 7, 9]
    for k in range(1, 10):
        assert sum(same_padding(k)) == k - 1
        assert SameConv(1, 1, k)(torch.zeros(1, 1, 16, 16)).shape[-1] == 16


@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4, 5, 8])
def test_a_residual_layer_takes_any_kernel(kernel_size):
    layer = DeepLayer(4, kernel_size, residual=True)
    x = torch.randn(2, 4, 9, 7)
    assert layer(x).shape == x.shape
    nn.init.zeros_(layer.conv.conv.weight)
    nn.init.zeros_(layer.conv.conv.bias)
    assert torch.equal(layer(x), x)  # with nothing learned it passes its input on


@pytest.mark.parametrize("residual", [False, True])
def test_a_deep_network_has_its_layers_and_parameters(residual):
    network = DeepNetwork(3, depth=7, width=8, residual=residual)
    assert len(network.layers()) == 8
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    assert count_parameters(network)[0] == (3 * 9 * 8 + 8) + 7 * (8 * 9 * 8 + 8) + (8 * 3 + 3)


def first_by_last(residual, depth):
    torch.manual_seed(0)
    network = DeepNetwork(2, depth, residual=residual)
    loss = nn.functional.cross_entropy(network(torch.randn(8, 3, 32, 32)), torch.tensor([0, 1] * 4))
    gradients = layer_gradients(network, network.layers(), loss)
    assert len(gradients) == depth + 1
    return gradients[1] / gradients[-1]


def test_gradients_vanish_in_plain_networks_and_not_in_residual_ones():
    assert first_by_last(False, 4) > 100 * first_by_last(False, 16)
    assert first_by_last(False, 16) < 1e-3
    assert first_by_last(True, 16) > 0.1


def test_resnet9_has_the_published_number_of_parameters():
    network = ResNet9(10)
    assert count_parameters(network)[0] == 6_575_370
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert ResNet9(2, width=4)(torch.zeros(1, 3, 50, 41)).shape == (1, 2)


def test_bottlenecks_are_those_of_resnet_50():
    stage = timm.create_model("resnet50", pretrained=False).layer1
    block, identity = Bottleneck(64, (64, 64, 256), stride=1), Bottleneck(256, (64, 64, 256))
    assert count_parameters(block)[0] == count_parameters(stage[0])[0] == 75_008
    assert count_parameters(identity)[0] == count_parameters(stage[1])[0] == 70_400
    x = torch.randn(2, 64, 8, 8)
    block.eval()
    names = ["conv1", "bn1", "conv2", "bn2", "conv3", "bn3"]
    parts = [m for m in block.residual if not isinstance(m, nn.ReLU)]
    theirs = stage[0].eval()
    for name, part in zip(names, parts, strict=True):
        getattr(part, "conv", part).load_state_dict(getattr(theirs, name).state_dict())
    for number, part in enumerate(block.shortcut):
        getattr(part, "conv", part).load_state_dict(theirs.downsample[number].state_dict())
    with torch.no_grad():
        assert torch.allclose(block(x), theirs(x), atol=1e-5)
    assert Bottleneck(8, (4, 4, 16), kernel_size=4, stride=2)(torch.zeros(1, 8, 8, 8)).shape == (1, 16, 4, 4)
    with pytest.raises(UsageError, match="identity block"):
        Bottleneck(64, (64, 64, 256))


def small_network():
    torch.manual_seed(0)
    return timm.create_model("test_efficientnet", pretrained=False, num_classes=2).eval()


def test_a_folded_first_convolution_answers_like_the_repeated_channel():
    network = small_network()
    gray = torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        expected = network(gray.repeat(1, 3, 1, 1))
        n_before = count_parameters(network)[0]
        folded = FirstChannel(fold_first_convolution(network))
        found = folded(gray.repeat(1, 3, 1, 1))
    assert torch.allclose(found, expected, atol=1e-5)
    assert count_parameters(folded)[0] < n_before
    with pytest.raises(UsageError, match="three channels"):
        fold_first_convolution(network)


@pytest.mark.parametrize("statistics", [((0.5,) * 3, (0.5,) * 3), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
def test_learned_colors_start_as_the_repeated_channel_and_get_gradients(statistics):
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in statistics)
    network = small_network()
    images = (torch.rand(2, 1, 64, 64).repeat(1, 3, 1, 1) - mean) / std
    learned = LearnedColors(network, InputSpec(height=64, width=64, mean=statistics[0], std=statistics[1]))
    assert torch.allclose(learned(images), network(images), atol=1e-4)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    learned(images)[:, 0].sum().backward()
    assert learned.colors.conv.weight.grad.abs().sum() > 0


def test_the_six_blocks_can_be_narrower():
    assert count_parameters(SixBlockNetwork(1))[0] == 9_742_209
    narrow = SixBlockNetwork(3, narrower=8, padding=1)
    assert narrow(torch.zeros(2, 3, 96, 96)).shape == (2, 3)
