"""Whatever head was trained, what is kept answers as the trained network did; and the wrong ones are named."""

import numpy as np
import pytest
import torch
from torch import nn

from topwork.errors import UsageError
from topwork.features.engine import TorchEngine
from topwork.models.backbone import load_backbone
from topwork.models.head import Changes, HeadSpec, parse_head
from topwork.settings import FitSettings
from topwork.training.finetune import adopt, head_spec, make_network, stage_names
from topwork.training.recipe import DataFacts, TuneSettings, plan

SIDE = 64


def trained(backbone, spec, n_classes, **settings):
    """A network with random weights everywhere, as if trained."""
    facts = DataFacts((5,) * n_classes, 2)
    recipe = plan(TuneSettings(**settings), facts, stage_names(backbone.module(1)), head_is_fitted=False)
    torch.manual_seed(0)
    network = make_network(backbone, spec, recipe)
    with torch.no_grad():
        for value in network.parameters():
            value.add_(0.02 * torch.randn_like(value))
    return network.eval()


@pytest.mark.parametrize(
    ("architecture", "head", "changes", "outputs", "n_classes"),
    [
        ("test_efficientnet", "linear", Changes(), "softmax", 3),
        ("test_efficientnet", "linear", Changes(), "binary", 2),
        ("test_efficientnet", "drop:0.2,linear", Changes(), "softmax", 3),
        ("test_efficientnet", "cosine", Changes(), "softmax", 3),
        ("test_efficientnet", "256:0.4,16:gelu:0.2", Changes(), "softmax", 3),
        ("test_efficientnet", "drop:0.1,16", Changes(pooling="catavgmax"), "binary", 2),
        ("test_vit", "8:0.4", Changes(), "softmax", 3),
    ],
)
def test_what_is_kept_answers_as_what_was_trained(architecture, head, changes, outputs, n_classes):
    backbone = load_backbone(f"random:{architecture}").changed(changes)
    side = backbone.pretrained_cfg["input_size"][1]
    network = trained(backbone, parse_head(head), n_classes, outputs=outputs)
    adopted, linear = adopt(backbone, network.state_dict(), parse_head(head), n_classes)
    pixels = np.random.default_rng(0).integers(0, 255, (3, side, side, 3), np.uint8)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) * 255 for v in (backbone.spec.mean, backbone.spec.std))
    with torch.inference_mode():
        logits = network((torch.from_numpy(pixels).permute(0, 3, 1, 2).float() - mean) / std)
    logits = torch.cat([torch.zeros_like(logits), logits], 1) if outputs == "binary" else logits
    blocks = TorchEngine(adopted, "f32").run(pixels)
    assert adopted.n_features == linear.weight.shape[1] == blocks["last"].shape[1]
    np.testing.assert_allclose(linear.logits(blocks), logits.numpy(), rtol=2e-2, atol=5e-3)  # features are float16
    n_all = sum(value.numel() for value in network.parameters())
    n_last = linear.weight.size + linear.bias.size
    if outputs == "softmax" and head != "cosine":
        assert adopted.n_parameters + n_last == n_all


@pytest.mark.slow  # 500 MB of weights
def test_the_last_layer_of_a_vgg_alone_is_replaced_and_its_hidden_layers_can_be_dropped():
    backbone = load_backbone("random:vgg11")
    assert backbone.n_features == 4096
    dropped = backbone.changed(Changes(drop_hidden=True))
    assert dropped.n_features == 512
    assert dropped.weights_digest != backbone.weights_digest
    assert "neck" not in [stage.name for stage in dropped.stages]
    state = dropped.module().state_dict()
    assert all(torch.equal(state[key], value) for key, value in backbone.module().state_dict().items() if key in state)


def test_changes_are_part_of_what_names_the_weights():
    backbone = load_backbone("random:test_resnet")
    digests = {backbone.changed(Changes(pooling=pooling)).weights_digest for pooling in (None, "max", "avgmax")}
    assert len(digests) == 3


def test_a_module_of_ones_own_is_trained_from_a_copy():
    backbone = load_backbone("random:test_efficientnet")
    mine = nn.Sequential(nn.LayerNorm(backbone.n_features), nn.Linear(backbone.n_features, 3))
    recipe = plan(TuneSettings(), DataFacts((5, 5, 5), 2), stage_names(backbone.module(1)), head_is_fitted=False)
    network = make_network(backbone, mine, recipe)
    assert network.classifier is not mine
    assert torch.equal(network.classifier[1].weight, mine[1].weight)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hidden": "16"}, "needs --mode tune"),
        ({"head": "cosine"}, "needs --mode tune"),
        ({"hidden": "cosine", "mode": "tune"}, "cannot be combined with --head"),
        ({"hidden": "16", "head": "cosine", "mode": "tune"}, "cannot be combined with --head"),
        ({"hidden": "wide", "mode": "tune"}, "not a head"),
    ],
)
def test_a_head_that_cannot_be_is_named(settings, words):
    with pytest.raises(UsageError, match=words):
        head_spec(FitSettings(**settings))


def test_heads_that_can_be():
    assert head_spec(FitSettings()) == HeadSpec()
    assert head_spec(FitSettings(mode="tune", head="cosine")).kind == "cosine"
    assert str(head_spec(FitSettings(mode="tune", hidden="256:0.4,128:0.2"))) == "256:relu:0.4,128:relu:0.2"
