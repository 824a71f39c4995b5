"""What runs the network of a saved model: OpenVINO, onnxruntime or torch, whichever is fastest here.

In: a classifier. Out: an engine. Unless told otherwise it is OpenVINO where that is installed, and torch elsewhere: the order
of speed on the processors that benchmarks/runtimes.py was run on (docs/lab-log.md). ``fastest`` measures all there are on
this machine, some seconds once a model, and from then on ``auto`` takes the winner.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import time
import warnings
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from topwork.data.transforms import Pixels
from topwork.errors import UsageError
from topwork.features.engine import (
    BATCH,
    Batch,
    Blocks,
    Engine,
    OpenVINOEngine,
    TorchEngine,
    drawn_images,
    feature_network,
    rounded,
)
from topwork.features.store import BLOCKS
from topwork.files import atomic_file
from topwork.models.backbone import Backbone
from topwork.models.classifier import COMPILED, Classifier
from topwork.settings import cache_folder

Runtime = Literal["auto", "fastest", "openvino", "onnxruntime", "torch"]
_ROUNDS = 3
_OPSET = 18


def engine_of(classifier: Classifier, runtime: Runtime = "auto") -> Engine:
    """The engine that answers for a classifier.

    Args:
        runtime: ``auto``: what was found fastest here before, else OpenVINO, else torch; ``fastest``: measures first.

    Raises:
        UsageError: a runtime asked for by name is not installed.
    """
    if runtime == "fastest":
        runtime = _fastest(measure(classifier))
    if runtime == "auto":
        runtime = _remembered(classifier) or ("openvino" if is_there(classifier, "openvino") else "torch")
    if not is_there(classifier, runtime):
        raise UsageError(f"--runtime {runtime}: is not installed, or the model has no form for it; try auto.")
    if runtime == "openvino":
        return OpenVINOEngine(classifier.backbone.folder / COMPILED[0], classifier.precision)
    if runtime == "onnxruntime":
        return ONNXRuntimeEngine(classifier.backbone)
    return TorchEngine(classifier.backbone, "f32")


def measure(classifier: Classifier) -> dict[str, float]:
    """Images a second of every runtime that is installed; remembered for ``auto``."""
    pixels = np.concatenate([drawn_images(classifier.backbone.spec)] * 4)
    rates = {}
    for runtime in get_args(Runtime)[2:]:
        if is_there(classifier, runtime):
            engine = engine_of(classifier, runtime)
            engine.run(pixels)
            rates[runtime] = len(pixels) / min(_seconds(engine, pixels) for _ in range(_ROUNDS))
    place = _memory(classifier)
    place.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(place) as partial:
        partial.write_text(json.dumps(rates))
    return rates


def is_there(classifier: Classifier, runtime: str) -> bool:
    """Whether a runtime is installed and the model has what it needs."""
    if importlib.util.find_spec(runtime) is None:
        return False
    return runtime != "openvino" or (classifier.backbone.folder / COMPILED[0]).is_file()


class ONNXRuntimeEngine:
    """The network run by onnxruntime, in f32. Its ONNX form is made by torch once and kept in the cache."""

    kind = "onnxruntime"
    precision = "f32"
    note: str | None = None

    def __init__(self, backbone: Backbone) -> None:
        import onnxruntime

        path = cache_folder() / "onnx" / f"{_key(backbone)}.onnx"
        if not path.is_file():
            _export(backbone, path)
        self._session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(self, images: Pixels) -> Batch:
        """Features rounded to float16, as they are stored."""
        return rounded(self.run_unrounded(images))

    def run_unrounded(self, images: Pixels) -> Blocks:
        """Features of uint8 (B, H, W, 3), any B."""
        chunks = [
            self._session.run(list(BLOCKS), {"images": images[start : start + BATCH]})
            for start in range(0, len(images), BATCH)
        ]
        found: list[NDArray[np.float32]] = [np.concatenate(values) for values in zip(*chunks, strict=True)]
        return dict(zip(BLOCKS, found, strict=True))


def _export(backbone: Backbone, path: Path) -> None:
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    example = torch.zeros(2, backbone.spec.height, backbone.spec.width, 3, dtype=torch.uint8)
    batch: Any = {name: {0: "batch"} for name in ("images", *BLOCKS)}
    with warnings.catch_warnings(), atomic_file(path) as partial:
        warnings.simplefilter("ignore")  # tracing warns about shapes that are constant for us
        torch.onnx.export(
            feature_network(backbone), (example,), str(partial), input_names=["images"], output_names=list(BLOCKS),
            dynamic_axes=batch, opset_version=_OPSET, dynamo=False,
        )  # fmt: skip


def _seconds(engine: Engine, pixels: Pixels) -> float:
    started = time.perf_counter()
    engine.run(pixels)
    return time.perf_counter() - started


def _key(backbone: Backbone) -> str:
    facts = [backbone.weights_digest, backbone.architecture, backbone.spec.as_dict()]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def _memory(classifier: Classifier) -> Path:
    return cache_folder() / "runtimes" / f"{_key(classifier.backbone)}-{classifier.precision}.json"


def _remembered(classifier: Classifier) -> Any:
    """The runtime that was fastest, if that was measured here and it is still installed."""
    try:
        fastest = _fastest(json.loads(_memory(classifier).read_text()))
    except (OSError, ValueError, AttributeError, TypeError):
        return None
    return fastest if is_there(classifier, fastest) else None


def _fastest(rates: dict[str, float]) -> Any:
    return max(rates, key=lambda name: rates[name])
