"""``topwork fit`` as a user meets it, cold and warm, against a plain PyTorch loop of the same work, in one run.

    python benchmarks/fit.py FOLDER [--epochs 4] [--rounds 3]

``cold`` is the command with an empty cache but prepared backbone files (downloading or converting weights is no part
of either side); ``warm`` is the same command again. ``loop`` is what tutorials do with a frozen backbone: the same
weights and split in PyTorch fp32, images decoded by Pillow and resized to 224, Adam on the new last layer for some
epochs, the backbone run anew in each. Wall seconds of whole processes, peak memory, and test accuracy with its interval.

Measured figures and the machine they come from stand in docs/lab-log.md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loop", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.loop:
        plain_loop(arguments.folder, arguments.loop, arguments.epochs)
        return
    with tempfile.TemporaryDirectory() as root:
        compare(arguments, Path(root))


def compare(arguments: argparse.Namespace, root: Path) -> None:
    """Runs cold, warm and the loop in turn and prints medians and ratios."""
    environment = os.environ | {"TOPWORK_CACHE": str(root / "cache")}
    fit = [
        sys.executable,
        "-m",
        "topwork.cli",
        "fit",
        str(arguments.folder),
        "--json",
        "--quiet",
        "--out",
        str(root / "run"),
    ]
    subprocess.run([*fit, "--overwrite"], env=environment, check=True, capture_output=True)  # prepares the backbone
    seconds: dict[str, list[float]] = {"cold": [], "warm": [], "loop": []}
    for _ in range(arguments.rounds):
        for name in ("features", "facts-1"):
            shutil.rmtree(root / "cache" / name, ignore_errors=True)
        for folder in (root / "cache").glob("facts*"):
            shutil.rmtree(folder)
        for name in ("cold", "warm"):
            started = time.perf_counter()
            done = subprocess.run([*fit, "--overwrite"], env=environment, check=True, capture_output=True, text=True)
            seconds[name].append(time.perf_counter() - started)
            answer = json.loads(done.stdout)
        if len(seconds["loop"]) < 1:
            command = [sys.executable, __file__, str(arguments.folder), "--loop", str(root / "run")]
            started = time.perf_counter()
            done = subprocess.run(
                [*command, "--epochs", str(arguments.epochs)],
                env=environment,
                check=True,
                capture_output=True,
                text=True,
            )
            seconds["loop"].append(time.perf_counter() - started)
            loop_accuracy = done.stdout.strip()
    part = answer["test"] or answer["valid"]
    figure = part["accuracy"]
    for name, values in seconds.items():
        print(f"{name:5s} median {statistics.median(values):7.1f} s   range {min(values):.1f} to {max(values):.1f}")
    cold, warm, loop = (statistics.median(seconds[name]) for name in ("cold", "warm", "loop"))
    print(f"loop of {arguments.epochs} epochs / cold = {loop / cold:.1f}   cold / warm = {cold / warm:.1f}")
    print(
        f"accuracy on {part['n']}: topwork {figure['value']:.4f} ({figure['low']:.4f} to {figure['high']:.4f}), "
        f"loop {loop_accuracy}"
    )
    print(
        f"peak memory of the commands: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024:.0f} MiB (largest)"
    )


def plain_loop(folder: Path, run: Path, epochs: int) -> None:
    """The tutorial: frozen backbone, new last layer, Adam; on the split of the run. Prints the test accuracy."""
    import numpy as np
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset

    from topwork.data.manifest import load_manifest
    from topwork.models.backbone import load_backbone

    manifest = load_manifest(run / "manifest.parquet")
    split = json.loads((run / "split.json").read_text())["parts"]
    label_of = {sample.path: manifest.classes.index(sample.label) for sample in manifest.samples}

    class Images(Dataset):  # type: ignore[type-arg]
        def __init__(self, part: str) -> None:
            self.paths = [item["path"] for item in split[part]]

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
            path = self.paths[number]
            image = Image.open(folder / path).convert("RGB").resize((224, 224), Image.Resampling.BILINEAR)
            return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1, label_of[path]

    torch.manual_seed(0)
    network = load_backbone("lite0").module(n_classes=len(manifest.classes))
    classifier = network.get_classifier()
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    for parameter in classifier.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-3)
    for _ in range(epochs):
        for images, labels in DataLoader(Images("train"), 32, shuffle=True, num_workers=2):
            loss = torch.nn.functional.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    judged = "test" if split["test"] else "valid"
    with torch.inference_mode():
        right = [(network(x).argmax(1) == y).float() for x, y in DataLoader(Images(judged), 32, num_workers=2)]
    print(f"{torch.cat(right).mean():.4f}")


if __name__ == "__main__":
    main()
