"""Maps of evidence: exact where they claim to be, about the model and not about the image."""

import sys
from dataclasses import replace

import numpy as np
import pytest

from drawing import draw
from topwork.data.transforms import InputSpec, fit_to_input
from topwork.evaluation.explain import (
    BORDER_AREA,
    activation_maps,
    border_share,
    find_evidence,
    overlay,
)
from topwork.evaluation.similarity import nearest_images
from topwork.features.engine import load_engine
from topwork.features.feature_maps import Opened, OpenVINONetwork, TorchNetwork, open_network
from topwork.models.backbone import load_backbone
from topwork.models.classifier import Classifier
from topwork.models.head import FeatureTransform, LinearHead, powered

SHAPES = ("disc", "square", "cross", "stripes")


@pytest.fixture(scope="module")
def images():
    return np.stack([fit_to_input(np.asarray(draw(shape, n, 224)), InputSpec()) for n in range(5) for shape in SHAPES])


@pytest.fixture(scope="module")
def classifier(images):
    """lite0 with a nearest-mean head on drawn shapes, and a z-score that is not folded in."""
    backbone = load_backbone("lite0")
    engine = load_engine(backbone, precision="f32")
    features = engine.run(images)["last"].astype(np.float32)
    mean, scale = features.mean(0), features.std(0) + 0.1
    labels = np.arange(len(images)) % 4
    centered = (features - mean) / scale
    weight = np.stack([centered[labels == c].mean(0) for c in range(4)]) / 50
    transform = FeatureTransform(("last",), "none", mean, scale)
    return Classifier(backbone, LinearHead(transform, weight, np.zeros(4, np.float32)), SHAPES, 1.0, "f32")


def test_two_channels_known_by_thought():
    """Class 1 likes channel 1, which fires bottom right; class 0 likes channel 0, which fires top left."""
    maps = np.zeros((1, 2, 2, 2), np.float32)
    maps[0, 0, 0, 0], maps[0, 1, 1, 1] = 4, 8
    transform = FeatureTransform(("last",), "none", np.zeros(2, np.float32), np.array([1, 2], np.float32))
    head = LinearHead(transform, np.eye(2, dtype=np.float32), np.zeros(2, np.float32))
    opened = Opened({"last": maps.mean((2, 3)).astype(np.float16)}, maps)
    found = activation_maps(head, opened, np.array([[0, 1]]))
    # logits (1, 1): centered 0 = 0.5 from the own channel, -0.5 from the other, and so on
    np.testing.assert_allclose(found[0, 0], [[0.5, 0], [0, -0.5]])
    np.testing.assert_allclose(found[0, 1], [[-0.5, 0], [0, 0.5]])


@pytest.fixture(scope="module", params=[open_network, TorchNetwork])
def network(request):
    return request.param(load_backbone("random:test_efficientnet"))


@pytest.mark.parametrize("power", ["none", "sqrt", "unit"])
@pytest.mark.parametrize("blocks", [("last",), ("last", "stages"), ("stages",)])
def test_the_cells_of_a_map_sum_to_the_logit(blocks, power, network):
    backbone = load_backbone("random:test_efficientnet")
    images, labels = np.stack([draw(SHAPES[n % 4], n, 160) for n in range(6)]), np.arange(6)[:, None] % 4
    features = powered(network.run(images).blocks, blocks, power)
    transform = FeatureTransform(blocks, power, features.mean(0), features.std(0) + 0.1)
    weight = np.random.default_rng(0).normal(size=(4, features.shape[1])).astype(np.float32) / 50
    head = LinearHead(transform, weight, np.ones(4, np.float32))
    found = find_evidence(Classifier(backbone, head, SHAPES, 1.0, "f32"), images, labels, network)
    assert (found.method, found.maps.shape) == ("activation", (6, 1, 5, 5))
    weight = head.weight / head.transform.scale
    constant = head.bias - weight @ head.transform.mean
    constant = constant - constant.mean()
    expected = found.logits[np.arange(len(images)), labels[:, 0]] - constant[labels[:, 0]]
    np.testing.assert_allclose(found.maps.sum((2, 3))[:, 0], expected, atol=2e-3)


def test_the_opened_network_gives_the_features_of_the_engine(images):
    backbone = load_backbone("lite0")
    engine = load_engine(backbone, kind="openvino", precision="f32")
    opened = open_network(backbone)
    assert isinstance(opened, OpenVINONetwork)
    found, expected = opened.run(images[:5]), engine.run(images[:5])
    for name in ("last", "stages"):
        np.testing.assert_array_equal(found.blocks[name], expected[name])
    np.testing.assert_allclose(found.maps.mean((2, 3)), expected["last"], atol=2e-3)
    by_torch = TorchNetwork(backbone).run(images[:5])
    np.testing.assert_allclose(by_torch.maps, found.maps, atol=0.02)


