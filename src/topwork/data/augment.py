"""Random views of an image for training: named pipelines of torchvision v2 operations, from mild to strong.

In: decoded pixels, an InputSpec and a stream of random numbers. Out: uint8 pixels of the input size. What a view looks
like depends on (seed, epoch, sample) and on nothing else: not on workers, threads, batch size or order. For that the
random numbers are drawn here, from a generator of the sample's own, and torchvision only carries the operations out;
its own transforms draw from torch's global generator, whose order of use threads would change.

Crops are taken from the decoded image with the resizer of all other steps, not from the shrunk input, so they stay
sharp. Validation, test and prediction never come here: they use :func:`~topwork.data.transforms.fit_to_input`.

The names are the same wherever views are made: for the probe, in tuning, on the page of ``topwork scan``.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from topwork.data.transforms import InputSpec, Pixels, fit_to_input, resize
from topwork.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

Box = tuple[float, float, float, float]
CROP_MARGIN = (
    1.15  # images that are kept for cropping are larger than the input by this factor, so that crops stay sharp
)
_CROP_TRIES = 10  # torchvision's: so many boxes are drawn before the largest centered one is taken


class Step(Protocol):
    """One random change to an input-sized image."""

    def __call__(self, pixels: Pixels, rng: np.random.Generator, spec: InputSpec) -> Pixels:
        """The changed image, of the same shape."""


@dataclass(frozen=True)
class ResizedCrop:
    """torchvision's ``RandomResizedCrop``: a box of random area and aspect ratio, brought to the input size.

    Attributes:
        scale: range of the box's share of the image's area.
        ratio: range of its width by its height, drawn evenly on the logarithm.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def box(self, height: int, width: int, rng: np.random.Generator) -> Box:
        """Left, top, width, height in pixels."""
        for _ in range(_CROP_TRIES):
            area = height * width * rng.uniform(*self.scale)
            aspect = math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                return float(rng.integers(0, width - w + 1)), float(rng.integers(0, height - h + 1)), float(w), float(h)
        return _largest_box(height, width, self.ratio)


@dataclass(frozen=True)
class Flip:
    """A mirror image, left to right or, where ``vertical``, upside down, with this probability."""

    probability: float = 0.5
    vertical: bool = False

    def __call__(self, pixels: Pixels, rng: np.random.Generator, spec: InputSpec) -> Pixels:  # noqa: ARG002
        """The image or its mirror image."""
        if rng.random() >= self.probability:
            return pixels
        return np.ascontiguousarray(pixels[::-1] if self.vertical else pixels[:, ::-1])


@dataclass(frozen=True)
class QuarterTurns:
    """Turned by 0, 90, 180 or 270 degrees; an input that is not square only by 0 or 180, which keep its shape."""

    def __call__(self, pixels: Pixels, rng: np.random.Generator, spec: InputSpec) -> Pixels:
        """The turned image."""
        n_quarters = int(rng.integers(4))
        if spec.height != spec.width:
            n_quarters = 2 * (n_quarters % 2)
        return np.ascontiguousarray(np.rot90(pixels, n_quarters))


@dataclass(frozen=True)
class Rotation:
    """Turned by up to so many degrees either way; the corners show the spec's background."""

    degrees: float = 15.0

    def __call__(self, pixels: Pixels, rng: np.random.Generator, spec: InputSpec) -> Pixels:
        """The turned image."""
        from torchvision.transforms.v2 import InterpolationMode, functional

        angle = float(rng.uniform(-self.degrees, self.degrees))
        turned = functional.rotate(
            _tensor(pixels), angle, interpolation=InterpolationMode.BILINEAR, fill=[float(c) for c in spec.background]
        )
        return _pixels(turned)


@dataclass(frozen=True)
class ColorJitter:
    """torchvision's ``ColorJitter``: brightness, contrast, saturation and hue, in random order.

    Attributes:
        brightness, contrast, saturation: the factor is drawn from 1 - x to 1 + x.
        hue: shift as a share of the color circle, at most 0.5.
    """

    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    hue: float = 0.0

    def __call__(self, pixels: Pixels, rng: np.random.Generator, spec: InputSpec) -> Pixels:  # noqa: ARG002
        """The image in other light."""
        from torchvision.transforms.v2 import functional

        changes = {
            functional.adjust_brightness: 1 + self.brightness * rng.uniform(-1, 1),
            functional.adjust_contrast: 1 + self.contrast * rng.uniform(-1, 1),
            functional.adjust_saturation: 1 + self.saturation * rng.uniform(-1, 1),
            functional.adjust_hue: self.hue * rng.uniform(-1, 1),
        }
        if not self.hue:  # the only slow one
            del changes[functional.adjust_hue]
        image, in_order = _tensor(pixels), list(changes.items())
        for number in rng.permutation(len(in_order)):
            change, amount = in_order[number]
            image = change(image, max(0.0, amount) if change is not functional.adjust_hue else amount)
        return _pixels(image)


