"""Post-training quantization to 8 bits, and its cost in accuracy.

In: an ONNX or OpenVINO model that takes uint8 images, and images to calibrate activation ranges on. Out: the same model
with 8-bit weights and activations, a third of the size and usually faster on processors with integer instructions. NNCF
(Apache-2.0) does the work: per-channel weights and bias correction (Nagel et al. 2019, arXiv 1906.04721, section 4.2).
On 200 photographs its probabilities were twice as close as with onnxruntime's quantizer (docs/decisions/0021-int8.md).
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from topwork.data.transforms import Pixels
from topwork.errors import UsageError
from topwork.evaluation.compare import accuracy_difference_interval

N_IMAGES = 200  # to calibrate on; more change little
_INPUT = "images"


@dataclass(frozen=True)
class Cost:
    """The cost of 8 bits on labeled images that the model was not trained on.

    Attributes:
        n: labeled images compared.
        accuracy_before, accuracy_after: of the original and of the export.
        difference: after minus before, with its paired 95% CI in ``low`` and ``high``.
    """

    n: int
    accuracy_before: float
    accuracy_after: float
    difference: float
    low: float
    high: float


def quantized(model: Any, pixels: Pixels, is_transformer: bool = False) -> Any:
    """The 8-bit model.

    Args:
        model: an ``onnx.ModelProto`` or ``openvino.Model``.
        pixels: uint8 (N, H, W, 3), representative images.
        is_transformer: whether the network has attention blocks.

    Raises:
        UsageError: NNCF is not installed.
    """
    nncf = _nncf()
    is_onnx = type(model).__module__.startswith("onnx")
    images = [{_INPUT: image[None]} if is_onnx else image[None] for image in pixels]
    kind = nncf.ModelType.TRANSFORMER if is_transformer else None
    with contextlib.redirect_stdout(io.StringIO()):  # NNCF prints progress bars to stdout
        return nncf.quantize(model, nncf.Dataset(images), subset_size=len(images), model_type=kind)


def cost(labels: Sequence[str], before: Sequence[str], after: Sequence[str]) -> Cost:
    """The change in accuracy, from true labels and both predictions of the same images."""
    true, one, two = (np.array(names) for names in (labels, before, after))
    right_before, right_after = true == one, true == two
    interval = accuracy_difference_interval(right_before, right_after)
    first, second = float(right_before.mean()), float(right_after.mean())
    return Cost(len(true), first, second, second - first, interval.low, interval.high)


def _nncf() -> Any:
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # nothing is reported to its makers
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # looks for CUDA compilers
    try:
        import nncf
    except ImportError:
        raise UsageError("--int8 requires: pip install 'topwork[int8]'") from None
    nncf.set_log_level(logging.ERROR)
    return nncf
