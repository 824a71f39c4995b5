"""Drawn data and a tiny network for the tests of training: seconds, no files, and a task that can be learned."""

import numpy as np
import torch
from torch import nn

from topwork.data.transforms import InputSpec
from topwork.training.batches import ImageDataset
from topwork.training.loop import TrainableNetwork, predict
from topwork.training.recipe import DataFacts, Recipe, TuneSettings, plan
from topwork.training.selection import unfolded

SPEC = InputSpec(height=16, width=16)
STAGES = ("stem", "blocks.0", "blocks.1", "classifier")


class TinyNetwork(nn.Module):
    """Stem, two stages, classifier: named as timm names them."""

    def __init__(self, n_outputs: int = 2, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv_stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(8)
            self.blocks = nn.Sequential(self._block(8, 8, 8), self._block(8, 16, 1))
            self.dropout = nn.Dropout(0.2)
            self.classifier = nn.Linear(16, n_outputs)
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_var.uniform_(0.5, 1.5)

    @staticmethod
    def _block(before: int, after: int, groups: int) -> nn.Sequential:
        conv = nn.Conv2d(before, after, 3, stride=2, padding=1, groups=groups, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU())

    def forward(self, x):
        x = self.blocks(torch.relu(self.bn1(self.conv_stem(x))))
        return self.classifier(self.dropout(x.mean((2, 3))))


def drawn_images(n: int, seed: int = 0, n_classes: int = 2, side: int = 16):
    """Noise with a bright bar whose direction is the class: (N, side, side, 3) uint8 and (N,) labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % n_classes
    pixels = rng.integers(0, 120, (n, side, side, 3), dtype=np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        at = int(rng.integers(side - 3))
        if label == 0:
            image[at : at + 3] += 100
        elif label == 1:
            image[:, at : at + 3] += 100
        else:
            image[: side // 2] += 60
    return pixels, labels.astype(np.int64)


def streams(n_train: int = 48, n_valid: int = 20, recipe: Recipe | None = None, n_classes: int = 2):
    augmentation = recipe.augmentation if recipe else "none"
    pixels, labels = drawn_images(n_train, 1, n_classes)
    other, other_labels = drawn_images(n_valid, 2, n_classes)
    return ImageDataset(pixels, labels, SPEC, augmentation, seed=recipe.seed if recipe else 0), ImageDataset(
        other, other_labels, SPEC
    )


def recipe_for(n_train: int = 48, n_valid: int = 20, n_classes: int = 2, seed: int = 0, **settings) -> Recipe:
    """A planned recipe for drawn data; f32, so that every processor gives the same."""
    settings = {"epochs": 3, "batch_size": 8, "precision": "f32", "lr": "1e-2"} | settings
    counts = tuple(n_train // n_classes for _ in range(n_classes))
    return plan(TuneSettings(**settings), DataFacts(counts, n_valid), STAGES, seed)


def tuned_logits(network, state, recipe, data):
    """(N, C) logits of weights under the network's own names."""
    net = TrainableNetwork(network, unfolded(recipe), data, "cpu")
    net.load(state)
    return predict(net, data)
