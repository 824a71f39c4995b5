"""Are features in eight bits worth it? Speed and accuracy beside f32, on the same images.

    PYTHONPATH=src python benchmarks/int8.py FOLDER ... [--backbone lite0]

The network is quantized by NNCF with 200 training images of each folder. Speed: images per second of the network alone, in
turns, median of seven. Accuracy: a probe on either kind of features, on the same held-out images and, out of fold, on the
training images; the difference with its standard error. docs/decisions/0022-no-int8-features.md says what came out.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

import topwork
from topwork.data.images import decode
from topwork.data.transforms import fit_to_input
from topwork.export.targets import quantized
from topwork.features.embed import Embedder, FeatureStore, embed
from topwork.features.engine import BATCH, OpenVINOEngine, load_engine, openvino_core, with_batch, with_resizer
from topwork.models.backbone import load_backbone
from topwork.paired import paired


def eight_bits(engine: OpenVINOEngine, images: np.ndarray, folder: Path) -> OpenVINOEngine:
    """The same network in eight bits."""
    import openvino

    model = quantized(with_batch(openvino_core().read_model(engine.xml), 1), images, False)
    model.reshape([-1, *images.shape[1:]])
    openvino.save_model(model, folder / "int8.xml", compress_to_fp16=False)
    return OpenVINOEngine(folder / "int8.xml", "f32")


def rate(engine: OpenVINOEngine, images: np.ndarray) -> float:
    """Images per second of one pass."""
    started = time.perf_counter()
    engine.run(images)
    return len(images) / (time.perf_counter() - started)


def measure(path: Path, name: str) -> None:
    """Prints the figures of one dataset."""
    manifest = topwork.scan(path)
    parts = topwork.split(manifest, seed=0)
    engine = load_engine(load_backbone(name), "openvino", "f32")
    backbone = with_resizer(load_backbone(name), engine)
    rng = np.random.default_rng(0)
    rows = rng.permutation(parts.train)[:200]
    images = np.stack([fit_to_input(decode(manifest.read_unchanged(row)).pixels, backbone.spec) for row in rows])
    held = parts.test if len(parts.test) else parts.valid
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        started = time.perf_counter()
        small = eight_bits(engine, images, folder)
        seconds = time.perf_counter() - started
        turns = [(rate(engine, images[: 4 * BATCH]), rate(small, images[: 4 * BATCH])) for _ in range(8)][1:]
        answers, inside, features = [], [], []
        for one, kind in ((engine, "f32"), (small, "int8")):
            found = embed(backbone, manifest, embedder=Embedder(backbone, one, FeatureStore(folder, kind)))
            probe = topwork.fit_probe(found, manifest.targets, len(manifest.classes), rows=parts.train)
            logits = probe.head.logits(found.blocks(probe.head.transform.blocks, held))
            answers.append(logits.argmax(1) == manifest.targets[held])
            inside.append(probe.out_of_fold_logits.argmax(1) == manifest.targets[parts.train][probe.rows])
            features.append(found.block("last").astype(np.float64))
    first, second = features
    cosine = (first * second).sum(1) / (np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1))
    ratio = statistics.median(b / a for a, b in turns)
    print(f"{path.stem}: int8 {ratio:.2f} times the images/s of f32; quantizing took {seconds:.0f} s")
    print(f"  cosine of the features: median {np.median(cosine):.3f}, least {cosine.min():.3f}")
    for part, (a, b) in (("held out", answers), ("out of fold", inside)):
        gain = paired(b, a)
        print(
            f"  {part}, {len(a):,} images: f32 {100 * a.mean():.1f}%, int8 {100 * b.mean():.1f}%, difference "
            f"{100 * gain.mean:+.2f} points (standard error {100 * gain.error:.2f})",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--backbone", default="lite0")
    asked = parser.parse_args()
    for data in asked.folders:
        measure(data, asked.backbone)
