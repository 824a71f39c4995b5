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
# # Guns and knives: normalization and a frozen ResNet
#
# Two classes in split folders, ResNet-101 as a frozen feature extractor.
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

sys.path.insert(0, os.environ.get("EXAMPLES", str(Path.cwd().parent)))  # guns_and_knives.py, tutorial.py and plots.py
import plots
import guns_and_knives as script
import tutorial

DATA = os.environ.get("DATA", "guns-and-knives")
BACKBONE = os.environ.get("BACKBONE", "resnet101.tv_in1k")
EPOCHS = int(os.environ.get("EPOCHS", "25"))
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
# The folders decide. Where there are only two parts, valid is the test, and nothing is chosen on it.

# %%
parts = topwork.split(manifest, 0.0, 0.25)
if not len(parts.test):
    parts = replace(parts, valid=parts.test, test=parts.valid)
print({name: len(rows) for name, rows in parts.parts().items()})

# %% [markdown]
# ## The network
# Its last layer is replaced by one with two outputs.

# %%
backbone = topwork.load_backbone(BACKBONE).with_spec(height=SIZE, width=SIZE)
from topwork.models.head import HeadSpec
from topwork.models.modules import build_classifier

network = build_classifier(backbone.module(1), HeadSpec(), len(manifest.classes))
print(f"{sum(p.numel() for p in network.parameters()):,} parameters")

# %% [markdown]
# ## Training
# Only the new layer moves. `topwork study normalization` shows what forgetting the normalization would cost.

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
tutorial.show("Guns and knives", "99.1 % with normalization", theirs, ours)
