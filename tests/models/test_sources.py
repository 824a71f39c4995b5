"""Every kind of name finds its network; what cannot be found is refused with what to type instead."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from topwork.errors import DownloadError, ModelError, UsageError
from topwork.models.backbone import load_backbone
from topwork.models.sources import license_note, parse_name, well_known


@pytest.mark.parametrize(
    ("name", "timm_name"),
    [
        ("facebook/dinov2-small", "vit_small_patch14_dinov2.lvd142m"),
        ("dinov2_vits14", "vit_small_patch14_dinov2.lvd142m"),
        ("google/siglip-base-patch16-224", "vit_base_patch16_siglip_224.webli"),
        ("openai/clip-vit-base-patch32", "vit_base_patch32_clip_quickgelu_224.openai"),
        ("ResNet50_Weights.IMAGENET1K_V1", "resnet50.tv_in1k"),
        ("ResNet50_Weights.DEFAULT", "resnet50.tv2_in1k"),
        ("timm/resnet18.a1_in1k", "resnet18.a1_in1k"),
        ("hf-hub:timm/resnet18.a1_in1k", "resnet18.a1_in1k"),
        ("hf-hub:somebody/their-model", "hf-hub:somebody/their-model"),
        ("resnet18", "resnet18"),
    ],
)
def test_names_of_other_libraries_are_timms(name, timm_name):
    assert parse_name(name).timm_name == timm_name


def test_every_translated_name_has_weights_in_timm():
    assert set(well_known().values()) <= set(timm.list_models(pretrained=True))


@pytest.mark.parametrize(
    ("name", "near"),
    [("facebook/dinov2-smal", "facebook/dinov2-small"), ("resnet81", "resnet"), ("IMAGENET1K_V1", "imagenet1k_v1")],
)
def test_an_unknown_name_gets_the_closest_three(name, near):
    with pytest.raises(UsageError, match="Did you mean") as caught:
        parse_name(name)
    assert near in str(caught.value)


def test_terms_of_weights_are_named_before_the_download(tmp_path):
    heard = []
    with pytest.raises(DownloadError):
        load_backbone("facebook/dinov3-vits16-pretrain-lvd1689m", cache=tmp_path, on_note=heard.append)
    assert len(heard) == 1
    assert "dinov3-license" in heard[0]
    assert license_note(parse_name("resnet18.a1_in1k")) is None


def test_a_folder_of_timm_is_read(tmp_path):
    network = timm.create_model("test_vit", pretrained=False, img_size=96).eval()
    config = {"architecture": "test_vit", "model_args": {"img_size": 96}, "pretrained_cfg": {"input_size": [3, 96, 96]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    for name in (f"local-dir:{tmp_path}", str(tmp_path)):
        backbone = load_backbone(name, cache=tmp_path / "cache")
        assert (backbone.spec.height, backbone.architecture) == (96, "test_vit")
        x = torch.randn(2, 3, 96, 96)
        with torch.inference_mode():
            expected = network.forward_head(network.forward_features(x), pre_logits=True)
            torch.testing.assert_close(backbone.module()(x), expected)


def test_a_folder_without_safetensors_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UsageError, match=r"model\.safetensors is missing"):
        load_backbone(str(tmp_path))


def small(kind):
    import transformers

    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    hidden = {"intermediate_size": 64}
    vision = {
        "vision_config": shape | hidden,
        "text_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
    }
    return {
        "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**shape, **hidden), add_pooling_layer=False),
        "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**shape)),
        "registers": lambda: transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**shape, num_register_tokens=4)
        ),
        "siglip": lambda: transformers.SiglipModel(transformers.SiglipConfig(**vision)),
        "clip": lambda: transformers.CLIPModel(transformers.CLIPConfig(**vision)),
    }[kind]().eval()  # fmt: skip


@pytest.mark.parametrize("kind", ["vit", "dinov2", "registers", "siglip", "clip"])
def test_a_folder_of_transformers_gives_its_features(kind, tmp_path):
    torch.manual_seed(0)
    theirs = small(kind)
    with torch.no_grad():
        for value in theirs.parameters():  # so that no part is zero or one by its start
            value.add_(0.05 * torch.randn_like(value))
    theirs.save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path), cache=tmp_path / "cache")
    assert backbone.spec.height == 32
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        output = getattr(theirs, "vision_model", theirs)(pixel_values=x)
        expected = output.pooler_output if kind in ("siglip", "clip") else output.last_hidden_state[:, 0]
        found = backbone.module()(x)
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=2e-4)


def test_other_families_of_transformers_are_refused_by_name(tmp_path):
    import transformers

    transformers.ResNetModel(
        transformers.ResNetConfig(hidden_sizes=[8, 8], depths=[1, 1], embedding_size=8)
    ).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="type resnet cannot be read"):
        load_backbone(str(tmp_path))
