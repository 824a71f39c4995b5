"""Every kind of name finds its network; what cannot be found is refused with what to type instead."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

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
        ("RegNet_Y_8GF_Weights.IMAGENET1K_V2", "regnety_080_tv.tv2_in1k"),
        ("google/siglip2-base-patch16-naflex", "naflexvit_base_patch16_siglip.v2_webli"),
        ("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "vit_base_patch32_clip_224.laion2b"),
        ("microsoft/swinv2-tiny-patch4-window8-256", "swinv2_tiny_window8_256.ms_in1k"),
        ("facebook/dino-vits16", "vit_small_patch16_224.dino"),
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
    [
        ("facebook/dinov2-smal", "facebook/dinov2-small"),
        ("resnet81", "resnet"),
        ("IMAGENET1K_V2", "ResNet50_Weights.IMAGENET1K_V2"),
        ("ConvNeXt_Tiny_Weights.DEFAULT", "convnext_tiny"),
        ("Swin_T_Weights.IMAGENET1K_V1", "swin_tiny_patch4_window7_224"),
        ("vit_b_16", "vit_base_patch16_224"),
        ("ViT-B/32", "vit_base_patch32_224"),
        ("google/efficientnet-b0", "efficientnet_b0"),
    ],
)
def test_an_unknown_name_gets_the_closest_three(name, near):
    with pytest.raises(UsageError, match="Did you mean") as caught:
        parse_name(name)
    assert near in str(caught.value)
    assert str(caught.value).startswith(f"backbone {name}: ")  # whichever option or argument it was typed as


def test_an_empty_name_is_refused():
    with pytest.raises(UsageError, match="is empty"):
        parse_name(" ")


@pytest.mark.parametrize("name", ["hf-hub:somebody/their-model", "hf-hub:"])
def test_the_configuration_of_a_hub_model_that_cannot_be_had_is_named(name):
    with pytest.raises(DownloadError, match=f"backbone {name}: .*cannot be downloaded"):
        parse_name(name).network(weights=False)


def test_a_naflex_folder_is_refused_with_what_to_use_instead(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip2", "vision_config": {}}))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"naflexvit_base_patch16_siglip.*google/siglip2-base-patch16-256"):
        load_backbone(str(tmp_path), cache=tmp_path / "cache")


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


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"model\.safetensors is missing"):
        load_backbone(str(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UsageError, match="several files"):
        load_backbone(str(tmp_path))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(3)
    return timm.create_model("test_efficientnet", pretrained=False).eval()


def features(network, name, cache):
    """Whether a backbone of that name gives the features of a network."""
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = network.forward_head(network.forward_features(x), pre_logits=True)
        return torch.allclose(load_backbone(name, cache=cache).module()(x), expected, atol=1e-2)


CHECKPOINTS = {
    "plain.pth": lambda state: state,
    "parallel.pt": lambda state: {f"module.{key}": value for key, value in state.items()},
    "compiled.pth": lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
    "lightning.ckpt": lambda state: {
        "state_dict": {f"model.backbone.{key}": value for key, value in state.items()} | {"loss.weight": torch.ones(3)},
        "epoch": 3,
        "hyper_parameters": {"lr": 0.1},
    },
    "timm.pth.tar": lambda state: {
        "arch": "test_efficientnet",
        "args": argparse.Namespace(lr=0.1),
        "state_dict": {key: torch.zeros_like(value) for key, value in state.items()},
        "state_dict_ema": state,
    },
    "dino.pth": lambda state: {"student": {}, "teacher": {f"backbone.{key}": v for key, v in state.items()}},
    "without-classifier.pth": lambda state: {k: v for k, v in state.items() if not k.startswith("classifier")},
    "half.pth": lambda state: {k: v.bfloat16() if v.is_floating_point() else v for k, v in state.items()},
}


@pytest.mark.parametrize("file", CHECKPOINTS)
def test_checkpoints_of_training_scripts_are_read(network, file, tmp_path):
    torch.save(CHECKPOINTS[file](network.state_dict()), tmp_path / file)
    assert features(network, f"test_efficientnet={tmp_path / file}", tmp_path / "cache")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_safetensors_of_16_bits_are_read(network, dtype, tmp_path):
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in network.state_dict().items()}
    save_file(state, tmp_path / "half.safetensors")
    assert features(network, f"test_efficientnet={tmp_path / 'half.safetensors'}", tmp_path / "cache")


class Evil:
    def __reduce__(self):
        return (open, ("/tmp/topwork-was-here", "w"))


@pytest.mark.parametrize(
    ("save", "words"),
    [
        (lambda network, path: torch.save(network, path), "save only its state dict"),
        (lambda _, path: torch.save({"state_dict": Evil()}, path), "can execute code"),
        (lambda _, path: path.write_bytes(b""), "not a complete torch.save file"),
        (lambda _, path: path.write_bytes(b"PK\3\4 cut"), "not a complete torch.save file"),
        (lambda _, path: torch.save([torch.ones(3)], path), "contains no weights"),
        (lambda network, path: torch.save({k: v * float("nan") for k, v in network.state_dict().items()}, path), "non-finite"),
        (lambda network, path: torch.save({k: v.to(torch.int8) for k, v in network.state_dict().items()}, path), "quantized"),
        (lambda _, path: torch.save(timm.create_model("test_vit").state_dict(), path), "does not fit test_efficientnet"),
    ],
)  # fmt: skip
def test_other_files_are_refused_with_the_reason(network, save, words, tmp_path):
    save(network, tmp_path / "weights.pth")
    with pytest.raises(ModelError, match=words):
        load_backbone(f"test_efficientnet={tmp_path / 'weights.pth'}", cache=tmp_path / "cache")
    assert not Path("/tmp/topwork-was-here").exists()


def timm_folder(folder, network, **config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"architecture": "test_efficientnet", **config}))
    torch.save(network.state_dict(), folder / "pytorch_model.bin")
    return folder


def test_statistics_and_size_of_a_folder_are_used_and_changes_of_it_are_seen(network, tmp_path):
    cfg = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 96, 80]}
    folder = timm_folder(tmp_path / "my model", network, pretrained_cfg=cfg, num_classes=0)
    spec = load_backbone(str(folder), cache=tmp_path / "cache").spec
    assert (spec.mean, spec.std, spec.height, spec.width) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 96, 80)
    timm_folder(folder, network, pretrained_cfg=cfg | {"mean": [0, 0, 0]})
    assert load_backbone(str(folder), cache=tmp_path / "cache").spec.mean == (0, 0, 0)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"pretrained_cfg": {"std": [0, 1, 1]}}, "a mean and a deviation above 0"),
        ({"pretrained_cfg": {"mean": "0.5"}}, "a mean and a deviation above 0"),
        ({"model_args": {"no_such_option": 3}}, "timm cannot build test_efficientnet"),
    ],
)
def test_a_folder_that_cannot_be_a_backbone_is_refused_by_what_is_wrong(network, config, words, tmp_path):
    with pytest.raises(ModelError, match=words):
        load_backbone(str(timm_folder(tmp_path, network, **config)), cache=tmp_path / "cache")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_args": {"in_chans": 1}}, "cannot run on RGB images"),
        ({"pretrained_cfg": {"input_size": [1, 64, 64], "mean": [0.5], "std": [0.5]}}, "RGB images: three channels"),
    ],
)
def test_a_network_of_gray_images_is_refused(config, words, tmp_path):
    gray = timm.create_model("test_efficientnet", in_chans=1)
    with pytest.raises(ModelError, match=words):
        load_backbone(str(timm_folder(tmp_path, gray, **config)), cache=tmp_path / "cache")


def test_a_run_is_its_model_and_a_folder_of_results_is_no_backbone(network, tmp_path, monkeypatch):
    timm_folder(tmp_path / "run" / "model", network)
    assert features(network, str(tmp_path / "run"), tmp_path / "cache")
    (tmp_path / "resnet18").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse_name("resnet18").kind == "timm"
    with pytest.raises(UsageError, match=r"config\.json is missing"):
        parse_name("local-dir:resnet18")


def test_an_address_of_the_hub_is_a_name():
    assert parse_name("https://huggingface.co/timm/resnet18.a1_in1k").timm_name == "resnet18.a1_in1k"
    assert parse_name("https://huggingface.co/facebook/dinov2-small/").timm_name == "vit_small_patch14_dinov2.lvd142m"


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
        "dinov3": lambda: transformers.DINOv3ViTModel(
            transformers.DINOv3ViTConfig(**shape | {"num_attention_heads": 1}, **hidden, num_register_tokens=4)
        ),
        "siglip": lambda: transformers.SiglipModel(transformers.SiglipConfig(**vision)),
        "clip": lambda: transformers.CLIPModel(transformers.CLIPConfig(**vision)),
    }[kind]().eval()  # fmt: skip


@pytest.mark.parametrize("kind", ["vit", "dinov2", "registers", "dinov3", "siglip", "clip"])
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
        if kind == "dinov3":  # as timm's networks of that name: the mean patch token
            expected = output.last_hidden_state[:, 5:].mean(1)
        found = backbone.module()(x)
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=2e-4)


def test_other_families_of_transformers_are_refused_by_name(tmp_path):
    import transformers

    transformers.ResNetModel(
        transformers.ResNetConfig(hidden_sizes=[8, 8], depths=[1, 1], embedding_size=8)
    ).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="type resnet cannot be read"):
        load_backbone(str(tmp_path))
