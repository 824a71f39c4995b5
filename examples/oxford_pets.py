"""Oxford pets: 37 breeds in one flat folder, fastai's first lesson: ResNet-34, one-cycle, then everything at sliced rates.

    python examples/oxford_pets.py [--data images] [--backbone lite0]

The breed is in the file name and is read by a regular expression. The head is fastai's: mean and maximum of the last map,
batch norm, dropout, 512 units. Four epochs of one-cycle for the head, then two for the whole network with rates from 1e-6
to 1e-4. The split is 80/20 at random. Published: 93.5 % after the first part.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn
from tutorial import default, options, show, sizes, train

import topwork
from topwork.data.samples import Rules
from topwork.models.modules import build_classifier, feature_width
from topwork.settings import TuneSettings

LABEL_REGEX = r"(.+)_\d+\.jpg$"
HEAD = TuneSettings(
    strategy="head", lr="3e-3", schedule="one-cycle", batch_size=64, augment="standard", weight_decay=0.01, clip_norm=None,
    ema=None, batch_norm="train",
)  # fmt: skip
ALL = replace(HEAD, strategy="all", lr="1e-6:1e-4")


def fetch() -> Path:
    """Downloads the images by torchvision where they are not there yet."""
    from torchvision.datasets import OxfordIIITPet

    OxfordIIITPet(".", download=True)
    return Path("oxford-iiit-pet/images")


def with_head(network: nn.Module, n_classes: int) -> nn.Module:
    """The network with fastai's head; timm pools mean and maximum."""
    build_classifier(network, nn.Identity(), n_classes, pooling="catavgmax")
    width = feature_width(network)
    head = nn.Sequential(
        nn.BatchNorm1d(width), nn.Dropout(0.25), nn.Linear(width, 512), nn.ReLU(),
        nn.BatchNorm1d(512), nn.Dropout(0.5), nn.Linear(512, n_classes),
    )  # fmt: skip
    return build_classifier(network, head, n_classes)


def main() -> None:
    """The tutorial, then topwork's default."""
    asked = options(__doc__, "resnet34.tv_in1k", epochs=4, more_epochs=2, label_regex=LABEL_REGEX)
    print(
        "ResNet-34 with fastai's head: {:,} parameters, {:,} in the head".format(
            *sizes("resnet34", lambda n: with_head(n, 37))
        )
    )
    manifest = topwork.scan(asked.data or fetch(), rules=Rules(label_regex=asked.label_regex))
    parts = topwork.split(manifest, valid_fraction=0.0, test_fraction=0.2, seed=asked.seed)
    backbone = topwork.load_backbone(asked.backbone).with_spec(height=asked.size, width=asked.size)
    network = with_head(backbone.module(1), len(manifest.classes))
    ours = default(manifest, parts, asked.size)
    theirs = train(network, backbone, replace(HEAD, epochs=asked.epochs), manifest, parts, asked.seed)
    show("Oxford pets, the head", "93.5 %", theirs, ours)
    theirs = train(network, backbone, replace(ALL, epochs=asked.more_epochs), manifest, parts, asked.seed)
    show("Oxford pets, then everything", "not stated beside it", theirs, ours)


if __name__ == "__main__":
    main()
