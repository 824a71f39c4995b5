"""Perturbations that remove color, detail, shape, the object, the background or the upright orientation, and normalizations.

In: uint8 (N, H, W, 3) of the network's input size. Out: the same shape; deterministic, and independent of other images.
``PERTURBATIONS`` lists them in display order. Another normalization is also a change of the images, to float pixels.
Wrong statistics are a common silent error (the embedded Lite weights use 0.5, nearly all others ImageNet's values),
which a new head hides by adapting to the distorted features. But each batch norm stores the mean and variance of its
inputs in training (Ioffe & Szegedy 2015, arXiv 1502.03167), which :func:`statistics_fit` compares.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from topwork.data.transforms import InputSpec, Pixels, resize
from topwork.models.backbone import Backbone

Box = tuple[int, int, int, int]  # top, bottom, left, right in pixels
PATCHES = 4  # per side, for the shuffle
_GRAY = np.array([0.299, 0.587, 0.114], np.float32)  # luma of ITU-R BT.601
Triple = tuple[float, float, float]
# Measured for the embedded lite0 on two sets of photos: 0.01 to 0.03 with the right values, 0.4 to 1.9 with ImageNet's
# or none. Different photos change the misfit by much less than these limits.
GOOD_MISFIT, CLEARLY_WORSE = 0.15, 4.0


@dataclass(frozen=True)
class Perturbation:
    """One way to change images.

    Attributes:
        name: stable identifier, for programs.
        done: the change, followed by "…, accuracy is".
        about: what is removed, after "the model relies on …".
        make: (N, H, W, 3) to (N, H, W, 3).
    """

    name: str
    group: str
    title: str
    done: str
    about: str
    make: Callable[[Pixels], NDArray[Any]]


def gray(images: Pixels) -> Pixels:
    """Brightness only."""
    luma = (images @ _GRAY).round().astype(np.uint8)
    return np.repeat(luma[..., None], 3, axis=3)


def swap_channels(images: Pixels) -> Pixels:
    """Swaps red and blue, as when RGB and BGR are confused."""
    return np.ascontiguousarray(images[..., ::-1])


def blur(images: Pixels, share: float) -> Pixels:
    """Gaussian blur; the standard deviation is a share of the side."""
    return _bytes(_blurred(images, share))


def high_pass(images: Pixels, share: float = 0.01) -> Pixels:
    """Fine detail only, in grayscale: what a blur removes."""
    luma = gray(images)
    return _bytes(luma - _blurred(luma, share) + np.float32(127))


def shuffle_patches(images: Pixels, n: int = PATCHES, seed: int = 0) -> Pixels:
    """Shuffles n × n patches, none in its original place: keeps texture, removes shape."""
    changed = images.copy()
    height, width = images.shape[1] // n, images.shape[2] // n
    spots = [np.s_[r * height : (r + 1) * height, c * width : (c + 1) * width] for r in range(n) for c in range(n)]
    for number, image in enumerate(images):
        order = _derangement(n * n, np.random.default_rng([seed, number]))
        for spot, source in zip(spots, order, strict=True):
            changed[number][spot] = image[spots[source]]
    return changed


def edges(images: Pixels) -> Pixels:
    """Outlines as dark lines on white: shape and fine structure without color and shading."""
    luma = _blurred(gray(images)[..., :1], 0.004)[..., 0]
    rows, columns = np.gradient(luma, axis=(1, 2))
    strength = np.hypot(rows, columns)
    strength /= np.maximum(np.quantile(strength, 0.97, axis=(1, 2), keepdims=True), 1e-3)
    return _bytes(np.repeat((255 * (1 - np.clip(strength, 0, 1)))[..., None], 3, axis=3))


def silhouettes(images: Pixels) -> Pixels:
    """A rough black silhouette on white: what differs in color from the border of the image.

    Only accurate for an object on a plain background.
    """
    from scipy.ndimage import binary_fill_holes, binary_opening

    smooth = _blurred(images, 0.01)
    changed = np.empty_like(images)
    for number, image in enumerate(smooth):
        margin = max(2, image.shape[0] // 20)
        ring = np.ones(image.shape[:2], np.bool_)
        ring[margin:-margin, margin:-margin] = False
        border = image[ring].astype(np.float64)
        covariance = np.cov(border.T) + 25 * np.eye(3)
        away = image - border.mean(0)
        distance = np.sqrt(np.einsum("hwc,cd,hwd->hw", away, np.linalg.inv(covariance), away))
        inside = binary_fill_holes(binary_opening(distance > _otsu(distance), iterations=2))
        changed[number] = np.where(inside[..., None], 0, 255)
    return changed


def hide_center(images: Pixels) -> Pixels:
    """Fills the middle half of the area with the mean color of the image."""
    return hide_box(images, _center(images.shape[1:3]))


def hide_surround(images: Pixels) -> Pixels:
    """Fills everything except the middle half of the area with the mean color of the image."""
    top, bottom, left, right = _center(images.shape[1:3])
    hidden = hide_box(images, (0, *images.shape[1:2], 0, *images.shape[2:3]))
    hidden[:, top:bottom, left:right] = images[:, top:bottom, left:right]
    return hidden


def hide_box(images: Pixels, box: Box) -> Pixels:
    """Fills a box with the mean color of each image."""
    top, bottom, left, right = box
    hidden = images.copy()
    hidden[:, top:bottom, left:right] = images.mean((1, 2), keepdims=True).round()
    return hidden


def quarter_turn(images: Pixels, n: int = 1) -> Pixels:
    """Rotates by n times 90 degrees, and resizes if the input is not square."""
    turned = np.ascontiguousarray(np.rot90(images, n, axes=(1, 2)))
    height, width = images.shape[1:3]
    return turned if turned.shape == images.shape else np.stack([resize(image, height, width) for image in turned])


def tilt(images: Pixels, degrees: float = 15.0) -> Pixels:
    """Rotates slightly around the center; edge pixels are repeated in the corners."""
    from scipy.ndimage import rotate

    turned = [rotate(image, degrees, reshape=False, order=1, mode="nearest") for image in images]
    return np.stack(turned)


def compress(images: Pixels, quality: int) -> Pixels:
    """Compresses as JPEG and decodes again."""
    files = (simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=quality) for image in images)
    return np.stack([simplejpeg.decode_jpeg(file) for file in files])


def shrink(images: Pixels, factor: int) -> Pixels:
    """Downscales and upscales again, as if the image had that many times fewer pixels per side."""
    height, width = images.shape[1:3]
    small = (resize(image, max(1, height // factor), max(1, width // factor)) for image in images)
    return np.stack([resize(image, height, width) for image in small])


def lighten(images: Pixels, factor: float) -> Pixels:
    """Brightens (above 1) or darkens (below 1)."""
    return _bytes(images * np.float32(factor))


def add_noise(images: Pixels, spread: float = 25.0, seed: int = 0) -> Pixels:
    """Adds Gaussian noise, the same for all images."""
    noise = np.random.default_rng(seed).normal(0, spread, images.shape[1:]).astype(np.float32)
    return _bytes(images + noise)


PERTURBATIONS = (
    Perturbation("gray", "color", "Grayscale", "Without color", "color", gray),
    Perturbation("swap", "color", "Red and blue swapped", "With red and blue swapped", "correct colors", swap_channels),
    Perturbation("blur", "detail", "Blurred", "Blurred", "fine detail", lambda x: blur(x, 0.01)),
    Perturbation("low_pass", "detail", "Low-pass filtered", "With coarse structure only", "detail", lambda x: blur(x, 0.03)),
    Perturbation("high_pass", "detail", "High-pass filtered", "With fine detail only", "coarse shapes and colors", high_pass),
    Perturbation("shuffle", "shape", "Patches shuffled", "With shuffled patches", "global shape", shuffle_patches),
    Perturbation("silhouette", "shape", "Silhouette", "With silhouettes only", "what is inside the outline", silhouettes),
    Perturbation("edges", "shape", "Edges", "With edges only", "color and texture", edges),
    Perturbation("no_center", "place", "Center masked", "With the center masked", "the center of the image", hide_center),
    Perturbation("no_surround", "place", "Background masked", "With the background masked", "the background", hide_surround),
    Perturbation("flip", "view", "Flipped", "With a horizontal flip", "left and right", lambda x: np.ascontiguousarray(x[:, :, ::-1])),
    Perturbation("tilt", "view", "Rotated by 15°", "Rotated by 15°", "an upright view", tilt),
    Perturbation("turn", "view", "Rotated by 90°", "Rotated by 90°", "an upright view", quarter_turn),
    Perturbation("upside_down", "view", "Upside down", "Upside down", "an upright view", lambda x: quarter_turn(x, 2)),
    Perturbation("jpeg30", "quality", "JPEG quality 30", "At JPEG quality 30", "clean pixels", lambda x: compress(x, 30)),
    Perturbation("jpeg10", "quality", "JPEG quality 10", "At JPEG quality 10", "clean pixels", lambda x: compress(x, 10)),
    Perturbation("half", "quality", "Half the resolution", "At half the resolution", "resolution", lambda x: shrink(x, 2)),
    Perturbation("quarter", "quality", "A quarter of the resolution", "At a quarter of the resolution", "resolution", lambda x: shrink(x, 4)),
    Perturbation("dark", "quality", "Half as bright", "At half the brightness", "good lighting", lambda x: lighten(x, 0.5)),
    Perturbation("bright", "quality", "Overexposed", "Overexposed", "good lighting", lambda x: lighten(x, 1.7)),
    Perturbation("noise", "quality", "Noise", "With sensor noise", "clean pixels", add_noise),
)  # fmt: skip


# ---- helpers


def _bytes(values: NDArray[np.float32]) -> Pixels:
    return np.asarray(np.clip(values + np.float32(0.5), 0, 255), np.uint8)


def _blurred(images: Pixels, share: float) -> NDArray[np.float32]:
    from scipy.ndimage import gaussian_filter

    sigma = share * min(images.shape[1:3])
    blurred = gaussian_filter(images.astype(np.float32), (0, sigma, sigma, 0), mode="nearest", truncate=3.0)
    return np.asarray(blurred, np.float32)


def _center(shape: tuple[int, ...]) -> Box:
    """The box in the middle that holds half of the area."""
    side = float(np.sqrt(0.5))
    (top, bottom), (left, right) = ((round(n * (1 - side) / 2), round(n * (1 + side) / 2)) for n in shape)
    return top, bottom, left, right


def _derangement(n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """A random permutation without fixed points."""
    while True:
        order = rng.permutation(n)
        if (order != np.arange(n)).all():
            return np.asarray(order, np.int64)


def _otsu(values: NDArray[np.float64]) -> float:
    """The threshold that best separates values into two classes (Otsu 1979)."""
    counts, bounds = np.histogram(values, bins=64)
    middles, total = (bounds[:-1] + bounds[1:]) / 2, counts.sum()
    below = np.cumsum(counts)
    sums = np.cumsum(counts * middles)
    above = total - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(bounds[1 + int(np.nanargmax(between[:-1]))])


# ---- normalization
@dataclass(frozen=True)
class Normalization:
    """Means and standard deviations for pixels in 0..1, with their usual name."""

    name: str
    mean: Triple
    std: Triple


IMAGENET = Normalization("ImageNet mean and std", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = Normalization("mean 0.5, std 0.5", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
UNIT = Normalization("pixels from 0 to 1", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
CLIP = Normalization("CLIP mean and std", (0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758))
BYTES = Normalization("pixels from 0 to 255", (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))
USUAL = (IMAGENET, HALF, UNIT, CLIP, BYTES)


def declared(spec: InputSpec) -> Normalization:
    """The normalization of an input spec, with its common name if it has one."""
    known = (way for way in USUAL if np.allclose([way.mean, way.std], [spec.mean, spec.std], atol=1e-3))
    return next(known, Normalization("the declared values", spec.mean, spec.std))


def alternatives(spec: InputSpec) -> tuple[Normalization, ...]:
    """The common normalizations that are clearly different from the declared one."""

    def is_far(way: Normalization) -> bool:
        far_std = np.abs(np.log(np.divide(way.std, spec.std))).max() > 0.2
        return bool(np.abs(np.subtract(way.mean, spec.mean)).max() > 0.05 or far_std)

    return tuple(filter(is_far, USUAL))


def renormalized(spec: InputSpec, other: Normalization) -> Callable[[Pixels], NDArray[np.float32]]:
    """Pixel values that, after the normalization of ``spec``, are those of the images after ``other``.

    They are not integers and not between 0 and 255.
    """
    mean, std, spec_mean, spec_std = (np.array(v, np.float32) for v in (other.mean, other.std, spec.mean, spec.std))

    def make(images: Pixels) -> NDArray[np.float32]:
        values = (images / np.float32(255) - mean) / std * spec_std + spec_mean
        return np.asarray(values * np.float32(255), np.float32)

    return make


@dataclass(frozen=True)
class Fit:
    """Divergence of the first batch norm's input under a normalization from that in training; 0 is perfect."""

    normalization: Normalization
    misfit: float
    is_declared: bool


