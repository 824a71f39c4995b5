"""The probe's extended head inside the network that is tuned."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from topwork.features.engine import TorchEngine
from topwork.models.backbone import load_backbone
from topwork.models.head import FeatureTransform, HeadSpec, LinearHead
from topwork.training.batches import ImageDataset
from topwork.training.cpu import fold_batch_norm
from topwork.training.finetune import ExtendedHead, data_facts, make_network, trained_from, tune
from topwork.training.recipe import TuneSettings, plan
from training.drawn import drawn_images, tuned_logits

SIDE = 64
EXTENDED = HeadSpec("extended")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return load_backbone("random:tf_efficientnet_lite0", cache=cache).with_spec(height=SIDE, width=SIDE)


@pytest.fixture(scope="module")
def train(backbone):
    return ImageDataset(*drawn_images(24, side=SIDE), backbone.spec)


@pytest.fixture(scope="module")
def blocks(backbone, train):
    return TorchEngine(backbone, "f32").run_unrounded(train.pixels)


@pytest.fixture(scope="module")
def probe(blocks):
    return head_on(blocks, ("last", "stages"), "sqrt")


def head_on(blocks, names, power, n_classes=2):
    """Any extended head; its columns are centered and scaled as those of a probe."""
    rng = np.random.default_rng(0)
    joined = np.concatenate([blocks[name] for name in names], 1)
    d = joined.shape[1]
    rooted = np.sign(joined) * np.sqrt(np.abs(joined)) if power == "sqrt" else joined
    transform = FeatureTransform(names, power, rooted.mean(0), rooted.std(0) + np.float32(0.1))
    weight = rng.normal(size=(n_classes, d)).astype(np.float32) / np.float32(np.sqrt(d))
    return LinearHead(transform, weight, np.array([0.1, -0.2], np.float32))


def recipe_of(backbone, **settings):
    settings = {"epochs": 1, "batch_size": 8, "augment": "none", "precision": "f32"} | settings
    return plan(TuneSettings(**settings), data_facts(np.arange(24) % 2, 2, 8), [s.name for s in backbone.stages])


@pytest.mark.parametrize(
    ("names", "power"), [(("last", "stages"), "sqrt"), (("last",), "sqrt"), (("last",), "unit"), (("stages",), "none")]
)
def test_before_the_first_step_the_network_answers_what_the_probe_answers(backbone, train, blocks, names, power):
    probe = head_on(blocks, names, power)
    recipe = recipe_of(backbone)
    network = make_network(backbone, EXTENDED, recipe, probe)
    found = tuned_logits(network, network.state_dict(), recipe, train)
    np.testing.assert_allclose(found, probe.logits(blocks), rtol=1e-3, atol=1e-3)


def test_a_channel_that_is_zero_has_a_finite_slope():
    zeros = np.zeros((1, 3), np.float32)
    head = ExtendedHead(head_on({"last": zeros + 1}, ("last",), "sqrt"))
    features = torch.tensor([[0.0, 4.0, -9.0]], requires_grad=True)
    head(features).sum().backward()
    assert torch.isfinite(features.grad).all()
    assert (features.grad[0, 1:] != 0).all()


def test_gradients_reach_the_stages_that_the_head_reads(backbone, blocks):
    """Through the pooled maps alone: the head here does not read the last features."""
    network = make_network(backbone, EXTENDED, recipe_of(backbone), head_on(blocks, ("stages",), "sqrt"))
    network(torch.randn(2, 3, SIDE, SIDE)).square().sum().backward()
    assert network.get_parameter("blocks.4.0.conv_pw.weight").grad.abs().sum() > 0
    assert not network.classifier.pooled  # nothing of this batch is kept


def test_folding_keeps_the_answers(backbone, probe):
    network = make_network(backbone, EXTENDED, recipe_of(backbone), probe).eval()
    images = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        expected = network(images)
        assert fold_batch_norm(network, (3, SIDE, SIDE)) is not None
        torch.testing.assert_close(network(images), expected, rtol=1e-3, atol=1e-3)


def test_the_tuned_network_and_head_are_a_backbone_with_an_extended_head(backbone, train, probe):
    """What training judged is what the engine computes from the adopted backbone."""
    recipe = recipe_of(backbone, lr="1e-3", interpolate=False, ema=None)
    done = tune(backbone, recipe, train, train, head=EXTENDED, probe=probe)
    tuned, head = done.backbone_and_head()
    assert head.kind == "extended"
    assert not np.allclose(head.weight, probe.weight)
    after = TorchEngine(tuned, "f32").run_unrounded(train.pixels)
    expected = tuned_logits(done.network(), done.state, recipe, train)
    np.testing.assert_allclose(head.logits(after), expected, rtol=2e-3, atol=2e-3)


def test_an_extended_probe_is_kept_where_it_can_be(probe, blocks):
    settings = TuneSettings()
    assert trained_from(probe, settings) == EXTENDED
    assert trained_from(probe, replace(settings, outputs="binary")) == HeadSpec()
    assert trained_from(probe, replace(settings, strategy="scratch")) == HeadSpec()
    assert trained_from(head_on(blocks, ("last",), "none"), settings) == HeadSpec()
