"""Caltech-101: VGG16 with a new last layer 4096-256-100, split 50/25/25, early stopping on the validation loss.

    python examples/caltech_101.py [--data 101_ObjectCategories] [--backbone lite0]

The tutorial leaves out the background class (and one more: 100 classes). Loss is the negative log likelihood of a log
softmax, which is cross-entropy; Adam with its default rate; training ends when valid has not improved for five epochs.
Published: 88.65 % top-1, 98.00 % top-5; 135,335,076 parameters, 1,074,532 of them trained.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tutorial import default, options, show, sizes, train

import topwork
from topwork.models.head import parse_head
from topwork.models.modules import build_classifier
from topwork.settings import TuneSettings

HEAD = parse_head("256:relu:0.4")
LEFT_OUT = "BACKGROUND_Google"
SETTINGS = TuneSettings(
    strategy="head", optimizer="adam", lr="1e-3", schedule="flat", batch_size=128, patience=5, weight_decay=0.0,
    augment="mild-crop+rotation+color-jitter+flip", clip_norm=None, ema=None,
)  # fmt: skip


def fetch() -> Path:
    """Downloads the images by torchvision where they are not there yet."""
    from torchvision.datasets import Caltech101

    Caltech101(".", download=True)
    return Path("caltech101/101_ObjectCategories")


def main() -> None:
    """The tutorial, then topwork's default."""
    asked = options(__doc__, "vgg16.tv_in1k", epochs=30)
    counted = sizes("vgg16", lambda network: build_classifier(network, HEAD, 100))
    print("VGG16 with 4096-256-100: {:,} parameters, {:,} of them trained".format(*counted))
    manifest = topwork.scan(asked.data or fetch())
    kept = tuple(sample for sample in manifest.samples if sample.label != LEFT_OUT)
    classes = tuple(name for name in manifest.classes if name != LEFT_OUT)
    manifest = replace(manifest, samples=kept, classes=classes)
    parts = topwork.split(manifest, valid_fraction=0.25, test_fraction=0.25, seed=asked.seed)
    backbone = topwork.load_backbone(asked.backbone).with_spec(height=asked.size, width=asked.size)
    network = build_classifier(backbone.module(1), HEAD, len(manifest.classes))
    theirs = train(network, backbone, replace(SETTINGS, epochs=asked.epochs), manifest, parts, asked.seed)
    show("Caltech-101", "88.65 % top-1, 98.00 % top-5", theirs, default(manifest, parts, asked.size))


if __name__ == "__main__":
    main()
