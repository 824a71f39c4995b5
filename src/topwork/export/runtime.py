"""The runtime of a saved model: OpenVINO, onnxruntime or torch, whichever is installed.

In: a classifier. Out: an engine in f32, or bf16 if requested. The order is that of speed on every processor that
benchmarks/runtimes.py was run on (docs/lab-log.md).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import warnings
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from topwork.data.transforms import Pixels
from topwork.errors import ModelError, UsageError
from topwork.export.targets import write_onnx
from topwork.features.cluster import loader_on
from topwork.features.embed import Embedder
from topwork.features.engine import (
    BATCH,
    BLOCKS,
    Blocks,
    Engine,
    OpenVINOEngine,
    TorchEngine,
    check_precision,
    feature_network,
)
from topwork.files import atomic_file
from topwork.models.backbone import Backbone
from topwork.models.classifier import COMPILED, FACTS, Classifier, is_compiled
from topwork.settings import HERE, ClusterSettings, cache_folder

Runtime = Literal["auto", "openvino", "onnxruntime", "torch"]
Precision = Literal["f32", "bf16"]


def engine_of(classifier: Classifier, runtime: Runtime = "auto", precision: Precision = "f32") -> Engine:
    """The engine of a classifier.

    Args:
        runtime: ``auto`` uses OpenVINO if it is installed and the model folder has the compiled network for
            this preprocessing, else torch.
        precision: ``bf16`` is faster if the hardware supports it, but close calls may change.

    Raises:
        UsageError: the requested runtime or precision is not available.
    """
    if runtime == "auto":
        runtime = "openvino" if _is_available(classifier, "openvino") else "torch"
    elif not _is_available(classifier, runtime):
        raise UsageError(f"--runtime {runtime}: not installed, or not supported by this model; try auto.")
    check_precision(runtime, precision)
    if runtime == "openvino":
        xml, spec = classifier.backbone.folder / COMPILED[0], classifier.backbone.spec
        engine = OpenVINOEngine(xml, precision)
        if engine.input_size != (spec.height, spec.width):
            raise ModelError(f"{xml}: its input size differs from the one in {FACTS}.")
        return engine
    if runtime == "onnxruntime":
        return ONNXRuntimeEngine(classifier.backbone)
    return TorchEngine(classifier.backbone, precision)


def _is_available(classifier: Classifier, runtime: str) -> bool:
    if importlib.util.find_spec(runtime) is None:
        return False
    return runtime != "openvino" or is_compiled(classifier.backbone)


class ONNXRuntimeEngine(Engine):
    """The network in onnxruntime, in f32. torch exports it to ONNX once; the file is cached."""

    kind = "onnxruntime"
    precision = "f32"

    def __init__(self, backbone: Backbone) -> None:
        import onnxruntime

        facts = [backbone.weights_digest, backbone.architecture, backbone.spec.as_dict()]
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
        path = cache_folder() / "onnx" / f"{key}.onnx"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            with warnings.catch_warnings(), atomic_file(path) as partial:
                warnings.simplefilter("ignore")  # tracing warns about shapes that are constant for us
                write_onnx(feature_network(backbone), backbone, BLOCKS, partial)
        self._session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run_unrounded(self, images: Pixels) -> Blocks:
        """Features of uint8 (B, H, W, 3), any B."""
        chunks = [
            self._session.run(list(BLOCKS), {"images": images[start : start + BATCH]})
            for start in range(0, len(images), BATCH)
        ]
        found: list[NDArray[np.float32]] = [np.concatenate(values) for values in zip(*chunks, strict=True)]
        return dict(zip(BLOCKS, found, strict=True))


def model_embedder(classifier: Classifier, cluster: ClusterSettings = HERE) -> Embedder:
    """An embedder whose features are exactly those of the model."""
    load = loader_on(cluster)
    engine = engine_of(classifier, "torch" if cluster.num_gpus_per_worker else "auto")
    return Embedder(classifier.backbone, engine, load=load)