def statistics_fit(backbone: Backbone, images: Pixels) -> tuple[Fit, ...]:
    """The misfit of every common normalization and of the declared one, best first; empty without batch norms.

    The misfit is the median over channels of the Kullback-Leibler divergence between two normal distributions: the
    batch norm's stored mean and variance, and those of its input on these images. Needs torch.

    Args:
        images: uint8 (N, H, W, 3); 32 are enough.
    """
    import torch

    network = backbone.module()
    first = next((m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)), None)
    if first is None or first.running_mean is None or first.running_var is None:
        return ()
    stored_mean, stored_variance = first.running_mean.double(), first.running_var.double()
    seen: list[torch.Tensor] = []

    def keep(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(inputs[0])
        raise _SeenEnoughError  # the rest of the network is not needed

    found = []
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
    alive = stored_variance > 1e-3 * stored_variance.median()
    hook = first.register_forward_pre_hook(keep)
    for number, candidate in enumerate([declared(backbone.spec), *alternatives(backbone.spec)]):
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (candidate.mean, candidate.std))
        with torch.inference_mode(), suppress(_SeenEnoughError):
            network((pixels - mean) / std)
        x = seen.pop().double()
        ratio = x.var((0, 2, 3)).clamp_min(1e-12) / stored_variance
        shift = (x.mean((0, 2, 3)) - stored_mean) ** 2
        divergence = 0.5 * (ratio + shift / stored_variance - 1 - ratio.log())
        found.append(Fit(candidate, float(divergence[alive].median()), number == 0))
    hook.remove()
    return tuple(sorted(found, key=lambda fit: fit.misfit))


class _SeenEnoughError(Exception):
    """Ends a forward pass early."""


def misfit_sentence(fits: tuple[Fit, ...]) -> tuple[bool, str] | None:
    """Whether the declared normalization is probably wrong, and a sentence; None if that is unknown."""
    if not fits:
        return None
    own, best = next(fit for fit in fits if fit.is_declared), fits[0]
    if best.misfit > GOOD_MISFIT:  # untrained weights, or statistics of other images than photos
        return None
    if best.is_declared or own.misfit < max(GOOD_MISFIT, CLEARLY_WORSE * best.misfit):
        return False, f"The stored normalization ({_values(own)}) is the one the weights were trained with."
    return True, (
        f"The normalization is probably wrong: the batch-norm statistics inside the weights fit {_values(best)} "
        f"(misfit {best.misfit:.2f}) and not the stored {_values(own)} (misfit {own.misfit:.2f}). "
        "The head was trained on distorted features; retrain it with the correct values."
    )


def _values(fit: Fit) -> str:
    normalization = fit.normalization
    return "mean {}, std {}".format(
        *("/".join(f"{v:.3g}" for v in dict.fromkeys(values)) for values in (normalization.mean, normalization.std))
    )
