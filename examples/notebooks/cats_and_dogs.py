# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Cats and dogs: 500 images of each
#
# VGG16 frozen, pooled, 512-128-1 with a sigmoid and binary cross-entropy.
#
# Open this file as a notebook with Jupyter and jupytext, or in an editor that knows `# %%` cells. `DATA`, `BACKBONE`, `EPOCHS`
# and `SIZE` may be set in the environment.

# %%
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

import topwork

sys.path.insert(0, os.environ.get("EXAMPLES", str(Path.cwd().parent)))  # cats_and_dogs.py, tutorial.py and plots.py
import plots
import cats_and_dogs as script
import tutorial

DATA = os.environ.get("DATA", "PetImages")
BACKBONE = os.environ.get("BACKBONE", "vgg16.tv_in1k")
EPOCHS = int(os.environ.get("EPOCHS", "5"))
SIZE = int(os.environ.get("SIZE", "224"))

# %% [markdown]
# ## The images
# Every image is decoded to its last row; what cannot be used is named.

# %%
manifest = topwork.scan(DATA)
print(manifest.counts)
print(len(manifest.rejects), "files rejected:", manifest.rejects[:3])

# %%
plots.class_counts(manifest)

# %%
some = np.random.default_rng(0).permutation(len(manifest.samples))[:12]
plots.show_images(manifest, some, [manifest.samples[row].label for row in some])

# %% [markdown]
# ## The split
# 500 images of each class to learn from, the rest is the test.

# %%
parts = topwork.split(manifest, 0.0, 0.25)
labels = np.array(manifest.labels)
order = np.random.default_rng(0).permutation(parts.train)
few = [order[labels[order] == label][:500] for label in range(len(manifest.classes))]
parts = replace(parts, train=np.sort(np.concatenate(few)), valid=parts.valid[:0])
print({name: len(rows) for name, rows in parts.parts().items()})

# %% [markdown]
# ## The network
# VGG16 loses its two layers of 4,096 units; a hidden layer of 128 and one output take their place.

# %%
backbone = topwork.load_backbone(BACKBONE).with_spec(height=SIZE, width=SIZE)
from topwork.models.modules import build_classifier

is_vgg = backbone.architecture.startswith("vgg")
network = build_classifier(backbone.module(1), script.HEAD, 1, drop_hidden=is_vgg)
print(f"{sum(p.numel() for p in network.parameters()):,} parameters")

# %% [markdown]
# ## Training
# Five epochs of Adam at one rate. `topwork study scratch` compares with networks that start at random.

# %%
theirs = tutorial.train(network, backbone, replace(script.SETTINGS, epochs=EPOCHS), manifest, parts)
plots.curves(theirs.history)

# %% [markdown]
# ## What it knows
# Some predictions, the most probable classes of the first image, the confusion matrix, and the images it got most wrong.

# %%
found = theirs.test
first = range(min(6, len(found)))
titles = [f"{found.classes[found.predicted[i]]} {found.confidence[i]:.2f}" for i in first]
plots.show_images(manifest, found.sample_indices[:6], titles)

# %%
plots.top_k(found, 0)

# %%
plots.confusion(found)

# %%
plots.top_losses(manifest, found)

# %% [markdown]
# ## topwork's default on the same split
# A head on frozen features, everything about it chosen by cross-validation on the training images.

# %%
ours = tutorial.default(manifest, parts, SIZE)
tutorial.show("Cats and dogs", "98.3 % (VGG16), 86 % (six blocks)", theirs, ours)
