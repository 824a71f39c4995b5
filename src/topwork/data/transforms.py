"""Preprocessing: from decoded pixels to the input of the network.

In: uint8 pixels (H, W, 3) of any size and an :class:`InputSpec`. Out: uint8 pixels of exactly the input size.
Normalization is part of the compiled network (see ``features/engine.py``).

Training, prediction and server all call :func:`fit_to_input`. It does not import torch, so that prediction starts
quickly. There are two resizers: Pillow's, which timm, transformers and the exports use, and a faster one that differs
by at most one gray level (docs/decisions/0001-resizer.md).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from cykooz_resizer import CropBox, FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions
from cykooz_resizer import Resizer as QuickResizer
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Fit = Literal["squash", "crop", "pad"]
Resizer = Literal["quick", "pillow"]
Mirror = Literal["none", "horizontal", "both"]
MIRRORS: dict[Mirror, tuple[tuple[int, ...], ...]] = {
    "none": ((),),
    "horizontal": ((), (2,)),
    "both": ((), (2,), (1,), (1, 2)),
}  # axes of (B, H, W, 3) to mirror along

_FILTERS = {"bilinear": FilterType.bilinear, "bicubic": FilterType.catmull_rom}
_LOCAL = threading.local()  # one Resizer per thread: it is not thread-safe


@dataclass(frozen=True)
class InputSpec:
    """The preprocessing that belongs to a set of weights.

    Attributes:
        height, width: input size in pixels.
        fit: ``squash`` stretches the whole image to the input, ``crop`` cuts the largest centered box of the right
            shape, ``pad`` keeps everything and fills the rest with ``background``.
        crop_fraction: share of that box's side that ``crop`` keeps, in (0, 1].
        interpolation: ``bilinear`` or ``bicubic``, always antialiased.
        mean, std: per channel, for pixels scaled to [0, 1].
        background: RGB fill of ``pad``, 0..255.
        resizer: ``pillow`` matches other programs; ``quick`` differs by at most one gray level and is five times as
            fast.
        mirror: which mirrored positions the network sees in addition to the image itself; features are the mean over them
            (test-time augmentation): ``horizontal`` left to right, ``both`` also upside down and both together.
        bands: which bands of a many-band TIFF are red, green and blue, such as ``3,2,1``; "" for other images.
    """

    height: int = 224
    width: int = 224
    fit: Fit = "squash"
    crop_fraction: float = 1.0
    interpolation: str = "bilinear"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    background: tuple[int, int, int] = (128, 128, 128)
    resizer: Resizer = "quick"
    mirror: Mirror = "none"
    bands: str = ""

    @property
    def min_side(self) -> int:
        """Short side in pixels below which a decoder must not shrink an image.

        Twice the input: the antialiased resize then still sees finer detail than it keeps, and agrees with
        pipelines that decode at full size.
        """
        return 2 * max(self.height, self.width)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; ``mirror`` and ``bands`` only if not empty, so older records and caches stay valid."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        if self.mirror == "none":
            del values["mirror"]
        if not self.bands:
            del values["bands"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> InputSpec:
        """Inverse of ``as_dict``; raises TypeError or ValueError for unknown values."""
        known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        if known.get("mirror", "none") not in MIRRORS:
            raise ValueError(f"mirror: {known['mirror']!r:.40} must be one of {', '.join(MIRRORS)}")
        return cls(**known)


def fit_to_input(pixels: Pixels, spec: InputSpec) -> Pixels:
    """The (height, width, 3) uint8 input of the network for one decoded image."""
    scaled = resize_with_pillow if spec.resizer == "pillow" else resize
    if spec.fit == "squash":
        return scaled(pixels, spec.height, spec.width, spec.interpolation)
    if spec.fit == "crop":
        return scaled(pixels, spec.height, spec.width, spec.interpolation, box=_center_box(pixels, spec))
    return _pad(pixels, spec, scaled)


def resize(
    pixels: Pixels,
    height: int,
    width: int,
    interpolation: str = "bilinear",
    box: tuple[float, float, float, float] | None = None,
) -> Pixels:
    """Antialiased resize of uint8 (H, W, 3) to (height, width, 3), the quick way.

    Args:
        box: left, top, width, height in source pixels (fractions allowed) to take instead of the whole image.
    """
    if box is None and pixels.shape[:2] == (height, width):
        return pixels
    left, top, box_width, box_height = box or (0, 0, pixels.shape[1], pixels.shape[0])
    # Left to itself it works from top to bottom first. Pillow works from left to right first, and rounds in between: in
    # that order one pixel in a hundred differs from Pillow's, by one level, in the other one in six, at no less cost.
    narrow = _pass(pixels, pixels.shape[0], width, interpolation, (left, 0, box_width, pixels.shape[0]))
    return _pass(narrow, height, width, interpolation, (0, top, width, box_height))


def smaller(pixels: Pixels, side: int) -> Pixels:
    """Pixels (H, W, 3) whose long side has at most ``side`` pixels."""
    scale = min(1.0, side / max(pixels.shape[:2]))
    height, width = (max(1, round(n * scale)) for n in pixels.shape[:2])
    return resize(np.ascontiguousarray(pixels), height, width)


def resize_with_pillow(
    pixels: Pixels,
    height: int,
    width: int,
    interpolation: str = "bilinear",
    box: tuple[float, float, float, float] | None = None,
) -> Pixels:
    """The same as :func:`resize`, by Pillow."""
    from PIL import Image

    if box is None and pixels.shape[:2] == (height, width):
        return pixels
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    corners = None if box is None else (box[0], box[1], box[0] + box[2], box[1] + box[3])
    return np.asarray(Image.fromarray(pixels).resize((width, height), filters[interpolation], corners))


def _pass(
    pixels: Pixels, height: int, width: int, interpolation: str, box: tuple[float, float, float, float]
) -> Pixels:
    source = ImageData(pixels.shape[1], pixels.shape[0], PixelType.U8x3, pixels.tobytes())
    target = ImageData(width, height, PixelType.U8x3)
    options = ResizeOptions(
        resize_alg=ResizeAlg.convolution(_FILTERS[interpolation]), crop_box=CropBox(*box), use_alpha=False
    )
    _resizer().resize(source, target, options)
    return np.frombuffer(target.get_buffer(), np.uint8).reshape(height, width, 3)


def _resizer() -> Any:
    if not hasattr(_LOCAL, "resizer"):
        _LOCAL.resizer = QuickResizer()
    return _LOCAL.resizer


def _center_box(pixels: Pixels, spec: InputSpec) -> tuple[float, float, float, float]:
    height, width = pixels.shape[:2]
    scale = min(height / spec.height, width / spec.width) * spec.crop_fraction
    box_height, box_width = min(height, spec.height * scale), min(width, spec.width * scale)
    return (width - box_width) / 2, (height - box_height) / 2, box_width, box_height


def _pad(pixels: Pixels, spec: InputSpec, scaled: Callable[..., Pixels]) -> Pixels:
    height, width = pixels.shape[:2]
    scale = min(spec.height / height, spec.width / width)
    inner_height = min(spec.height, max(1, round(height * scale)))
    inner_width = min(spec.width, max(1, round(width * scale)))
    canvas = np.empty((spec.height, spec.width, 3), np.uint8)
    canvas[:] = spec.background
    top, left = (spec.height - inner_height) // 2, (spec.width - inner_width) // 2
    inner = scaled(pixels, inner_height, inner_width, spec.interpolation)
    canvas[top : top + inner_height, left : left + inner_width] = inner
    return canvas
