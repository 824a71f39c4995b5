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
# # Oxford pets: fastai's first lesson
#
# 37 breeds in one flat folder, the label in the file name, ResNet-34, one-cycle, then everything at sliced rates.
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

sys.path.insert(0, os.environ.get("EXAMPLES", str(Path.cwd().parent)))  # oxford_pets.py, tutorial.py and plots.py
import plots
import oxford_pets as script
import tutorial

DATA = os.environ.get("DATA", "oxford-iiit-pet/images")
BACKBONE = os.environ.get("BACKBONE", "resnet34.tv_in1k")
EPOCHS = int(os.environ.get("EPOCHS", "4"))
SIZE = int(os.environ.get("SIZE", "224"))

# %% [markdown]
# ## The images
# Every image is decoded to its last row; what cannot be used is named.

# %%
from topwork.data.samples import Rules

manifest = topwork.scan(DATA, rules=Rules(label_regex=os.environ.get("LABEL_REGEX", script.LABEL_REGEX)))
print(manifest.counts)
print(len(manifest.rejects), "files rejected:", manifest.rejects[:3])

# %%
plots.class_counts(manifest)

# %%
some = np.random.default_rng(0).permutation(len(manifest.samples))[:12]
plots.show_images(manifest, some, [manifest.samples[row].label for row in some])

# %% [markdown]
# ## The split
# A fifth is held out at random.

# %%
parts = topwork.split(manifest, valid_fraction=0.0, test_fraction=0.2)
print({name: len(rows) for name, rows in parts.parts().items()})

# %% [markdown]
# ## The network
# fastai's head: mean and maximum of the last map, batch norm, dropout, 512 units.

# %%
backbone = topwork.load_backbone(BACKBONE).with_spec(height=SIZE, width=SIZE)
network = script.with_head(backbone.module(1), len(manifest.classes))
print(f"{sum(p.numel() for p in network.parameters()):,} parameters")

# %% [markdown]
# ## Training
# One-cycle for the head; then, with `script.ALL`, the whole network with rates from 1e-6 to 1e-4. `topwork lr-range` is the tutorial's `lr_find`.

# %%
theirs = tutorial.train(network, backbone, replace(script.HEAD, epochs=EPOCHS), manifest, parts)
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
tutorial.show("Oxford pets", "93.5 %", theirs, ours)
