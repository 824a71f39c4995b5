"""A classifier as one file for another runtime: ONNX, OpenVINO or ``torch.export``.

In: a classifier. Out: a file that maps ``images``, uint8 RGB (B, H, W, 3) in the input size, to ``probabilities``,
float32 (B, C), calibrated. It contains normalization, head, temperature and softmax (or sigmoid for several labels), in
f32; its metadata contains class names, preprocessing and thresholds. ``package.py`` compares it with the original.

In 8 bits, a model takes a third of the space and is usually faster on processors with integer instructions. NNCF
(Apache-2.0) does the work: per-channel weights and bias correction (Nagel et al. 2019, arXiv 1906.04721, section 4.2). On
200 photographs its probabilities were twice as close as with onnxruntime's quantizer (docs/decisions/0021-int8.md).

A new format is one entry of ``TARGETS``. Features are not rounded to float16, unlike in the feature store.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
import json
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topwork.errors import TopworkError, UsageError

if TYPE_CHECKING:  # the command line reads this table, so nothing heavy is imported here
    from torch import nn

    from topwork.data.transforms import Pixels
    from topwork.models.backbone import Backbone
    from topwork.models.classifier import Classifier

OPSET = 18  # supported by onnxruntime since 1.14 (2023)


@dataclass(frozen=True)
class Target:
    """An export format.

    Attributes:
        title: for people; ``help``: for the command line.
        endings: extensions of the file and of those next to it.
        runtime: the required package.
        write: writes a network to a file, in 8 bits if calibration images are given.
        open: returns a function from uint8 (B, H, W, 3) to probabilities (B, C). Its source is copied into
            ``predict.py``, so it must be self-contained.
    """

    title: str
    help: str
    endings: tuple[str, ...]
    runtime: str
    write: Callable[[nn.Module, Classifier, Path, Pixels | None], None]
    open: Callable[[Path], Callable[[Any], Any]]
    has_int8: bool = True


def target_of(to: str | None, out: Path) -> tuple[str, Target]:
    """A target with its name, by default that of the file extension.

    Raises:
        UsageError: an unknown name, or a wrong file extension.
    """
    by_ending = {target.endings[0]: name for name, target in TARGETS.items()}
    if to is None and out.suffix not in by_ending:
        raise UsageError(f"--out {out}: must end in {', '.join(by_ending)}.")
    name = to or by_ending[out.suffix]
    if name not in TARGETS:
        raise UsageError(f"--to {name}: must be one of {', '.join(TARGETS)}.")
    target = TARGETS[name]
    if out.suffix != target.endings[0]:
        raise UsageError(f"--out {out}: the name of an {name} export must end in {target.endings[0]}.")
    return name, target


def export_classifier(classifier: Classifier, to: str, out: Path, calibration: Pixels | None = None) -> None:
    """Writes the export to ``out`` (for OpenVINO, with a ``.bin`` file next to it).

    Args:
        calibration: uint8 (N, H, W, 3) images for 8-bit quantization.

    Raises:
        UsageError: a package is missing, or the format has no 8-bit variant.
        TopworkError: the network cannot be exported that way.
    """
    target = TARGETS[to]
    if calibration is not None and not target.has_int8:
        able = " and ".join(f"--to {name}" for name, other in TARGETS.items() if other.has_int8)
        raise UsageError(f"--int8 only works with {able}.")
    network = classifier_network(classifier)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing warns about shapes that are constant for us
            target.write(network, classifier, out, calibration)
    except ImportError as error:
        install = "openvino" if error.name == "openvino" else "'topwork[export]'"
        raise UsageError(f"--to {to}: requires: pip install {install}") from None
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise TopworkError(f"{classifier.backbone.name}: cannot be exported to {to}: {lines[0][:200]}") from error


def classifier_network(classifier: Classifier) -> nn.Module:
    """Backbone, head and softmax as one torch module, eval mode: uint8 (B, H, W, 3) to probabilities (B, C)."""
    import numpy as np
    import torch
    from torch import nn

    from topwork.features.engine import feature_network
    from topwork.models.modules import powered

    head, power = classifier.head, classifier.head.transform.power

    class ClassifierNetwork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = feature_network(classifier.backbone)
            # In float64, so that folding centering and scaling into the weights costs no precision.
            weight = head.weight.astype(np.float64) / head.transform.scale
            bias = head.bias - weight @ head.transform.mean.astype(np.float64)
            self.head = nn.Linear(weight.shape[1], weight.shape[0])
            with torch.no_grad():
                self.head.weight.copy_(torch.from_numpy(weight))
                self.head.bias.copy_(torch.from_numpy(bias))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            blocks = dict(zip(("last", "stages"), self.features(images), strict=True))
            columns = torch.cat([blocks[name] for name in head.transform.blocks], 1)
            logits = self.head(powered(columns, power))
            probabilities: torch.Tensor = logits.sigmoid() if classifier.multi_label else logits.softmax(1)
            return probabilities

    return ClassifierNetwork().eval()


def description(classifier: Classifier, model: str) -> dict[str, Any]:
    """Metadata of an export: file name, class names, preprocessing, provenance."""
    import topwork
    from topwork.evaluation.predictions import Task

    task = Task.of(classifier)
    limits = (
        {} if task.thresholds is None else {"thresholds": task.thresholds.tolist(), "multi_label": task.multi_label}
    )
    return limits | {
        "model": model,
        "classes": list(classifier.classes),
        "preprocessing": classifier.backbone.spec.as_dict(),
        "input": "images: uint8 RGB (batch, height, width, 3)",
        "output": "probabilities: float32 (batch, classes), calibrated",
        "topwork": topwork.__version__,
        "backbone": classifier.backbone.name,
        "licence_of_weights": classifier.backbone.license,
    }


def standalone_script(classifier: Classifier, exported: Path, target: Target) -> str:
    """The text of ``predict.py`` for an export, with the digests of its files."""
    from topwork.export import standalone

    text = Path(standalone.__file__).read_text(encoding="utf-8")
    # The repr of ASCII JSON is always a Python literal, so class names cannot become code.
    files = [path for ending in target.endings if (path := exported.with_suffix(ending)).is_file()]
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    facts = description(classifier, exported.name) | {"sha256": digests}
    settings = f"SETTINGS: dict[str, Any] = json.loads({json.dumps(facts)!r})"
    opener = target.open
    code = inspect.getsource(opener).replace(f"def {opener.__name__}(", "def open_model(", 1)
    text = text.replace("SETTINGS: dict[str, Any] = {}", settings, 1)
    return text.replace(inspect.getsource(standalone.open_model), code, 1)


# ---- formats


def _example(backbone: Backbone) -> Any:
    import torch

    return torch.zeros(2, backbone.spec.height, backbone.spec.width, 3, dtype=torch.uint8)


def write_onnx(network: nn.Module, backbone: Backbone, outputs: Sequence[str], path: Path) -> None:
    """Traces a network of uint8 ``images`` (B, H, W, 3) in the input size and writes it as ONNX."""
    import torch

    torch.onnx.export(
        network,
        (_example(backbone),),
        str(path),
        input_names=["images"],
        output_names=list(outputs),
        dynamic_axes={name: {0: "batch"} for name in ("images", *outputs)},
        opset_version=OPSET,
        dynamo=False,  # smaller graph, and needs no onnxscript
    )


def _has_attention(classifier: Classifier) -> bool:
    return any(".attn." in name for stage in classifier.backbone.stages for name in stage.parameters)


def quantized(model: Any, pixels: Pixels, is_transformer: bool) -> Any:
    """The model in 8 bits.

    Args:
        model: an ``onnx.ModelProto`` or ``openvino.Model``.
        pixels: uint8 (N, H, W, 3), representative images.
        is_transformer: whether the network has attention blocks.

    Raises:
        UsageError: NNCF is not installed.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # nothing is reported to its makers
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # looks for CUDA compilers
    try:
        import nncf
    except ImportError:
        raise UsageError("--int8 requires: pip install 'topwork[int8]'") from None
    nncf.set_log_level(logging.ERROR)
    is_onnx = type(model).__module__.startswith("onnx")
    images = [{"images": image[None]} if is_onnx else image[None] for image in pixels]
    kind = nncf.ModelType.TRANSFORMER if is_transformer else None
    with contextlib.redirect_stdout(io.StringIO()):  # NNCF prints progress bars to stdout
        return nncf.quantize(model, nncf.Dataset(images), subset_size=len(images), model_type=kind)