def test_pixels_between_the_levels_are_not_rounded(images):
    opened = open_network(load_backbone("lite0"))
    half = opened.run(images[:1].astype(np.float32) + 0.5).blocks["last"]
    low, high = (opened.run(images[:1].astype(np.float32) + d).blocks["last"] for d in (0, 1))
    assert (half != low).any()
    assert (half != high).any()


def test_evidence_lies_on_the_object(classifier, images):
    """One disc in a corner of a plain ground: the map of the disc has its mass there."""
    ground = np.full((2, 224, 224, 3), 128, np.uint8)
    disc = images[0][40:180, 40:180][::2, ::2]
    ground[0, 10:80, 10:80], ground[1, 140:210, 140:210] = disc, disc
    maps = np.maximum(find_evidence(classifier, ground, np.zeros((2, 1), int)).maps[:, 0], 0)
    assert maps[0, :4, :4].sum() > 2 * maps[0, 3:, 3:].sum()
    assert maps[1, 3:, 3:].sum() > 2 * maps[1, :4, :4].sum()


def test_maxima_of_a_stage_lie_where_they_were_found_on_the_coarsest_grid():
    early = np.zeros((1, 1, 4, 4), np.float32)
    early[0, 0, 3, 0] = 8
    late = np.ones((1, 1, 2, 2), np.float32)
    pooled = [[early.mean(), early.max(), late.mean(), late.max()]]
    opened = Opened({"stages": np.array(pooled, np.float16)}, None, (early, late))
    transform = FeatureTransform(("stages",), "none", np.zeros(4, np.float32), np.ones(4, np.float32))
    weight = np.array([[1, 1, 1, 0], [-1, -1, -1, 0]], np.float32)
    found = activation_maps(LinearHead(transform, weight, np.zeros(2, np.float32)), opened, np.array([[0]]))
    np.testing.assert_allclose(found[0, 0], [[0.25, 0.25], [0.25 + 0.5 + 8, 0.25]])


def test_without_torch_a_transformer_is_explained_by_covering(monkeypatch):
    backbone = load_backbone("random:test_vit")
    engine = load_engine(backbone, "openvino", "f32")
    network = open_network(backbone)
    head = LinearHead(
        FeatureTransform(("last",), "none", np.zeros(64, np.float32), np.ones(64, np.float32)),
        np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32),
        np.zeros(2, np.float32),
    )
    images = np.random.default_rng(1).integers(0, 256, (1, 160, 160, 3), dtype=np.uint8)
    monkeypatch.setitem(sys.modules, "torch", None)
    found = find_evidence(Classifier(backbone, head, ("a", "b"), 1.0, "f32"), images, [[1]], network, engine)
    assert (found.method, found.maps.shape) == ("occlusion", (1, 1, 7, 7))


class WithoutMaps:
    """What the network of a class token is without torch: it has features alone."""

    def __init__(self, engine):
        self.engine = engine

    def run(self, images):
        return Opened(self.engine.run(images), None)

    def gradient_maps(self, head, images, labels):
        return None


def test_without_maps_and_torch_images_are_covered(classifier, images):
    extended = replace(
        classifier, head=replace(classifier.head, transform=replace(classifier.head.transform, power="sqrt"))
    )
    engine = load_engine(classifier.backbone, precision="f32")
    one = images[:1]
    found = find_evidence(extended, one, np.array([[0, 2]]), WithoutMaps(engine), engine)
    assert (found.method, found.maps.shape) == ("occlusion", (1, 2, 7, 7))
    # the cell (2, 4) by hand: its own square and half a cell around it, in the mean color
    covered = one.copy()
    covered[0, 48:112, 112:176] = one[0].mean((0, 1)).astype(np.uint8)
    logits = [extended.head.logits(dict(engine.run(x)))[0] for x in (one, covered)]
    lost = [values - values.mean() for values in logits]
    assert found.maps[0, 0, 2, 4] == pytest.approx(lost[0][0] - lost[1][0], abs=1e-4)


def test_covering_is_what_captum_calls_feature_ablation(classifier, images):
    """The reference implementation, cell by cell, without the half cell around."""
    attr = pytest.importorskip("captum.attr")
    import torch

    from topwork.evaluation import explain

    head = replace(classifier.head, transform=replace(classifier.head.transform, power="sqrt"))
    extended = replace(classifier, head=head)
    engine = load_engine(classifier.backbone, precision="f32")

    def logit(pixels):
        values = extended.head.logits(dict(engine.run(pixels.numpy().astype(np.uint8))))
        return torch.from_numpy(values[:, 1] - values.mean(1))

    mask = torch.arange(49).view(1, 7, 7).repeat_interleave(32, 1).repeat_interleave(32, 2)[..., None]
    baseline = torch.from_numpy(images[:1].mean((1, 2), keepdims=True).astype(np.uint8)).float()
    expected = attr.FeatureAblation(logit).attribute(
        torch.from_numpy(images[:1]).float(), baselines=baseline, feature_mask=mask, perturbations_per_eval=49
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explain, "_REACH", 0.0)
        found = find_evidence(extended, images[:1], np.array([[1]]), WithoutMaps(engine), engine).maps[0, 0]
    np.testing.assert_allclose(found, expected[0, ::32, ::32, 0].numpy()[:7, :7], atol=1e-4)


