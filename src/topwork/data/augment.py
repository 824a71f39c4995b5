"""Augmentation: named pipelines of random changes, drawn on the CPU and applied on any device.

In: images a little larger than the input, an InputSpec and a stream of random numbers per sample. Out: uint8 views of the input
size. A view is a :class:`Draw`: everything geometric is one affine map, everything about color one 3×3 matrix and a contrast,
and at most one further operation of torchvision's. Draws depend on (seed, epoch, sample) and on nothing else: not on workers,
threads, batch size or order. :func:`apply` computes a batch of them at once, on the device of the images.

Validation, test and prediction never come here: they use :func:`~topwork.data.transforms.fit_to_input`. The names are the
same for the probe, fine-tuning and the page of ``topwork scan``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from topwork.data.transforms import InputSpec, Pixels, fit_to_input
from topwork.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

Matrix = NDArray[np.float64]
Box = tuple[float, float, float, float]
CROP_MARGIN = 1.15  # prepared images are larger than the input by this factor if they will be cropped, to stay sharp
_CROP_TRIES = 10  # torchvision's: so many boxes are drawn before the largest centered one is taken
_LUMA = np.array([0.299, 0.587, 0.114])  # weights of red, green and blue in gray (ITU-R BT.601)


@dataclass(eq=False)
class Draw:
    """One random view.

    Attributes:
        affine: (3, 3) from output to image coordinates, both -1 to 1 over width and height (torch's ``affine_grid``).
        color: (3, 3) on red, green and blue; then ``contrast`` about the mean gray of the view.
        operation: name and strength of one of the further operations of :data:`TRIVIAL`, done last.
    """

    affine: Matrix = field(default_factory=lambda: np.eye(3))
    color: Matrix = field(default_factory=lambda: np.eye(3))
    contrast: float = 1.0
    operation: tuple[str, float] | None = None

    def place(self, matrix: Sequence[Sequence[float]], spec: InputSpec | None = None) -> None:
        """Adds a map of the view: (2, 3), or (2, 2) in pixels of the input if a spec is given, so that angles are kept."""
        full = np.eye(3)
        full[:2, : len(matrix[0])] = matrix
        if spec is not None:
            size = np.array([spec.width, spec.height, 1.0])
            full = full * size / size[:, None]
        self.affine = self.affine @ full


# A random change: draws it and adds it to the view.
Step = Callable[[Draw, np.random.Generator, InputSpec], None]


@dataclass(frozen=True)
class ResizedCrop:
    """torchvision's ``RandomResizedCrop``: a box of random area and aspect ratio, brought to the input size.

    Attributes:
        scale: range of the box's share of the image's area.
        ratio: range of its width by its height, drawn evenly on the logarithm.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __call__(self, draw: Draw, rng: np.random.Generator, spec: InputSpec) -> None:
        """A box of the prepared image."""
        height, width = spec.height, spec.width
        left, top, w, h = self.box(height, width, rng)
        draw.place([[w / width, 0, (2 * left + w) / width - 1], [0, h / height, (2 * top + h) / height - 1]])

    def box(self, height: int, width: int, rng: np.random.Generator) -> Box:
        """Left, top, width, height in pixels."""
        for _ in range(_CROP_TRIES):
            area = height * width * rng.uniform(*self.scale)
            aspect = math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
            if 1 <= w <= width and 1 <= h <= height:
                return float(rng.uniform(0, width - w)), float(rng.uniform(0, height - h)), w, h
        aspect = min(max(width / height, self.ratio[0]), self.ratio[1])
        w, h = (width, width / aspect) if width / height < aspect else (height * aspect, height)
        return (width - w) / 2, (height - h) / 2, float(w), float(h)


@dataclass(frozen=True)
class Flip:
    """A mirror image, left to right or, if ``vertical``, upside down, with this probability."""

    probability: float = 0.5
    vertical: bool = False

    def __call__(self, draw: Draw, rng: np.random.Generator, spec: InputSpec) -> None:  # noqa: ARG002
        """Flipped or not."""
        if rng.random() < self.probability:
            draw.place([[1, 0], [0, -1]] if self.vertical else [[-1, 0], [0, 1]])


@dataclass(frozen=True)
class QuarterTurns:
    """Turned by 0, 90, 180 or 270 degrees; an input that is not square only by 0 or 180, which keep its shape."""

    def __call__(self, draw: Draw, rng: np.random.Generator, spec: InputSpec) -> None:
        """One of the turns."""
        n_quarters = int(rng.integers(4))
        if spec.height != spec.width:
            n_quarters = 2 * (n_quarters % 2)
        draw.place(np.linalg.matrix_power(np.array([[0, -1], [1, 0]]), n_quarters).tolist())


@dataclass(frozen=True)
class Rotation:
    """Turned by up to so many degrees either way; the corners show the spec's background."""

    degrees: float = 15.0

    def __call__(self, draw: Draw, rng: np.random.Generator, spec: InputSpec) -> None:
        """An angle."""
        draw.place(_rotation(float(rng.uniform(-self.degrees, self.degrees))), spec)


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, saturation, hue and contrast, as in torchvision's ``ColorJitter``.

    Attributes:
        brightness, contrast, saturation: the factor is drawn from 1 - x to 1 + x.
        hue: shift as a share of the color circle, at most 0.5; a rotation about gray in YIQ, which is linear, unlike HSV.
    """

    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    hue: float = 0.0

    def __call__(self, draw: Draw, rng: np.random.Generator, spec: InputSpec) -> None:  # noqa: ARG002
        """Other light."""
        brightness, contrast, saturation = (
            max(0.0, 1 + most * rng.uniform(-1, 1)) for most in (self.brightness, self.contrast, self.saturation)
        )
        draw.color = brightness * _saturation(saturation) @ _hue(self.hue * rng.uniform(-1, 1)) @ draw.color
        draw.contrast *= contrast


@dataclass(frozen=True)
class TrivialAugment:
    """TrivialAugment Wide (Müller & Hutter 2021, arXiv 2103.10158, table 6): one of 14 operations at one of 31 strengths."""

    n_strengths: int = 31

    def __call__(self, draw: Draw, rng: np.random.Generator, spec: InputSpec) -> None:
        """One operation."""
        name = TRIVIAL[int(rng.integers(len(TRIVIAL)))]
        share = float(rng.integers(self.n_strengths)) / (self.n_strengths - 1)
        signed = share if rng.random() < 0.5 else -share
        if name == "rotate":
            draw.place(_rotation(135 * signed), spec)
        elif name.startswith("shear"):
            slope = 0.99 * signed
            draw.place([[1, slope], [0, 1]] if name == "shear-x" else [[1, 0], [slope, 1]], spec)
        elif name.startswith("translate"):
            shift = 2 * 32 / 224 * signed  # 32 pixels of the usual input
            draw.place([[1, 0, shift], [0, 1, 0]] if name == "translate-x" else [[1, 0, 0], [0, 1, shift]])
        elif name == "brightness":
            draw.color = (1 + 0.99 * signed) * draw.color
        elif name == "saturation":
            draw.color = _saturation(1 + 0.99 * signed) @ draw.color
        elif name == "contrast":
            draw.contrast *= 1 + 0.99 * signed
        elif name != "identity":
            draw.operation = name, signed if name == "sharpness" else share


TRIVIAL = (
    "identity", "shear-x", "shear-y", "translate-x", "translate-y", "rotate", "brightness", "saturation", "contrast",
    "sharpness", "posterize", "solarize", "autocontrast", "equalize",
)  # fmt: skip


def _operate(image: Tensor, name: str, strength: float) -> Tensor:
    """The operations of TrivialAugment that are neither affine nor a matrix, on uint8 (3, H, W)."""
    from torchvision.transforms.v2 import functional

    made: Tensor
    if name == "sharpness":
        made = functional.adjust_sharpness(image, 1 + 0.99 * strength)
    elif name == "posterize":
        made = functional.posterize(image, 8 - round(6 * strength))
    elif name == "solarize":
        made = functional.solarize(image, 255 * (1 - strength))
    else:
        made = functional.autocontrast(image) if name == "autocontrast" else functional.equalize(image)
    return made


def _rotation(degrees: float) -> list[list[float]]:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return [[cos, -sin], [sin, cos]]


def _saturation(factor: float) -> Matrix:
    return factor * np.eye(3) + (1 - factor) * np.tile(_LUMA, (3, 1))


def _hue(share: float) -> Matrix:
    """Colors turned by a share of the circle in YIQ; gray stays gray."""
    to_yiq = np.array([_LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    turn = np.eye(3)
    turn[1:, 1:] = _rotation(360 * share)
    return np.asarray(np.linalg.inv(to_yiq) @ turn @ to_yiq)


@dataclass(frozen=True)
class Pipeline:
    """What makes views: steps from left to right, at most one crop.

    Attributes:
        name: what was asked for, parts joined by ``+``.
    """

    name: str
    steps: tuple[Step, ...] = ()

    @property
    def margin(self) -> float:
        """How many times the input's size prepared images should have."""
        return CROP_MARGIN if any(isinstance(step, ResizedCrop) for step in self.steps) else 1.0

    def prepared(self, spec: InputSpec) -> InputSpec:
        """The spec of prepared images."""
        height, width = (math.ceil(side * self.margin) for side in (spec.height, spec.width))
        return replace(spec, height=height, width=width)

    def draw(self, spec: InputSpec, rng: np.random.Generator) -> Draw:
        """One random view."""
        draw = Draw()
        for step in self.steps:
            step(draw, rng, spec)
        return draw

    def view(self, pixels: Pixels, spec: InputSpec, rng: np.random.Generator) -> Pixels:
        """One random view of decoded pixels (H, W, 3): uint8 (height, width, 3)."""
        import torch

        prepared = fit_to_input(pixels, self.prepared(spec))
        if not self.steps:
            return prepared
        made: Pixels = apply(torch.from_numpy(prepared.copy())[None], [self.draw(spec, rng)], spec)[0].numpy()
        return made


def apply(images: Tensor, draws: Sequence[Draw], spec: InputSpec) -> Tensor:
    """A batch of views, computed on the device of the images: the same on CPU and GPU within rounding.

    Args:
        images: (B, h, w, 3) uint8.
        draws: B of them.

    Returns:
        (B, height, width, 3) uint8. What lies outside of an image shows the spec's background.
    """
    import torch
    from torch.nn import functional

    def tensor(values: Any) -> Tensor:
        return torch.tensor(np.asarray(values, np.float32), device=images.device)

    affine = np.stack([draw.affine[:2] for draw in draws])
    grid = _grid(tensor(affine), spec.height, spec.width)
    seen = functional.grid_sample(images.permute(0, 3, 1, 2).float(), grid, padding_mode="border", align_corners=False)
    if (np.abs(affine).sum(2) > 1 + 1e-6).any():  # a corner lies outside
        outside = (grid.abs() > 1).any(-1)[:, None]
        seen = torch.where(outside, tensor(spec.background).view(1, 3, 1, 1), seen)
    if any(draw.contrast != 1 or not np.array_equal(draw.color, np.eye(3)) for draw in draws):
        seen = torch.bmm(tensor([draw.color for draw in draws]), seen.flatten(2)).clamp_(0, 255)
        gray = (seen.mean(2) @ tensor(_LUMA)).view(-1, 1, 1)
        seen = torch.lerp(gray, seen, tensor([draw.contrast for draw in draws]).view(-1, 1, 1)).clamp_(0, 255)
        seen = seen.view(-1, 3, spec.height, spec.width)
    # rounded: whole numbers are cut off after the half is added
    views = seen.add_(0.5).to(torch.uint8)
    for row, draw in enumerate(draws):
        if draw.operation is not None:
            views[row] = _operate(views[row], *draw.operation)
    return views.permute(0, 2, 3, 1).contiguous()


def _grid(affine: Tensor, height: int, width: int) -> Tensor:
    """What ``affine_grid`` gives for (B, 2, 3) maps, (B, height, width, 2), by sums: a fifth of the time on CPUs."""
    import torch

    y, x = ((2 * torch.arange(n, device=affine.device) + 1) / n - 1 for n in (height, width))
    by_x, by_y, shift = affine.unbind(2)
    lines = by_y[:, :, None] * y + shift[:, :, None]
    return torch.addcmul(lines[..., None], by_x[:, :, None, None], x).permute(0, 2, 3, 1)


_LIGHT = ResizedCrop((0.8, 1.0), (0.9, 1.11))
PIPELINES = {
    name: Pipeline(name, steps)
    for name, steps in {
        "none": (),
        "light": (_LIGHT, Flip()),
        "standard": (ResizedCrop((0.35, 1.0)), Flip(), ColorJitter()),
        "trivial": (ResizedCrop((0.35, 1.0)), Flip(), TrivialAugment()),
        # For pictures without an up and down, from above or under a microscope: mild crops, flips both ways, quarter turns.
        "geometric": (_LIGHT, Flip(), Flip(vertical=True), QuarterTurns()),
        # The parts that tutorials name, with the values they use; joined by + they make any of the tutorials' pipelines.
        "random-resized-crop": (ResizedCrop(),),
        "mild-crop": (ResizedCrop((0.8, 1.0)),),
        "flip": (Flip(),),
        "vertical-flip": (Flip(vertical=True),),
        "quarter-turns": (QuarterTurns(),),
        "rotation": (Rotation(),),
        "color-jitter": (ColorJitter(0.4, 0.4, 0.4, 0.1),),
    }.items()
}


def pipeline(name: str) -> Pipeline:
    """The pipeline of this name; names joined by ``+`` are carried out from left to right.

    Raises:
        UsageError: no such name, or two crops.
    """
    parts = []
    for piece in name.lower().split("+"):
        if piece.strip() not in PIPELINES:
            raise UsageError(
                f"--augment {name}: no such augmentation: {piece.strip() or ''!r}. "
                f"Use {', '.join(PIPELINES)}, or several joined by +, such as random-resized-crop+flip."
            )
        parts.append(PIPELINES[piece.strip()])
    steps = tuple(step for part in parts for step in part.steps)
    n_crops = sum(isinstance(step, ResizedCrop) for step in steps)
    if n_crops > 1:
        raise UsageError(f"--augment {name}: {n_crops} of these crop the image; use only one.")
    return Pipeline("+".join(part.name for part in parts), steps)


def stream(seed: int, epoch: int, sample: str | int) -> np.random.Generator:
    """The random numbers of one sample in one epoch.

    Args:
        sample: what names the sample; with its content hash, the layout of the dataset does not matter either.
    """
    digest = hashlib.sha256(f"{seed} {epoch} {sample}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
