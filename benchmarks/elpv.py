"""ELPV (solar cells): does tuning beat the probe, and both the published network?

    python benchmarks/elpv.py [--seeds 0 1 2] [--size 224] [--set lr=2e-4:2e-3 --set epochs=12 ...]

Protocol of Deitsch et al. 2019 (arXiv 1807.02894): 75/25 by cell, stratified by label value and wafer type; defective
where p > 0.5. A fifth of the training part is kept for validation. Published: SVM 82.44 %, tuned VGG19 88.42 % / area
under the curve 0.944. Prints for each seed accuracy and area of probe and tuned network on the same test cells, seconds
of tuning, and at the end the means and a paired comparison. Needs the package elpv-dataset.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import fields, replace

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split

from topwork.data.transforms import fit_to_input
from topwork.features.embed import Features
from topwork.features.engine import load_engine
from topwork.features.probe import fit_probe
from topwork.models.backbone import load_backbone
from topwork.training.average import tuned_logits
from topwork.training.finetune import facts_of, make_network, tune
from topwork.training.loop import Surroundings
from topwork.training.recipe import TuneSettings, plan
from topwork.training.streams import ImageStream


class ArrayFeatures(Features):
    """Features that are already in memory, for the probe."""

    def __init__(self, blocks):
        object.__setattr__(self, "hashes", tuple(str(n) for n in range(len(blocks["last"]))))
        object.__setattr__(self, "blocks", blocks)

    def block(self, name="last", rows=None):
        """(N, D) as in Features."""
        return self.blocks[name] if rows is None else self.blocks[name][rows]


def load_cells():
    from elpv_dataset.utils import load_dataset

    images, probabilities, types = load_dataset()
    return np.repeat(images[..., None], 3, 3), probabilities, types


def parts(probabilities, types, seed):
    rows, strata = np.arange(len(types)), [f"{p:.2f} {t}" for p, t in zip(probabilities, types, strict=True)]
    train, test = train_test_split(rows, test_size=0.25, stratify=strata, random_state=seed)
    train, valid = train_test_split(train, test_size=0.2, stratify=[strata[r] for r in train], random_state=seed)
    return train, valid, test


def figures(logits, labels):
    scores = logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits[:, 0]
    return ((scores > 0) == labels), 100 * float(np.mean((scores > 0) == labels)), float(roc_auc_score(labels, scores))


def settings_from(pairs):
    values = {}
    known = {item.name: item for item in fields(TuneSettings)}
    for pair in pairs:
        key, _, text = pair.partition("=")
        assert key in known, f"no setting {key}"
        try:
            values[key] = (
                {"None": None, "True": True, "False": False}.get(text)
                if text in ("None", "True", "False")
                else (int(text) if text.isdigit() else float(text))
            )
        except ValueError:
            values[key] = text
        if key == "lr":
            values[key] = text
    return replace(TuneSettings(), **values)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--quiet", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(2)
    images, probabilities, types = load_cells()
    labels = (probabilities > 0.5).astype(np.int64)
    backbone = load_backbone("lite0").with_spec(height=options.size, width=options.size)
    pixels = np.stack([fit_to_input(image, backbone.spec) for image in images])
    features = ArrayFeatures(load_engine(backbone).run(pixels))
    settings = settings_from(["augment=geometric", *options.set])
    rows = []
    for seed in options.seeds:
        train, valid, test = parts(probabilities, types, seed)
        both = np.concatenate([train, valid])
        probe = fit_probe(features, labels, 2, rows=both, seed=seed)
        start = fit_probe(features, labels, 2, rows=train, head="plain", seed=seed).head
        logits = probe.head.logits({name: features.block(name)[test] for name in ("last", "stages")})
        probe_right, probe_accuracy, probe_area = figures(logits, labels[test])
        began = time.perf_counter()
        facts = facts_of(labels[train], 2, len(valid), grey=True)
        names = [stage.name for stage in backbone.stages]
        recipe = plan(settings, facts, names, seed)
        train_stream = ImageStream(pixels[train], labels[train], backbone.spec, recipe.augmentation, seed)
        valid_stream = ImageStream(pixels[valid], labels[valid], backbone.spec)

        def show(record):
            if not options.quiet:
                print(
                    {
                        k: round(v, 3) if isinstance(v, float) else v
                        for k, v in record.items()
                        if k not in ("curve", "rates", "phase")
                    },
                    flush=True,
                )

        done = tune(backbone, recipe, train_stream, valid_stream, probe=start, around=Surroundings(on_epoch=show))
        seconds = time.perf_counter() - began
        network = make_network(backbone, done.head, recipe)
        test_stream = ImageStream(pixels[test], labels[test], backbone.spec)
        right, accuracy, area = figures(tuned_logits(network, done.state, recipe, test_stream), labels[test])
        rows.append((probe_accuracy, probe_area, accuracy, area, seconds))
        gained, lost = int((right & ~probe_right).sum()), int((~right & probe_right).sum())
        print(
            f"seed {seed}: probe {probe_accuracy:.2f} % {probe_area:.4f}; tuned {accuracy:.2f} % {area:.4f} "
            f"in {seconds:.0f} s ({done.chosen.reason}); cells gained {gained}, lost {lost}",
            flush=True,
        )
    mean, spread = np.mean(rows, 0), np.std(rows, 0, ddof=1) if len(rows) > 1 else np.zeros(5)
    print(
        f"mean: probe {mean[0]:.2f} ± {spread[0]:.2f} % {mean[1]:.4f}; tuned {mean[2]:.2f} ± {spread[2]:.2f} % "
        f"{mean[3]:.4f} ± {spread[3]:.4f}; {mean[4]:.0f} s; published 88.42 % 0.944"
    )


if __name__ == "__main__":
    main()
