"""Folded networks and replaced convolutions compute what the originals do, forwards and backwards."""

import pytest
import timm
import torch
from timm.layers import Conv2dSame
from torch import nn

from topwork.training.cpu import FastDepthwise, avoid_strided_pointwise, fold_batch_norm, use_fast_depthwise
from topwork.training.loop import TrainableNetwork
from training.drawn import TinyNetwork, recipe_for, streams


def with_lived_in_norms(network, seed=0):
    torch.manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return network.eval()


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet18", "mobilenetv2_050"])
def test_fold_and_unfold_are_exact(name):
    network = with_lived_in_norms(timm.create_model(name, pretrained=False, num_classes=3))
    original = timm.create_model(name, pretrained=False, num_classes=3)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = network(x)
        folding = fold_batch_norm(network, (3, 64, 64))
        assert folding is not None
        assert not any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
        torch.testing.assert_close(network(x), expected, rtol=1e-3, atol=1e-3 * float(expected.std()))
        for value in network.parameters():
            value.mul_(1.01)  # as if trained
        trained = network(x)
        original.load_state_dict(folding.unfold(network.state_dict()))
        torch.testing.assert_close(original.eval()(x), trained, rtol=1e-3, atol=1e-3 * float(trained.std()))


def test_a_norm_without_its_own_convolution_leaves_the_network_alone():
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2))
    network(torch.zeros(2, 3, 8, 8))
    before = {k: v.clone() for k, v in network.state_dict().items()}
    assert fold_batch_norm(network, (3, 8, 8)) is None
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("size", [(12, 12), (11, 9)])
def test_gradients_are_those_of_autograd(kernel, stride, same, size):
    torch.manual_seed(0)
    kind = Conv2dSame if same else nn.Conv2d
    conv = kind(6, 6, kernel, stride=stride, padding=0 if same else kernel // 2, groups=6).double()
    holder = nn.Sequential(conv)
    images = torch.randn(3, 6, *size, dtype=torch.double)
    results = []
    for fast in (False, True):
        if fast:
            assert use_fast_depthwise(holder) == 1
            assert isinstance(holder[0], FastDepthwise)
        x = images.clone().to(memory_format=torch.channels_last).requires_grad_()
        holder.zero_grad()
        y = holder(x)
        (y * torch.linspace(-1, 1, y.numel(), dtype=torch.double).view_as(y)).sum().backward()
        results.append([y.detach(), x.grad, holder[0].weight.grad.clone(), holder[0].bias.grad.clone()])
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)


def test_other_convolutions_are_left_alone():
    network = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(4, 4, 7, groups=4))
    assert use_fast_depthwise(network) == 0


@pytest.mark.parametrize("same", [False, True])
def test_strided_pointwise_convolutions_of_few_channels_keep_their_gradients(same):
    """oneDNN writes outside its memory for them, and the process ends; FastViT, MobileOne and RepVGG have one."""
    torch.manual_seed(0)
    network = nn.Sequential((Conv2dSame if same else nn.Conv2d)(3, 48, 1, stride=2), nn.Conv2d(48, 8, 1, stride=2))
    images, results = torch.randn(8, 3, 255, 256), []
    for replaced in (False, True):
        if replaced:
            assert avoid_strided_pointwise(network) == 1
            assert avoid_strided_pointwise(network) == 0
            network, images = (part.to(memory_format=torch.channels_last) for part in (network, images))
        network.zero_grad()
        y = network(images)
        y.square().mean().backward()
        results.append([y.detach(), *(value.grad.clone() for value in network.parameters())])
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4 * float(plain.std()))


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_training_replaces_them(precision):
    network = TinyNetwork()
    network.conv_stem = nn.Conv2d(3, 8, 1, stride=2, bias=False)
    recipe = recipe_for(precision=precision)
    net = TrainableNetwork(network, recipe, streams(recipe=recipe)[0], "cpu")
    assert avoid_strided_pointwise(net.core) == 0
