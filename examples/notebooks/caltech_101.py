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
# # Caltech-101: 100 classes of few images
#
# VGG16 with a new last layer, a split of 50/25/25, early stopping.
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

sys.path.insert(0, os.environ.get("EXAMPLES", str(Path.cwd().parent)))  # caltech_101.py, tutorial.py and plots.py
import plots
import caltech_101 as script
import tutorial

DATA = os.environ.get("DATA", "101_ObjectCategories")
BACKBONE = os.environ.get("BACKBONE", "vgg16.tv_in1k")
EPOCHS = int(os.environ.get("EPOCHS", "30"))
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
# Half to learn from, a quarter to stop on, a quarter to judge on.

# %%
parts = topwork.split(manifest, valid_fraction=0.25, test_fraction=0.25)
print({name: len(rows) for name, rows in parts.parts().items()})

# %% [markdown]
# ## The network
# Only the last of VGG16's three layers is replaced: 4096-256-100.

# %%
backbone = topwork.load_backbone(BACKBONE).with_spec(height=SIZE, width=SIZE)
from topwork.models.modules import build_classifier

network = build_classifier(backbone.module(1), script.HEAD, len(manifest.classes))
print(f"{sum(p.numel() for p in network.parameters()):,} parameters")

# %% [markdown]
# ## Training
# Training ends when the loss on valid has not fallen for five epochs.

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
tutorial.show("Caltech-101", "88.65 % top-1, 98.00 % top-5", theirs, ours)
