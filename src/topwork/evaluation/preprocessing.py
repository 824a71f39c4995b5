"""Checks whether the preprocessing stored with a model is the one its weights were trained with.

In: a backbone or a classifier and images. Out: how well each common normalization fits. Wrong statistics are a common
silent error (the embedded Lite weights use 0.5, nearly all others ImageNet's values), which a new head hides by
adapting to the distorted features. But each batch norm stores the mean and variance of its inputs in training (Ioffe &
Szegedy 2015, arXiv 1502.03167).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from topwork.data.transforms import InputSpec, Pixels
from topwork.models.backbone import Backbone

Triple = tuple[float, float, float]
# Measured for the embedded lite0 on two sets of photos: 0.01 to 0.03 with the right values, 0.4 to 1.9 with ImageNet's
# or none. Different photos change the misfit by much less than these limits.
GOOD_MISFIT, CLEARLY_WORSE = 0.15, 4.0


@dataclass(frozen=True)
class Normalization:
    """Means and standard deviations for pixels in 0..1, with their usual name."""

    name: str
    mean: Triple
    std: Triple

    def is_that_of(self, spec: InputSpec) -> bool:
        """Whether an input spec has this normalization."""
        return bool(np.allclose([*self.mean, *self.std], [*spec.mean, *spec.std], atol=1e-3))


IMAGENET = Normalization("ImageNet mean and std", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = Normalization("mean 0.5, std 0.5", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
UNIT = Normalization("pixels from 0 to 1", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
CLIP = Normalization("CLIP mean and std", (0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758))
BYTES = Normalization("pixels from 0 to 255", (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))
USUAL = (IMAGENET, HALF, UNIT, CLIP, BYTES)


def declared(spec: InputSpec) -> Normalization:
    """The normalization of an input spec, with its common name if it has one."""
    return next(
        (way for way in USUAL if way.is_that_of(spec)), Normalization("the declared values", spec.mean, spec.std)
    )


def alternatives(spec: InputSpec) -> tuple[Normalization, ...]:
    """The common normalizations that are clearly different from the declared one."""
    return tuple(n for n in USUAL if np.abs(np.subtract(n.mean, spec.mean)).max() > 0.05 or _far(n.std, spec.std))


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


def _far(a: Triple, b: Triple) -> bool:
    return bool(np.abs(np.log(np.divide(a, b))).max() > 0.2)