def _write_onnx(network: nn.Module, classifier: Classifier, out: Path, calibration: Pixels | None) -> None:
    import onnx

    write_onnx(network, classifier.backbone, ["probabilities"], out)
    model = onnx.load(str(out))
    if calibration is not None:
        model = quantized(model, calibration, _has_attention(classifier))
    for key, value in description(classifier, out.name).items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value if isinstance(value, str) else json.dumps(value)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(out))  # without external data: one self-contained file


def _open_onnx(path: Path) -> Callable[[Any], Any]:
    """A function from uint8 (B, H, W, 3) to probabilities (B, C)."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(["probabilities"], {"images": pixels})[0]


def _write_openvino(network: nn.Module, classifier: Classifier, out: Path, calibration: Pixels | None) -> None:
    from topwork.features.engine import _openvino

    ov = _openvino()
    spec = classifier.backbone.spec
    shape = [-1, spec.height, spec.width, 3]
    model = ov.convert_model(network, example_input=_example(classifier.backbone), input=[(shape, ov.Type.u8)])
    model.inputs[0].set_names({"images"})
    model.outputs[0].set_names({"probabilities"})
    if calibration is not None:
        model = quantized(model, calibration, _has_attention(classifier))
    for key, value in description(classifier, out.name).items():
        model.set_rt_info(value if isinstance(value, str) else json.dumps(value), ["topwork", key])
    ov.save_model(model, str(out), compress_to_fp16=False)


def _open_openvino(path: Path) -> Callable[[Any], Any]:
    """A function from uint8 (B, H, W, 3) to probabilities (B, C)."""
    import openvino

    # Without the hint OpenVINO uses bf16 if the processor supports it, which changes close predictions.
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda pixels: compiled(pixels)[0]


def _write_pt2(network: nn.Module, classifier: Classifier, out: Path, _calibration: Pixels | None) -> None:
    import torch

    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(network, (_example(classifier.backbone),), dynamic_shapes={"images": {0: batch}})
    facts = json.dumps(description(classifier, out.name))
    torch.export.save(program, str(out), extra_files={"topwork.json": facts})


def _open_pt2(path: Path) -> Callable[[Any], Any]:
    """A function from uint8 (B, H, W, 3) to probabilities (B, C)."""
    import torch

    network = torch.export.load(path).module()
    return lambda pixels: network(torch.from_numpy(pixels.copy())).detach().numpy()


TARGETS = {
    "onnx": Target(
        f"ONNX, opset {OPSET}", "one self-contained file", (".onnx",), "onnxruntime", _write_onnx, _open_onnx
    ),
    "openvino": Target("OpenVINO IR", ".xml and .bin", (".xml", ".bin"), "openvino", _write_openvino, _open_openvino),
    "pt2": Target("torch.export", "torch.export", (".pt2",), "torch", _write_pt2, _open_pt2, has_int8=False),
}
