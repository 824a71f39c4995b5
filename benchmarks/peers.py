"""topwork beside fastai, a plain PyTorch loop and transformers: the same images, split, weights and machine.

    make benchmarks [ARGS="FOLDER ... --rounds 3"]
    python benchmarks/peers.py [FOLDER ...] [--rounds 1] [--epochs 4] [--without loop] [--write docs/benchmarks.md]

Without a folder the images of ``topwork demo`` are used. All start from the ImageNet weights of lite0 and train on the train
part of the run; accuracy is that on its test part (valid if there is none), paired image by image. The contestants take turns,
each a whole process of its own:

- ``topwork, cold``: ``topwork fit`` with an empty cache but prepared weights (downloading is no part of either side).
- ``topwork, warm``: the same command again.
- ``fastai``: a frozen body, fastai's own head and augmentation, ``fit_one_cycle`` with its default rate.
- ``plain loop``: what tutorials do: a frozen backbone, Pillow, Adam on a new last layer, no augmentation.

Prediction is compared with transformers' pipeline by benchmarks/predict.py. ``--write`` writes the page of the documentation.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import numpy as np
from predict import predict_rates

import topwork
from topwork.commands.demo import write_demo_data
from topwork.evaluation.intervals import wilson
from topwork.paired import paired
from topwork.text import count, percent_ci, points

SEED = 0
OTHERS = {"fastai": "fastai", "loop": "plain loop"}


@dataclass
class Results:
    """Of one contestant, a value per round; ``correct`` of the last round."""

    seconds: list[float] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)
    correct: list[bool] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--without", action="append", default=[], choices=list(OTHERS))
    parser.add_argument("--write", type=Path)
    parser.add_argument("--contestant", choices=list(OTHERS), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.contestant:
        train = train_fastai if asked.contestant == "fastai" else train_plainly
        print(json.dumps(train(asked.folders[0], asked.epochs)))
        return
    tables = []
    for folder in asked.folders or [write_demo_data()]:
        with tempfile.TemporaryDirectory() as place:
            others = [name for name in OTHERS if name not in asked.without]
            tables.append(compare(folder, Path(place), asked.rounds, asked.epochs, others))
            print(tables[-1], flush=True)
    if asked.write:
        asked.write.write_text(page(tables))


# ---- the contestants


def compare(images: Path, place: Path, n_rounds: int, n_epochs: int, others: list[str]) -> str:
    """Runs everything in turn; returns the section of the page."""
    cache, run = place / "cache", place / "run"
    fit = [sys.executable, "-m", "topwork.cli", "fit", str(images), "--quiet", "--out", str(run), "--overwrite"]
    timed(fit, cache)  # prepares the weights
    other = [sys.executable, __file__, str(run), "--epochs", str(n_epochs), "--contestant"]
    commands = {"topwork, cold": fit, "topwork, warm": fit} | {OTHERS[name]: [*other, name] for name in others}
    results = {name: Results() for name in commands}
    for _ in range(n_rounds):
        for name, command in commands.items():
            if name == "topwork, cold":
                for folder in cache.iterdir():
                    if folder.name != "backbones":
                        shutil.rmtree(folder)
            seconds, megabytes, output = timed(command, cache)
            results[name].seconds.append(seconds)
            results[name].megabytes.append(megabytes)
            if command is fit:
                results[name].correct = topwork.load_run(run).predictions_of().correct.tolist()
            else:
                results[name].correct = json.loads(output.splitlines()[-1])
    fitted = topwork.load_run(run)
    paths = images_of(fitted)[0][:1000]
    return "\n".join([*table(images.stem, fitted, results, n_epochs), *prediction(run / "model", paths, n_rounds)])


def timed(command: list[str], cache: Path) -> tuple[float, float, str]:
    """Wall seconds, peak resident MB of the largest process, and what was printed."""
    environment = os.environ | {"TOPWORK_CACHE": str(cache)}
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"failed: {' '.join(command)}")
        output.seek(0)
        return time.perf_counter() - started, usage.ru_maxrss / 1024, output.read()


def images_of(run: topwork.Run) -> tuple[list[str], list[str], list[str], list[str]]:
    """Paths and labels of the training images, then of those that are judged."""
    manifest, rows = run.manifest, run.predictions_of().sample_indices
    parts = []
    for chosen in (run.split.train, rows):
        parts += [
            [str(manifest.root / manifest.samples[row].path) for row in chosen],
            [str(manifest.samples[row].label) for row in chosen],
        ]
    return tuple(parts)  # type: ignore[return-value]


def train_fastai(run: Path, n_epochs: int) -> list[bool]:
    """A course's way: ``Learner.freeze``, ``fit_one_cycle``; whether each held-out image is right."""
    import pandas as pd
    from fastai.vision.all import (
        ImageDataLoaders,
        Learner,
        Normalize,
        Resize,
        add_head,
        aug_transforms,
        default_split,
        set_seed,
    )

    fitted = topwork.load_run(run)
    train, train_labels, held, held_labels = images_of(fitted)
    backbone = topwork.load_backbone("lite0")
    set_seed(SEED, reproducible=True)
    is_held = [False] * len(train) + [True] * len(held)
    loaders = ImageDataLoaders.from_df(
        pd.DataFrame({"path": train + held, "label": train_labels + held_labels, "held": is_held}),
        path="/",
        valid_col="held",
        item_tfms=Resize(224),
        batch_tfms=[*aug_transforms(), Normalize.from_stats(backbone.spec.mean, backbone.spec.std)],
    )
    body = backbone.module(1)
    body.forward = body.forward_features  # feature maps, which fastai's head pools
    network = add_head(body, 1280, loaders.c)
    learner = Learner(loaders, network, splitter=default_split)
    learner.freeze()
    with learner.no_bar(), learner.no_logging():
        learner.fit_one_cycle(n_epochs)
        probabilities, truth = learner.get_preds(dl=loaders.valid)
    return (probabilities.argmax(1) == truth).tolist()


