"""Guns and knives: two classes in split folders, ResNet-101 as a frozen feature extractor, with normalization.

    python examples/guns_and_knives.py --data FOLDER [--backbone lite0]

FOLDER holds train/, valid/ and test/ (or train/ and val/) with a folder for each class. The images have no public home, so
any two classes do. Where the text leaves optimizer and schedule open, those of PyTorch's transfer-learning tutorial are
taken: SGD with momentum, rate 0.001, a tenth after each third. Published: 99.1 % trained and tested with normalization,
53.5 % when the test forgets it: ``topwork study normalization FOLDER`` shows that table for your images.
"""

from __future__ import annotations

from dataclasses import replace

from tutorial import default, options, show, sizes, train

import topwork
from topwork.models.head import HeadSpec
from topwork.models.modules import build_classifier
from topwork.settings import TuneSettings

SETTINGS = TuneSettings(
    strategy="head", optimizer="sgd", lr="1e-3", schedule="step", batch_size=32, augment="random-resized-crop+flip",
    weight_decay=0.0, clip_norm=None, ema=None, monitor="accuracy",
)  # fmt: skip


def main() -> None:
    """The tutorial, then topwork's default."""
    asked = options(__doc__, "resnet101.tv_in1k", epochs=25)
    for name in ("resnet101", "resnet152"):
        print(f"{name}: {sizes(name, lambda network: network)[0]:,} parameters with its 1,000 classes")
    if asked.data is None:
        raise SystemExit("Its images have no public home: give --data FOLDER with train/ and valid/ inside.")
    manifest = topwork.scan(asked.data)
    parts = topwork.split(manifest, 0.0, 0.25, asked.seed)
    if not len(parts.test):  # only train and valid: valid is the test, and nothing is chosen on it
        parts = replace(parts, valid=parts.test, test=parts.valid)
    backbone = topwork.load_backbone(asked.backbone).with_spec(height=asked.size, width=asked.size)
    network = build_classifier(backbone.module(1), HeadSpec(), len(manifest.classes))
    theirs = train(network, backbone, replace(SETTINGS, epochs=asked.epochs), manifest, parts, asked.seed)
    show("Guns and knives", "99.1 % with normalization", theirs, default(manifest, parts, asked.size))


if __name__ == "__main__":
    main()
