"""A folder saved by transformers as a timm network: the same values under timm's names.

In: its ``config.json`` and tensors. Out: a timm network of that shape and a state dict for it. Vision transformers only
(ViT, DeiT, DINOv2 with or without registers, DINOv3, and the image towers of CLIP and SigLIP): other families have no one-to-one
names. transformers stores queries, keys and values separately; timm has them in one matrix.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from topwork.errors import ModelError

_FAMILIES = ("vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "siglip_vision_model", "clip_vision_model")
_RENAMED = (  # applied in this order
    (r"^(vision_model|vit|deit|dinov2|dinov2_with_registers)\.", ""),
    (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^embeddings\.(patch_embeddings\.projection|patch_embeddings?)\.", "patch_embed.proj."),
    (r"^register_tokens$", "reg_token"),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^(post_layernorm|layernorm)\.", "norm."),
    (r"^(encoder\.layers?|model\.layer|layers?)\.(\d+)\.", r"blocks.\2."),
    (r"\.mlp\.up_proj\.", ".mlp.fc1."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
    (r"\.(layernorm_before|layer_norm1)\.", ".norm1."),
    (r"\.(layernorm_after|layer_norm2)\.", ".norm2."),
    (r"\.(attention\.output\.dense|self_attn\.out_proj|attention\.o_proj)\.", ".attn.proj."),
    (r"\.(attention\.attention|self_attn|attention)\.(q|k|v)(uery|ey|alue|_proj)\.", r".attn.\2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"^head\.probe$", "attn_pool.latent"),
    (r"^head\.attention\.in_proj_", "attn_pool.in_proj."),
    (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"^head\.layernorm\.", "attn_pool.norm."),
    (r"^head\.mlp\.", "attn_pool.mlp."),
)


def translated(config: dict[str, Any], state: dict[str, Any], folder: Path) -> tuple[Any, dict[str, Any]]:
    """The timm network that a transformers configuration describes, and its weights.

    Raises:
        ModelError: a family that has no one-to-one names in timm.
    """
    kind = str(config.get("model_type"))
    vision = config.get("vision_config")
    if isinstance(vision, dict):  # a whole CLIP or SigLIP: its image tower
        kind = f"{kind}_vision_model" if not kind.endswith("vision_model") else kind
        config = vision
    if kind.startswith("siglip2"):
        raise ModelError(
            f"{folder}: SigLIP2 NaFlex folders cannot be read. Use timm's naflexvit_base_patch16_siglip, or a SigLIP2 of a fixed "
            "size such as google/siglip2-base-patch16-256."
        )
    if kind not in _FAMILIES:
        raise ModelError(
            f"{folder}: transformers models of type {kind} cannot be read; those of type {', '.join(_FAMILIES)} can. "
            "Most others are in timm: topwork models lists the names."
        )
    network = _network(kind, config, state, folder)
    renamed = {_renamed(name): value for name, value in state.items()}
    if kind == "dinov3_vit":
        renamed = {re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", name): value for name, value in renamed.items()}
    return network, _joined(renamed, kind.endswith("registers")) if state else {}


def _network(kind: str, config: dict[str, Any], state: dict[str, Any], folder: Path) -> Any:
    """The timm architecture with the norms, activations and shape of the configuration."""
    import timm

    if any("distillation" in name for name in state):
        raise ModelError(
            f"{folder}: distilled networks cannot be read; timm has them: deit_base_distilled_patch16_224.fb_in1k"
        )
    if config.get("use_gated_mlp"):
        raise ModelError(
            f"{folder}: DINOv3 with gated layers cannot be read; timm has it: topwork models --filter '*dinov3*'"
        )
    clip, siglip, dino = (kind.startswith(name) for name in ("clip", "siglip", "dinov2"))
    quick = "quickgelu_" if config.get("hidden_act", "quick_gelu" if clip else "") == "quick_gelu" else ""
    if kind == "dinov3_vit":
        like = "vit_small_patch16_dinov3_qkvb"
    elif dino:
        like = f"vit_base_patch14_{'reg4_' if kind.endswith('registers') else ''}dinov2"
    elif clip:
        like = f"vit_base_patch16_clip_{quick}224"
    else:
        like = "vit_base_patch16_siglip_224" if siglip else "vit_base_patch16_224"
    width, side = int(config.get("hidden_size", 768)), int(config.get("image_size", 224))
    hidden = config.get("intermediate_size")
    options: dict[str, Any] = {
        "patch_size": int(config.get("patch_size", 16)),
        "embed_dim": width,
        "depth": int(config.get("num_hidden_layers", 12)),
        "num_heads": int(config.get("num_attention_heads", 12)),
        "mlp_ratio": float(config.get("mlp_ratio", 4)) if hidden is None else int(hidden) / width,
    }
    if config.get("hidden_act", "gelu_pytorch_tanh" if siglip else "") == "gelu_pytorch_tanh":
        options["act_layer"] = "gelu_tanh"
    if kind.endswith("registers"):
        options["reg_tokens"] = int(config.get("num_register_tokens", 4))
    if kind == "dinov3_vit":
        options["num_reg_tokens"] = int(config.get("num_register_tokens", 0))
        options["rope_temperature"] = float(config.get("rope_theta", 100))
    cfg = {"input_size": (3, side, side), **_statistics(folder)}
    return timm.create_model(like, pretrained=False, img_size=side, pretrained_cfg_overlay=cfg, **options)


def _statistics(folder: Path) -> dict[str, Any]:
    """Mean and deviation of the input, from the file that transformers writes next to the weights, if it is there."""
    try:
        values = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        return {"mean": tuple(map(float, values["image_mean"])), "std": tuple(map(float, values["image_std"]))}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _renamed(name: str) -> str:
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def _joined(state: dict[str, Any], has_registers: bool) -> dict[str, Any]:
    """Queries, keys and values in one matrix, and embeddings in timm's shapes."""
    import torch

    result = {}
    for name, value in state.items():
        if (match := re.fullmatch(r"(.*\.attn\.)([qv])\.bias", name)) and f"{match[1]}k.bias" not in state:
            result[f"{match[1]}{match[2]}_bias"] = value  # DINOv3 has none for keys
        elif match := re.fullmatch(r"(.*\.attn\.)q(\..*)", name):
            result[f"{match[1]}qkv{match[2]}"] = torch.cat([state[f"{match[1]}{part}{match[2]}"] for part in "qkv"])
        elif match := re.fullmatch(r"attn_pool\.in_proj\.(.*)", name):
            width = len(value) // 3
            result |= {f"attn_pool.q.{match[1]}": value[:width], f"attn_pool.kv.{match[1]}": value[width:]}
        elif not re.search(r"\.attn\.[kv]\.", name):
            result[name] = value
    for name, n_dimensions in (("cls_token", 3), ("pos_embed", 3)):
        while name in result and result[name].ndim < n_dimensions:
            result[name] = result[name][None]
    if has_registers:  # timm adds the position of the class token to it once
        result["cls_token"] = result["cls_token"] + result["pos_embed"][:, :1]
        result["pos_embed"] = result["pos_embed"][:, 1:]
    return result