def train_plainly(run: Path, n_epochs: int) -> list[bool]:
    """The tutorials' way; whether each held-out image is right."""
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset

    fitted = topwork.load_run(run)
    train, train_labels, held, held_labels = images_of(fitted)
    classes = list(fitted.manifest.classes)
    backbone = topwork.load_backbone("lite0")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (backbone.spec.mean, backbone.spec.std))

    class Images(Dataset):  # type: ignore[type-arg]
        def __init__(self, paths: list[str], labels: list[str]) -> None:
            self.items = list(zip(paths, labels, strict=True))

        def __len__(self) -> int:
            return len(self.items)

        def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
            path, label = self.items[number]
            image = Image.open(path).convert("RGB").resize((224, 224), Image.Resampling.BILINEAR)
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
            return (pixels - mean) / std, classes.index(label)

    torch.manual_seed(SEED)
    network = backbone.module(n_classes=len(classes))
    classifier = network.get_classifier()
    network.requires_grad_(False)
    classifier.requires_grad_(True)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-3)
    network.eval()
    for _ in range(n_epochs):
        for images, labels in DataLoader(Images(train, train_labels), 32, shuffle=True, num_workers=2):
            loss = torch.nn.functional.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.inference_mode():
        loader = DataLoader(Images(held, held_labels), 32, num_workers=2)
        return [bool(right) for x, y in loader for right in network(x).argmax(1) == y]


# ---- the page


def table(name: str, fitted: topwork.Run, results: dict[str, Results], n_epochs: int) -> list[str]:
    """The lines of one dataset."""
    parts, ours = fitted.split, results["topwork, cold"]
    n_held, cold = len(ours.correct), statistics.median(ours.seconds)
    lines = [
        f"## {name}",
        "",
        f"{len(fitted.manifest.samples):,} images, {len(fitted.manifest.classes)} classes: {len(parts.train):,} to train on, "
        f"{n_held:,} held out. {count(n_epochs, 'epoch')}; median of {count(len(ours.seconds), 'round')}.",
        "",
        "| | seconds | by topwork, cold | accuracy (95% CI) | topwork better by | memory |",
        "|---|---|---|---|---|---|",
    ]
    for contestant, result in results.items():
        seconds, accuracy = statistics.median(result.seconds), float(np.mean(result.correct))
        interval = wilson(accuracy, n_held)
        gain = paired(ours.correct, result.correct)
        better = "" if contestant.startswith("topwork") else f"{points(gain.mean)} ± {100 * gain.error:.1f} points"
        figure = percent_ci({"value": accuracy, "low": interval.low, "high": interval.high})
        lines.append(
            f"| {contestant} | {seconds:.1f} | {seconds / cold:.2f} | {figure} | {better} | "
            f"{statistics.median(result.megabytes):,.0f} MB |"
        )
    return lines


def prediction(model: Path, paths: list[str], n_rounds: int) -> list[str]:
    """Images per second of ``Predictor`` and of transformers' pipeline on the same model folder, if timm's layout allows."""
    if not (model / "config.json").exists():
        return ["", "Prediction was not compared: transformers cannot read this head.", ""]
    rates, n_same = predict_rates(model, paths, n_rounds)
    theirs = max(rate for name, rate in rates.items() if name != "topwork")
    return [
        "",
        f"Prediction, {len(paths):,} images: topwork {rates['topwork']:.0f} images/s, transformers' pipeline (the better of batch "
        f"sizes 1 and 16) {theirs:.0f}, so {rates['topwork'] / theirs:.1f} times; the same class on {n_same:,}.",
        "",
    ]


def page(tables: list[str]) -> str:
    """The page of the documentation."""
    names = ("topwork", "torch", "timm", "fastai", "transformers", "openvino")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    given = sys.argv[1 : sys.argv.index("--write")] + sys.argv[sys.argv.index("--write") + 2 :]
    words = [Path(word).name if Path(word).exists() else word for word in given]
    arguments = f' ARGS="{" ".join(words)}"' if words else ""
    head = f"""# Benchmarks

Written by `make benchmarks{arguments}` on {time.strftime("%Y-%m-%d")}: {processor()}, {os.cpu_count()} cores,
Python {platform.python_version()}, {versions}.

All train from the same ImageNet weights (lite0) on the same images of the same split, and are compared on the same held-out images.
Seconds are those of whole processes, loading Python included. *Cold* is an empty cache with prepared weights, *warm* the same command again.
fastai: frozen body, its own head and augmentation, `fit_one_cycle` at the default rate. Plain loop: frozen backbone, Adam on
a new last layer. ± is one standard error of the paired difference; memory is the largest process.

AutoGluon and Ultralytics are missing: their weights are downloaded when they start, and the machine had no network.
"""
    return "\n".join([head, *tables])


def processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
