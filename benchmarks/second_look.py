"""How far quick answers are from exact ones, and how many the second look has to compute again (decision 20).

    python benchmarks/second_look.py RUN IMAGES [--n 800] [--bf16]

Exact: decoded large, Pillow's resize, f32, not rounded. Quick, each as it is used: the f32 network on Pillow's pixels with
features rounded to float16; the same on the quick resizer's pixels (for comparison, never used); and with ``--bf16`` the
bf16 network on the quick resizer's pixels, imitated in torch by rounding weights and the output of every layer to bf16,
so that it can be measured on processors without it. Results are in docs/decisions/0020-second-look.md.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from topwork.data.images import decode
from topwork.data.transforms import fit_to_input
from topwork.evaluation.predictions import softmax
from topwork.export.batch import list_inputs
from topwork.export.predictor import read_image
from topwork.features.careful import CarefulNetwork, careful_pixels, is_shrunk, needs_second_look
from topwork.features.engine import feature_network
from topwork.models.classifier import load_classifier


def main() -> None:
    """Computes all kinds of answers and prints how they differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--n", type=int, default=800)
    parser.add_argument("--bf16", action="store_true")
    asked = parser.parse_args()
    classifier = load_classifier(asked.run)
    backbone, spec = classifier.backbone, classifier.backbone.spec
    names = [name for name in list_inputs([str(asked.images)]) if name.lower().endswith((".jpg", ".jpeg", ".png"))]
    names = [names[i] for i in np.unique(np.linspace(0, len(names) - 1, asked.n).round().astype(int))]
    exact, pillow, quick, shrunk = [], [], [], []
    for name in names:
        data = read_image(name)
        decoded = decode(data, min_side=spec.min_side)
        exact.append(careful_pixels(data, spec))
        pillow.append(fit_to_input(decoded.pixels, replace(spec, resizer="pillow")))
        quick.append(fit_to_input(decoded.pixels, replace(spec, resizer="quick")))
        shrunk.append(is_shrunk(decoded.facts.width, decoded.facts.height, spec))
    network = CarefulNetwork(backbone)
    truth = classifier.head.logits(dict(network.run(np.stack(exact))))
    sure = softmax(truth).max(1)
    print(f"{asked.run.name}, {classifier.head.kind} head, {len(names)} images, {sum(shrunk)} of them shrunk;")
    print(f"  {(sure < 0.97).mean():.1%} less sure than 0.97, {(sure < 0.8).mean():.1%} less than 0.8")
    flags = np.array(shrunk)
    for name, precision, pixels in (("f32, Pillow's pixels", "f32", pillow), ("f32, quick pixels", "", quick)):
        blocks = rounded(network.run(np.stack(pixels)))
        report(name, precision, classifier.head.logits(blocks), truth, flags)
    if asked.bf16:
        blocks = rounded(imitated_bf16(backbone, np.stack(quick)))
        report("bf16, quick pixels", "bf16", classifier.head.logits(blocks), truth, flags)


def report(name: str, precision: str, found: Any, truth: Any, shrunk: Any) -> None:
    """Prints the errors of one kind of answer, before and after the second look."""
    rows = np.arange(len(truth))
    best = truth.argmax(1)
    error = found - truth
    error -= error[rows, best][:, None]
    for part, chosen in (("", ~shrunk), (", shrunk", shrunk)):
        if not chosen.any():
            continue
        gap = np.abs(softmax(found[chosen]) - softmax(truth[chosen])).max(1)
        text = f"{name}{part}: {chosen.sum()} images, logit differences off by {np.abs(error[chosen]).max():.4f}, "
        text += (
            f"probabilities by {gap.max():.5f}, {(found[chosen].argmax(1) != best[chosen]).sum()} other best classes"
        )
        if precision:
            again = needs_second_look(softmax(found[chosen]), precision, shrunk[chosen])
            after = np.where(again[:, None], truth[chosen], found[chosen])
            gap = np.abs(softmax(after) - softmax(truth[chosen])).max(1)
            text += (
                f"; looked at again {again.mean():.2%}, then {gap.max():.5f}, {(after.argmax(1) != best[chosen]).sum()}"
            )
        print("  " + text, flush=True)


def rounded(blocks: Any) -> dict[str, Any]:
    """Features as the store keeps them."""
    return {name: values.astype(np.float16) for name, values in blocks.items()}


def imitated_bf16(backbone: Any, pixels: Any) -> dict[str, Any]:
    """Features of a network whose weights and layer outputs are rounded to bf16."""
    import torch

    network = feature_network(backbone)

    def round_(value: Any) -> Any:
        return value.to(torch.bfloat16).float() if torch.is_tensor(value) and value.is_floating_point() else value

    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.weight.data = round_(module.weight.data)
        if not list(module.children()):
            module.register_forward_hook(lambda _module, _inputs, output: round_(output))
    found = []
    with torch.inference_mode():
        for start in range(0, len(pixels), 16):
            found.append([value.numpy() for value in network(torch.from_numpy(pixels[start : start + 16]))])
    return {name: np.concatenate([f[i] for f in found]) for i, name in enumerate(("last", "stages"))}


if __name__ == "__main__":
    main()