@dataclass(frozen=True)
class TrivialAugment:
    """TrivialAugment Wide (Müller & Hutter 2021, arXiv 2103.10158): one of 14 operations at one of 31 strengths.

    The operations, their ranges and their execution are torchvision's ``TrivialAugmentWide``; only the draw is ours.
    """

    n_strengths: int = 31

    def __call__(self, pixels: Pixels, rng: np.random.Generator, spec: InputSpec) -> Pixels:
        """The image after one operation."""
        from torchvision.transforms.v2 import InterpolationMode, TrivialAugmentWide

        fill = [float(c) for c in spec.background]
        torchvision_one = TrivialAugmentWide(self.n_strengths, InterpolationMode.BILINEAR, fill)
        names = list(torchvision_one._AUGMENTATION_SPACE)
        name = names[rng.integers(len(names))]
        strengths, signed = torchvision_one._AUGMENTATION_SPACE[name]
        table = strengths(self.n_strengths, *pixels.shape[:2])
        strength = 0.0 if table is None else float(table[int(rng.integers(self.n_strengths))])
        if signed and rng.random() < 0.5:
            strength = -strength
        return _pixels(
            torchvision_one._apply_image_or_video_transform(
                _tensor(pixels), name, strength, InterpolationMode.BILINEAR, torchvision_one._fill
            )
        )


@dataclass(frozen=True)
class Pipeline:
    """What makes views: at most one crop, then steps on the input-sized image.

    Attributes:
        name: what was asked for, parts joined by ``+``.
    """

    name: str
    crop: ResizedCrop | None = None
    steps: tuple[Step, ...] = ()

    @property
    def margin(self) -> float:
        """How many times the input's size prepared images should have."""
        return 1.0 if self.crop is None else CROP_MARGIN

    def view(self, pixels: Pixels, spec: InputSpec, rng: np.random.Generator) -> Pixels:
        """One random view of decoded pixels (H, W, 3): uint8 (height, width, 3)."""
        if self.crop is None:
            image = fit_to_input(pixels, spec)
        else:
            box = self.crop.box(pixels.shape[0], pixels.shape[1], rng)
            image = resize(pixels, spec.height, spec.width, spec.interpolation, box=box)
        for step in self.steps:
            image = step(image, rng, spec)
        return image


PIPELINES = {
    "none": Pipeline("none"),
    "light": Pipeline("light", ResizedCrop((0.8, 1.0), (0.9, 1.11)), (Flip(),)),
    "standard": Pipeline("standard", ResizedCrop((0.35, 1.0)), (Flip(), ColorJitter())),
    "trivial": Pipeline("trivial", ResizedCrop((0.35, 1.0)), (Flip(), TrivialAugment())),
    # For pictures without an up and down, from above or under a microscope: mild crops, flips both ways, quarter turns.
    "geometric": Pipeline(
        "geometric", ResizedCrop((0.8, 1.0), (0.9, 1.11)), (Flip(), Flip(vertical=True), QuarterTurns())
    ),
    # The parts that tutorials name, with the values they use; joined by + they make any of the tutorials' pipelines.
    "random-resized-crop": Pipeline("random-resized-crop", ResizedCrop()),
    "mild-crop": Pipeline("mild-crop", ResizedCrop((0.8, 1.0))),
    "flip": Pipeline("flip", None, (Flip(),)),
    "vertical-flip": Pipeline("vertical-flip", None, (Flip(vertical=True),)),
    "quarter-turns": Pipeline("quarter-turns", None, (QuarterTurns(),)),
    "rotation": Pipeline("rotation", None, (Rotation(),)),
    "color-jitter": Pipeline("color-jitter", None, (ColorJitter(0.4, 0.4, 0.4, 0.1),)),
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
                f"--augment {name}: there is no {piece.strip() or 'empty name'!r}. "
                f"Use one of {', '.join(PIPELINES)}, or several joined by +, such as random-resized-crop+flip."
            )
        parts.append(PIPELINES[piece.strip()])
    crops = [part.crop for part in parts if part.crop is not None]
    if len(crops) > 1:
        raise UsageError(f"--augment {name}: {len(crops)} of these crop the image; keep one.")
    steps = tuple(step for part in parts for step in part.steps)
    return Pipeline("+".join(part.name for part in parts), crops[0] if crops else None, steps)


def stream(seed: int, epoch: int, sample: str | int) -> np.random.Generator:
    """The random numbers of one sample in one epoch.

    Args:
        sample: what names the sample; with its content hash, the layout of the data set does not matter either.
    """
    digest = hashlib.sha256(f"{seed} {epoch} {sample}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def _largest_box(height: int, width: int, ratio: tuple[float, float]) -> Box:
    """The largest centered box whose aspect ratio is in range."""
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = (width, round(width / aspect)) if width / height < aspect else (round(height * aspect), height)
    w, h = min(max(1, w), width), min(max(1, h), height)
    return (width - w) / 2, (height - h) / 2, float(w), float(h)


def _tensor(pixels: Pixels) -> Tensor:
    import torch

    # A copy: what comes from the resizer is read-only, and torch has no such thing.
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def _pixels(image: Any) -> Pixels:
    return np.ascontiguousarray(image.numpy().transpose(1, 2, 0))
