"""A classifier as one file for another runtime: ONNX, OpenVINO or ``torch.export``.

In: a classifier. Out: a file that takes ``images``, uint8 RGB (B, H, W, 3) of the input's size, and gives
``probabilities``, float32 (B, C), calibrated; normalization, head, temperature and softmax (or, where an image may have
several labels, sigmoids: their thresholds are in the metadata) are inside, in f32. Class names and preprocessing are in
its metadata. Whether it answers as the original does is ``parity.py``; eight-bit integers in place of f32 are
``quantize.py``.

The features are not rounded to float16 as in topwork's store.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from topwork.data.transforms import Pixels
from topwork.errors import TopworkError, UsageError
from topwork.export import standalone
from topwork.export.quantize import quantized
from topwork.features.engine import _openvino, feature_network
from topwork.models.classifier import Classifier

if TYPE_CHECKING:
    from torch import nn

Format = Literal["onnx", "openvino", "pt2"]
ENDINGS: dict[str, str] = {"onnx": ".onnx", "openvino": ".xml", "pt2": ".pt2"}
OPSET = 18  # what onnxruntime reads since 1.14 (2023)


def export_classifier(classifier: Classifier, to: Format, out: Path, calibration: Pixels | None = None) -> None:
    """Writes the export to ``out`` (OpenVINO: and the weights beside it, as ``.bin``).

    Args:
        calibration: uint8 (N, H, W, 3) images; with them weights and activations become eight-bit integers.

    Raises:
        UsageError: the ending does not fit the format, a package is missing, or the format has no eight-bit form.
        TopworkError: the network cannot be exported that way.
    """
    check_ending(to, out)
    if calibration is not None and to == "pt2":
        raise UsageError("--int8: for --to onnx and --to openvino only.")
    network = classifier_network(classifier)
    writers = {"onnx": _write_onnx, "openvino": _write_openvino, "pt2": _write_pt2}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing warns about shapes that are constant for us
            writers[to](network, classifier, out, calibration)
    except ImportError as error:
        install = "openvino" if error.name == "openvino" else "'topwork[export]'"
        raise UsageError(f"--to {to}: needs the package {error.name} (pip install {install}).") from None
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise TopworkError(f"{classifier.backbone.name}: cannot be exported to {to}: {lines[0][:200]}") from error


def check_ending(to: str, out: Path) -> None:
    """Raises UsageError unless the name ends as files of the format do."""
    if out.suffix != ENDINGS[to]:
        raise UsageError(f"--out {out}: the name of an {to} export must end in {ENDINGS[to]}.")


def classifier_network(classifier: Classifier) -> nn.Module:
    """Backbone, head and softmax as one torch module, eval mode: uint8 (B, H, W, 3) to probabilities (B, C)."""
    import torch
    from torch import nn

    from topwork.models.modules import powered

    head, power = classifier.head, classifier.head.transform.power

    class ClassifierNetwork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = feature_network(classifier.backbone)
            # In float64 once, so that centering and scaling cost no accuracy inside the graph.
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
    """What goes with an export: file name, class names, preprocessing, origin."""
    import topwork

    several = {"thresholds": classifier.thresholds["labels"]} if classifier.multi_label else {}
    return several | {
        "model": model,
        "classes": list(classifier.classes),
        "preprocessing": classifier.backbone.spec.as_dict(),
        "input": "images: uint8 RGB (batch, height, width, 3)",
        "output": "probabilities: float32 (batch, classes), calibrated",
        "topwork": topwork.__version__,
        "backbone": classifier.backbone.name,
        "licence_of_weights": classifier.backbone.license,
    }


def standalone_script(classifier: Classifier, model: str) -> str:
    """The text of ``predict.py`` for an export of that file name."""
    text = Path(standalone.__file__).read_text(encoding="utf-8")
    # The repr of ASCII JSON is a Python literal whatever the class names hold: names cannot become code.
    settings = f"SETTINGS: dict[str, Any] = json.loads({json.dumps(description(classifier, model))!r})"
    return text.replace("SETTINGS: dict[str, Any] = {}", settings, 1)


def reference_decoder() -> str:
    """The part of ``predict.py`` that others have to match: from the file to the pixels that the model takes."""
    text = Path(standalone.__file__).read_text(encoding="utf-8")
    return text.partition("# ---- reference decoder")[2].partition("\n")[2].partition("# ---- the model")[0].strip()


# ---- formats


def _example(classifier: Classifier) -> Any:
    import torch

    spec = classifier.backbone.spec
    return torch.zeros(2, spec.height, spec.width, 3, dtype=torch.uint8)


def _has_attention(classifier: Classifier) -> bool:
    return any(".attn." in name for stage in classifier.backbone.stages for name in stage.parameters)


def _write_onnx(network: nn.Module, classifier: Classifier, out: Path, calibration: Pixels | None) -> None:
    import onnx
    import torch

    torch.onnx.export(
        network,
        (_example(classifier),),
        str(out),
        input_names=["images"],
        output_names=["probabilities"],
        dynamic_axes={"images": {0: "batch"}, "probabilities": {0: "batch"}},
        opset_version=OPSET,
        dynamo=False,  # writes the smaller graph, and needs no onnxscript
    )
    model = onnx.load(str(out))
    if calibration is not None:
        model = quantized(model, calibration, _has_attention(classifier))
    for key, value in description(classifier, out.name).items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value if isinstance(value, str) else json.dumps(value)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(out))  # without external data: one self-contained file


def _write_openvino(network: nn.Module, classifier: Classifier, out: Path, calibration: Pixels | None) -> None:
    ov = _openvino()
    spec = classifier.backbone.spec
    shape = [-1, spec.height, spec.width, 3]
    model = ov.convert_model(network, example_input=_example(classifier), input=[(shape, ov.Type.u8)])
    model.inputs[0].set_names({"images"})
    model.outputs[0].set_names({"probabilities"})
    if calibration is not None:
        model = quantized(model, calibration, _has_attention(classifier))
    for key, value in description(classifier, out.name).items():
        model.set_rt_info(value if isinstance(value, str) else json.dumps(value), ["topwork", key])
    ov.save_model(model, str(out), compress_to_fp16=False)


def _write_pt2(network: nn.Module, classifier: Classifier, out: Path, _calibration: Pixels | None) -> None:
    import torch

    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(network, (_example(classifier),), dynamic_shapes={"images": {0: batch}})
    facts = json.dumps(description(classifier, out.name))
    torch.export.save(program, str(out), extra_files={"topwork.json": facts})
