"""Zero-shot heads: the text tower of CLIP or SigLIP computes the weights of each class from its name.

In: the name of a backbone, class names and a prompt. Out: a :class:`LinearHead` on the image features, equivalent to the
two towers, without training images (zero-shot; Radford et al. 2021, arXiv 2103.00020, section 3.1).
The text tower is transformers', under the Hub name of the same weights or in the same folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from topwork.errors import DownloadError, ModelError, UsageError, first_line
from topwork.models.backbone import Backbone
from topwork.models.head import LinearHead, last_features_head
from topwork.models.sources import parse_name, siglip_and_clip
from topwork.text import escape


def text_model(name: str) -> str:
    """Where the text tower of a backbone is: a folder, or a name of the Hugging Face Hub.

    Raises:
        UsageError: the backbone has none, or it is not known.
    """
    source = parse_name(name, check=False)
    if source.kind == "folder" and source.path is not None and _model_type(source.path) in ("clip", "siglip"):
        return str(source.path)
    if source.kind == "timm":
        for theirs, ours in siglip_and_clip().items():
            if source.timm_name in (ours, ours.partition(".")[0]):
                return theirs
    raise UsageError(
        f"--zero-shot: --backbone {escape(name)} has no known text tower. Use a name of CLIP or SigLIP, such as "
        "google/siglip-base-patch16-224, or a folder of such a model that transformers saved."
    )


def zero_shot_head(backbone: Backbone, classes: Sequence[str], prompt: str) -> LinearHead:
    """Builds a head from class names, each inserted for ``{}`` in the prompt.

    CLIP projects image features before it compares them; that projection is part of the weights here. It also divides by
    their norm, which does not change the order of the classes and is left out.

    Raises:
        UsageError: a class name is not a word, the backbone has no text tower, or its pooling was changed.
        DownloadError: the text tower is not on this machine and cannot be downloaded.
        ModelError: it is damaged, or its tokenizer does not know the class names.
    """
    words = [_words(name) for name in classes]
    if backbone.changes:
        raise UsageError("--zero-shot reads image features as the weights were trained; leave out --pooling.")
    weight = _class_weights(text_model(backbone.name), [prompt.replace("{}", word) for word in words])
    if weight.shape[1] != backbone.n_features:
        raise ModelError(
            f"{backbone.name}: its text tower has {weight.shape[1]} values per text, its image tower "
            f"{backbone.n_features}; they do not belong together."
        )
    return last_features_head(weight, np.zeros(len(weight)))


def _words(name: str) -> str:
    """A class name as words: ``golden_retriever`` is golden retriever; 7 and n02099601 are not words."""
    text = re.sub(r"[\s_-]+", " ", name).strip()
    if not re.search(r"[^\W\d_]{2,}", text):
        raise UsageError(
            f"--zero-shot: the class name {escape(name)} is not a word. Rename the classes, or leave it out."
        )
    return text


def _class_weights(where: str, texts: list[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """(C, D) for (C,) texts and D image features."""
    import torch

    tokenizer, model = _loaded(where)
    config = model.config.text_config
    tokens = tokenizer(
        texts, padding="max_length", truncation=True, max_length=config.max_position_embeddings, return_tensors="pt"
    )
    if len({tuple(row) for row in tokens["input_ids"].tolist()}) < len(set(texts)):
        raise ModelError(
            f"{where}: its tokenizer reads all or some class names as the same text. Are its files there, is the prompt too "
            "long, or are the class names in another language?"
        )
    with torch.inference_mode():  # without a mask: SigLIP was trained on padded texts, and CLIP looks back only
        found = model.get_text_features(input_ids=tokens["input_ids"])
        embedded = (
            torch.nn.functional.normalize(getattr(found, "pooler_output", found), dim=1) * model.logit_scale.exp()
        )
        if hasattr(model, "visual_projection"):
            embedded = embedded @ model.visual_projection.weight
    return np.asarray(embedded.float().numpy(), np.float32)


def _loaded(where: str) -> tuple[Any, Any]:
    """Tokenizer and model; never code from the folder or repository."""
    import transformers

    bars: Any = transformers.utils.logging
    safe: dict[str, Any] = {"trust_remote_code": False}
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, **safe)
        return tokenizer, transformers.AutoModel.from_pretrained(where, use_safetensors=True, **safe).eval()
    except Exception as error:  # noqa: BLE001 tokenizers, safetensors and the Hub raise errors of all kinds
        reason = first_line(error)
        if Path(where).is_dir():
            raise ModelError(f"{where}: its text tower and tokenizer cannot be read: {reason}") from None
        raise DownloadError(
            f"--zero-shot: the text tower {where} is not on this machine and cannot be downloaded ({reason}). "
            "Leave out --zero-shot, or give a folder that transformers saved as --backbone."
        ) from None
    finally:
        if shown:
            bars.enable_progress_bar()


def _model_type(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type"))
    except (OSError, ValueError, AttributeError):
        return None
