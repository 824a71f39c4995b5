"""Class names as a head: the same answers as the two towers of transformers, with random weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from drawing import draw
from topwork.commands.fit import fit
from topwork.console import fit_lines
from topwork.errors import DownloadError, ModelError, UsageError
from topwork.models.backbone import load_backbone
from topwork.models.head import Changes
from topwork.models.text_tower import text_model, zero_shot_head
from topwork.report.run_page import write_report

PROMPT = "a photo of a {}."
WORDS = ["<pad>", "<end>", "<unk>", "a", "photo", "of", ".", "disc", "square", "red", "cross"]


@pytest.fixture(scope="module", params=["clip", "siglip"])
def towers(request, tmp_path_factory):
    """A folder of both towers and their tokenizer, and the model."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    text = {
        "vocab_size": len(WORDS), "max_position_embeddings": 12, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 64, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1,
        "projection_size": 32,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
        "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    torch.manual_seed(0)
    if request.param == "clip":
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
        model = transformers.CLIPModel(config)
    else:
        model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
    with torch.no_grad():
        for value in model.parameters():  # so that no part is zero or one by its start
            value.add_(0.1 * torch.randn_like(value))
        model.logit_scale.fill_(1.0)
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 1)])
    folder = tmp_path_factory.mktemp(request.param)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    ).save_pretrained(folder)
    model.eval().save_pretrained(folder)
    return folder, model


def theirs(towers, pixels, names):
    """transformers' logits (N, C) of both towers."""
    import transformers

    folder, model = towers
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(
        [PROMPT.replace("{}", name) for name in names], padding="max_length", max_length=12, return_tensors="pt"
    )
    with torch.inference_mode():
        return model(input_ids=tokens["input_ids"], pixel_values=pixels).logits_per_image


def test_a_head_of_names_orders_the_classes_as_both_towers_do(towers, tmp_path):
    folder, model = towers
    names = ["disc", "red_square", "cross"]
    backbone = load_backbone(str(folder), cache=tmp_path)
    head = zero_shot_head(backbone, names, PROMPT)
    assert head.kind == "plain"
    pixels = torch.randn(50, 3, 32, 32)
    with torch.inference_mode():
        features = backbone.module()(pixels)
        seen = features
        if hasattr(model, "visual_projection"):
            seen = model.visual_projection(features)
    found = head.logits({"last": features.numpy()}) / seen.norm(dim=1, keepdim=True).numpy()
    expected = theirs(towers, pixels, ["disc", "red square", "cross"]).numpy()
    # SigLIP adds one number to all logits
    np.testing.assert_allclose(
        found - found.mean(1, keepdims=True), expected - expected.mean(1, keepdims=True), atol=1e-3
    )
    assert expected.std(1).mean() > 0.01


def test_fit_measures_it_on_the_test_part(towers, tmp_path):
    data = tmp_path / "data"
    for shape in ("disc", "square"):
        (data / shape).mkdir(parents=True)
        for n in range(20):
            draw(shape, n, 32).save(data / shape / f"{n}.png")
    folder = towers[0]
    fitted = fit(data, tmp_path / "run", backbone=str(folder), zero_shot=PROMPT, engine="torch", near_duplicates=False)
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())["zero_shot"]
    spec = fitted.classifier.backbone.spec
    paths = [fitted.manifest.samples[row] for row in fitted.split.test.tolist()]
    images = np.stack([np.asarray(Image.open(data / sample.path)) for sample in paths]) / 255
    pixels = torch.tensor((images - np.array(spec.mean)) / np.array(spec.std)).permute(0, 3, 1, 2).float()
    expected = theirs(towers, pixels, fitted.manifest.classes).argmax(1).numpy()
    right = expected == fitted.manifest.targets[fitted.split.test]
    assert found["accuracy"]["value"] == pytest.approx(right.mean())
    assert found["accuracy"]["low"] < right.mean() < found["accuracy"]["high"] or right.mean() in (0, 1)
    assert (found["part"], found["n"], found["prompt"]) == ("test", len(right), PROMPT)
    assert sum("Zero-shot accuracy" in line for line in fit_lines(fitted)) == 1
    write_report(tmp_path / "run")
    assert "Zero-shot accuracy with the prompt" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("google/siglip-base-patch16-224", "google/siglip-base-patch16-224"),
        ("vit_base_patch16_siglip_224.webli", "google/siglip-base-patch16-224"),
        ("vit_base_patch16_siglip_224", "google/siglip-base-patch16-224"),
        ("openai/clip-vit-base-patch32", "openai/clip-vit-base-patch32"),
    ],
)
def test_names_of_the_text_tower(name, expected):
    assert text_model(name) == expected


@pytest.mark.parametrize("name", ["lite0", "resnet18", "random:vit_base_patch16_siglip_224"])
def test_a_network_without_a_text_tower_is_refused_before_the_images_are_read(name, tmp_path):
    with pytest.raises(UsageError, match=f"{name} has no known text tower"):
        fit(tmp_path / "none", tmp_path / "run", backbone=name, zero_shot=PROMPT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zero_shot": "a photo"}, "must contain {} for the class name"),
        ({"zero_shot": PROMPT, "multi_label": True}, "cannot be combined with --multi-label"),
    ],
)
def test_prompts_that_cannot_be(options, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        fit(tmp_path, tmp_path / "run", backbone="google/siglip-base-patch16-224", **options)


@pytest.mark.parametrize("name", ["7", "n02099601", "_"])
def test_class_names_that_are_no_words_are_named(towers, tmp_path, name):
    backbone = load_backbone(str(towers[0]), cache=tmp_path)
    with pytest.raises(UsageError, match=f"class name {name} is not a word"):
        zero_shot_head(backbone, ["disc", name], PROMPT)


def test_changed_pooling_is_refused(towers, tmp_path):
    backbone = replace(load_backbone(str(towers[0]), cache=tmp_path), changes=Changes(pooling="avg"))
    with pytest.raises(UsageError, match="leave out --pooling"):
        zero_shot_head(backbone, ["disc", "cross"], PROMPT)


def test_a_folder_without_a_tokenizer_is_named(towers, tmp_path):
    shutil.copytree(towers[0], tmp_path / "model")
    for file in (tmp_path / "model").glob("tokenizer*"):
        file.unlink()
    backbone = load_backbone(str(tmp_path / "model"), cache=tmp_path)
    with pytest.raises(ModelError, match="tokenizer"):
        zero_shot_head(backbone, ["disc", "cross"], PROMPT)


def test_a_damaged_folder_is_named(towers, tmp_path):
    shutil.copytree(towers[0], tmp_path / "model")
    backbone = load_backbone(str(tmp_path / "model"), cache=tmp_path)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError, match="text tower and tokenizer cannot be read"):
        zero_shot_head(backbone, ["disc", "cross"], PROMPT)


def test_without_a_network_it_says_so_in_one_line(towers, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    backbone = replace(load_backbone(str(towers[0]), cache=tmp_path), name="google/siglip-base-patch16-224")
    with pytest.raises(DownloadError, match="Leave out --zero-shot") as caught:
        zero_shot_head(backbone, ["disc", "cross"], PROMPT)
    assert "\n" not in str(caught.value)


def test_without_transformers_the_option_is_refused():
    code = (
        "import sys, importlib.util as u; old = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'transformers' else old(name, *a)\n"
        "import topwork.settings as s\n"
        "s.check(s.FitSettings(zero_shot='a {}'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "the package transformers is not installed" in done.stderr