def test_border_share_of_even_and_of_central_evidence():
    even, center = np.ones((1, 7, 7), np.float32), np.zeros((1, 7, 7), np.float32)
    center[0, 3, 3] = 1
    assert border_share(even)[0] == pytest.approx(BORDER_AREA)
    assert border_share(center)[0] == 0
    assert round(BORDER_AREA, 6) == 0.36


def test_nearest_images():
    rows, cosine = nearest_images([[1.0, 0.1], [0.0, 2.0]], [[0, 1], [3, 0], [1, 1]], 2)
    assert rows.tolist() == [[1, 2], [0, 2]]
    assert cosine[1, 0] == pytest.approx(1)


@pytest.mark.parametrize("fit", ["squash", "crop", "pad"])
def test_the_overlay_marks_the_place_that_the_network_saw(fit):
    """A map with one strong corner, on a wide picture, for each way of bringing it to the input."""
    spec = InputSpec(fit=fit)
    picture = np.full((80, 160, 3), 128, np.uint8)
    evidence = np.zeros((7, 7), np.float32)
    row = {"squash": 0, "crop": 0, "pad": 2}[fit]  # with pad the bars take rows 0, 1, 5 and 6
    evidence[row, 0] = 1
    drawn = overlay(picture, evidence, spec, 1.0)
    assert drawn.shape == picture.shape
    change = np.abs(drawn.astype(int) - drawn[79, 100]).sum(2)
    left = {"squash": 0, "crop": 40, "pad": 0}[fit]
    change[:, :left] = change[:, 160 - left :] = 0
    y, x = np.unravel_index(change.argmax(), change.shape)
    assert y < 25
    assert left <= x < left + 25
    if fit == "crop":
        assert drawn[79, 5].mean() < drawn[79, 100].mean(), "what was not seen is darker"


def test_no_evidence_leaves_the_picture_clear():
    picture = np.full((60, 60, 3), 128, np.uint8)
    np.testing.assert_array_equal(overlay(picture, np.full((7, 7), -1, np.float32), InputSpec(), 1.0), picture)


@pytest.mark.parametrize("blocks", [("last",), ("last", "stages")])
def test_the_patches_of_a_transformer_are_explained_by_gradients(blocks):
    """A cell is the rate at which the logit grows with the length of its patch's token: checked by finite differences."""
    import torch

    backbone = load_backbone("random:test_vit")
    images = np.random.default_rng(0).integers(0, 256, (2, 160, 160, 3), dtype=np.uint8)
    network = TorchNetwork(backbone)
    features = network.run(images).blocks
    n = sum(features[name].shape[1] for name in blocks)
    rng = np.random.default_rng(1)
    transform = FeatureTransform(blocks, "none", np.zeros(n, np.float32), np.ones(n, np.float32))
    head = LinearHead(transform, rng.normal(size=(3, n)).astype(np.float32), np.zeros(3, np.float32))
    classifier = Classifier(backbone, head, ("a", "b", "c"), 1.0, "f32")
    labels = np.array([[0, 2], [1, 0]])
    found = find_evidence(classifier, images, labels, network)
    assert found.method == "gradient"
    assert found.maps.shape == (2, 2, 10, 10)
    layer = "blocks.1" if "stages" in blocks else "blocks.4"  # class token: patches after the last block say nothing
    row, column, step = 3, 7, 0.02

    def logit(factor):
        def scaled(_module, _inputs, output):
            changed = output.clone()
            changed[:, 1 + 10 * row + column] *= factor
            return changed

        hook = network.module.network.get_submodule(layer).register_forward_hook(scaled, prepend=True)
        with torch.inference_mode():
            last, stages = (value.numpy() for value in network.module(torch.from_numpy(images)))
        hook.remove()
        values = head.logits({"last": last, "stages": stages})
        return values - values.mean(1, keepdims=True)

    expected = (logit(1 + step) - logit(1 - step)) / (2 * step)
    wanted = np.take_along_axis(expected, labels, 1)
    np.testing.assert_allclose(found.maps[:, :, row, column], wanted, rtol=0.05, atol=2e-3)
