"""Cats and dogs: 500 images of each, VGG16 frozen, pooled, 512-128-1 with a sigmoid, five epochs of Adam.

    python examples/cats_and_dogs.py [--data FOLDER] [--backbone lite0 | six-blocks]

FOLDER holds a folder for each class, or training_set/ and test_set/ with them inside; 500 images of each class are trained
on, the rest is the test. ``--backbone six-blocks`` trains the lecture's network of six blocks from scratch instead.
Published: 98.3 % with the pretrained VGG16, 86 % from scratch.
"""

from __future__ import annotations

import urllib.request
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from tutorial import default, options, show, sizes, train

import topwork
from topwork.models.head import parse_head
from topwork.models.modules import SixBlockNetwork, build_classifier
from topwork.settings import TuneSettings

SOURCE = "https://download.microsoft.com/download/3/E/1/3E1C3F21-ECDB-4869-8368-6DEBA77B919F/kagglecatsanddogs_5340.zip"
HEAD = parse_head("128:relu:0.2")
SETTINGS = TuneSettings(
    strategy="head", outputs="binary", optimizer="adam", lr="1e-3", schedule="flat", batch_size=32, augment="none",
    weight_decay=0.0, clip_norm=None, ema=None,
)  # fmt: skip


def fetch() -> Path:
    """Downloads and unpacks the images where they are not there yet."""
    folder = Path("PetImages")
    if not folder.exists():
        archive, _ = urllib.request.urlretrieve(SOURCE)
        with zipfile.ZipFile(archive) as images:
            images.extractall(".", [name for name in images.namelist() if name.startswith("PetImages/")])
    return folder


def main() -> None:
    """The tutorial, then topwork's default."""
    asked = options(__doc__, "vgg16.tv_in1k", epochs=5, per_class=500)
    counted = sizes("vgg16", lambda network: build_classifier(network, HEAD, 1, drop_hidden=True))
    print("VGG16, pooled, 512-128-1: {:,} parameters, {:,} of them trained".format(*counted))
    print(f"six blocks from scratch: {sum(p.numel() for p in SixBlockNetwork(1).parameters()):,} parameters")
    manifest = topwork.scan(asked.data or fetch())
    parts = topwork.split(manifest, 0.0, 0.25, asked.seed)
    labels, order = np.array(manifest.labels), np.random.default_rng(asked.seed).permutation(parts.train)
    few = [order[labels[order] == label][: asked.per_class] for label in range(len(manifest.classes))]
    parts = replace(parts, train=np.sort(np.concatenate(few)), valid=parts.valid[:0])
    if asked.backbone == "six-blocks":
        backbone = topwork.load_backbone("lite0").with_spec(height=asked.size, width=asked.size)
        network = SixBlockNetwork(1, padding=int(asked.size < 190))
        settings = replace(SETTINGS, strategy="scratch")
    else:
        backbone = topwork.load_backbone(asked.backbone).with_spec(height=asked.size, width=asked.size)
        is_vgg = backbone.architecture.startswith("vgg")
        network = build_classifier(backbone.module(1), HEAD, 1, drop_hidden=is_vgg)
        settings = SETTINGS
    theirs = train(network, backbone, replace(settings, epochs=asked.epochs), manifest, parts, asked.seed)
    show("Cats and dogs", "98.3 % (VGG16), 86 % (six blocks)", theirs, default(manifest, parts, asked.size))


if __name__ == "__main__":
    main()
