"""Heads and replaced classifiers: shapes, counts known from the tutorials, rows kept when classes are added."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

from topwork.errors import UsageError
from topwork.models.head import Changes, HeadSpec, parse_head
from topwork.models.modules import (
    CosineHead,
    SixBlockNetwork,
    build_classifier,
    changed,
    classifier_name,
    count_parameters,
    make_head,
    set_linear,
)


@pytest.mark.parametrize(
    "text",
    ["linear", "cosine", "256:relu:0.4", "512:gelu:0.2,128:relu:0", "drop:0.3,linear", "drop:0.1,64:tanh:0.5"],
)
def test_a_head_is_one_line_of_text(text):
    assert str(parse_head(text)) == text


def test_widths_alone_are_enough():
    assert parse_head("512,128") == parse_head("512:relu:0,128:relu:0")


@pytest.mark.parametrize("text", ["", "256:swoosh", "0:relu", "linear,linear", "256:relu:1.5", ":3"])
def test_a_wrong_head_is_refused_with_an_example(text):
    with pytest.raises(UsageError, match=r"256:0\.4"):
        parse_head(text)


def test_mlp_is_linear_activation_dropout_and_a_last_linear():
    head = make_head(parse_head("256:relu:0.4"), 10, 3)
    assert [type(m).__name__ for m in head] == ["Linear", "ReLU", "Dropout", "Linear"]
    assert head[2].p == 0.4
    assert head(torch.zeros(2, 10)).shape == (2, 3)


def test_cosine_head_does_not_see_the_length_of_features():
    head = CosineHead(4, 3)
    x = torch.randn(5, 4)
    torch.testing.assert_close(head(x), head(7 * x))
    with torch.no_grad():
        head.weight.copy_(torch.eye(3, 4))
    torch.testing.assert_close(head(torch.tensor([[0.0, 2.0, 0.0, 0.0]])), torch.tensor([[0.0, 16.0, 0.0]]))


def test_dropping_the_hidden_layers_of_a_vgg_pools_its_last_map():
    network = timm.create_model("vgg11", pretrained=False, mlp_ratio=0.01)
    build_classifier(network, HeadSpec(), 2, drop_hidden=True).eval()
    x = torch.randn(1, 3, 64, 64)
    pooled = network.features(x).mean((2, 3))
    torch.testing.assert_close(network(x), network.head.fc(pooled))


def test_six_block_network_has_the_known_count_and_one_position_left():
    network = SixBlockNetwork().eval()
    assert count_parameters(network)[0] == 9_742_209
    with torch.inference_mode():
        assert network(torch.zeros(1, 3, 224, 224)).shape == (1, 1)
        assert network.blocks(torch.zeros(1, 3, 224, 224)).shape == (1, 512, 1, 1)


def test_build_classifier_keeps_every_other_weight():
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    before = {k: v.clone() for k, v in network.state_dict().items() if not k.startswith("classifier")}
    build_classifier(network, HeadSpec(), 3)
    after = network.state_dict()
    assert set(after) - set(before) == {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert after["classifier.weight"].shape == (3, 1280)


def test_concatenated_pooling_doubles_the_features():
    network = timm.create_model("resnet18", pretrained=False)
    build_classifier(network, HeadSpec(), 3, pooling="catavgmax")
    assert network.fc.weight.shape == (3, 1024)
    assert network.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


def test_a_module_of_ones_own_is_taken_as_it_is():
    network = timm.create_model("resnet18", pretrained=False)
    mine = nn.Sequential(nn.LayerNorm(512), nn.Linear(512, 5))
    assert build_classifier(network, mine, 5).fc is mine


def test_probe_starts_the_last_layer_and_two_rows_become_one():
    network = timm.create_model("resnet18", pretrained=False)
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(2, 512)).astype(np.float32), rng.normal(size=2).astype(np.float32)
    build_classifier(network, HeadSpec(), 2)
    set_linear(network, weight, bias)
    x = torch.randn(3, 512)
    two = network.fc(x)
    build_classifier(network, HeadSpec(), 1)
    set_linear(network, weight, bias)
    torch.testing.assert_close(network.fc(x).sigmoid()[:, 0], two.softmax(1)[:, 1])


def test_hidden_layers_cannot_be_dropped_where_there_are_none():
    with pytest.raises(UsageError, match="no hidden layers"):
        build_classifier(timm.create_model("resnet18", pretrained=False), HeadSpec(), 2, drop_hidden=True)


def test_a_second_classifier_survives_pooling_or_the_pooling_is_refused():
    with torch.device("meta"):
        assert classifier_name(changed(timm.create_model("repvit_m0_9"), Changes(pooling="avg"))) == "topwork_head"
        with pytest.raises(UsageError, match="--pooling max: RepVit does not support it"):
            changed(timm.create_model("repvit_m0_9"), Changes(pooling="max"))
