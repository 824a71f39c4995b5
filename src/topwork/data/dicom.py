"""DICOM as a viewer shows it (extra ``dicom``): the first frame, windowed, in its photometric interpretation.

In: the bytes of a file that starts like a DICOM. Out: uint8 RGB pixels, the colors as stored, and the patient, as a short
hash of the PatientID, so that images of one person can be kept together (``--group-by PatientID``) and no name is stored.
"""

from __future__ import annotations

import hashlib
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topwork.data.jpeg import Pixels, check_memory
from topwork.errors import ImageError

NO_DICOM = "DICOM, which requires: pip install 'topwork[dicom]'"
_BYTES_PER_PIXEL = 24  # the file's samples, what they mean as float64, and the finished pixels
_DEFLATED = b"1.2.840.10008.1.2.1.99"  # would be decompressed whole, however large


def read_header(data: bytes) -> Any:
    """The dataset of a file, its pixels not decoded yet; ``Columns`` and ``Rows`` are its size.

    Raises:
        ImageError: not one that can be read, or ``pydicom`` is not installed.
    """
    try:
        import pydicom
    except ImportError:
        raise ImageError(NO_DICOM) from None
    if _DEFLATED in data[:4096]:
        raise ImageError("deflated DICOM is not supported")
    found = pydicom.dcmread(io.BytesIO(data))
    if "PixelData" not in found or "Rows" not in found or "Columns" not in found:
        raise ImageError("a DICOM without an image")
    check_memory(len(data) + _BYTES_PER_PIXEL * int(found.Rows) * int(found.Columns))
    return found


def pixels_of(header: Any) -> Pixels:
    """The first frame, uint8 (H, W, 3)."""
    from pydicom.pixels.processing import apply_color_lut, apply_modality_lut
    from pydicom.pixels.utils import pixel_array

    values = pixel_array(header, index=0)  # YBR becomes RGB here
    kind = str(header.PhotometricInterpretation)
    if kind == "PALETTE COLOR":
        values = apply_color_lut(values, header)
    if values.ndim == 3:
        shift = 8 if values.dtype.itemsize > 1 else 0
        return np.ascontiguousarray((values >> shift).astype(np.uint8))
    if kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise ImageError(f"DICOM with photometric interpretation {kind[:20]} is not supported")
    share = _shown(np.asarray(apply_modality_lut(values, header), np.float64), values, header)
    gray = np.rint(255 * (1 - share if kind == "MONOCHROME1" else share)).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(gray[..., None], (*gray.shape, 3)))


def patient_of(header: Any) -> str:
    """A short hash of the PatientID; "" if there is none."""
    name = str(header.get("PatientID") or "").strip()
    return hashlib.sha256(name.encode()).hexdigest()[:12] if name else ""


def mode_of(header: Any) -> str:
    """Colors as stored, in Pillow's words."""
    if int(header.get("SamplesPerPixel", 1)) > 1:
        return "RGB"
    if header.PhotometricInterpretation == "PALETTE COLOR":
        return "P"
    return "I;16" if int(header.BitsAllocated) > 8 else "L"


def _shown(values: NDArray[np.float64], stored: NDArray[Any], header: Any) -> NDArray[np.float64]:
    """Brightness 0..1 by the first lookup table or window (DICOM PS3.3 C.11.2), else over the range of the values."""
    from pydicom.pixels.processing import apply_voi

    if header.get("VOILUTSequence"):
        table = header.VOILUTSequence[0]
        n_bits = int(table.LUTDescriptor[2])
        looked_up = apply_voi(values.astype(np.int64) if "ModalityLUTSequence" in header else stored, header)
        return np.asarray(np.clip(looked_up / (2.0**n_bits - 1), 0, 1), np.float64)
    center, width = _first(header.get("WindowCenter")), _first(header.get("WindowWidth"))
    if center is None or width is None or width <= 0:
        low, high = values.min(), values.max()
        return np.asarray((values - low) / max(high - low, 1e-9), np.float64)
    function = header.get("VOILUTFunction", "LINEAR")
    if function == "SIGMOID":
        return np.asarray(1 / (1 + np.exp(-4 * (values - center) / width)), np.float64)
    if function == "LINEAR_EXACT":
        return np.clip((values - center) / width + 0.5, 0, 1)
    return np.clip((values - (center - 0.5)) / max(width - 1, 1e-9) + 0.5, 0, 1)


def _first(value: Any) -> float | None:
    if value is None or value == "":
        return None
    return float(value[0] if hasattr(value, "__len__") and not isinstance(value, str) else value)
