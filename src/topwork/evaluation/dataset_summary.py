"""A summary of a dataset before training, for ``topwork scan``.

In: a manifest, its traits, duplicates, groups and shortcuts. Out: :class:`Overview`, plain values for the terminal,
JSON and the page.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topwork.data.manifest import Manifest
from topwork.data.split import Split, exact_duplicates
from topwork.data.traits import TraitTable
from topwork.evaluation.shortcut import ShortcutCheck
from topwork.features.duplicates import NearDuplicates
from topwork.text import count, first_names

OUTLIER_SPREADS = 3.5  # robust standard deviations from the median (Iglewicz & Hoaglin 1993)
MAX_LISTED = 50
CUT_OFF = 0.1  # share of an image that a center crop may cut off without a note
STRETCHED = 2.0  # ratio of the sides above which squashing distorts objects


@dataclass(frozen=True)
class ClassFacts:
    """One class: its count, and medians with the middle 90% of size and aspect ratio (width by height)."""

    n: int
    parts: dict[str, int]
    width: tuple[float, float, float]
    height: tuple[float, float, float]
    aspect: tuple[float, float, float]


@dataclass(frozen=True)
class Outlier:
    """An unusual image; ``value`` is its trait."""

    path: str
    value: float


@dataclass(frozen=True)
class FitAdvice:
    """The recommended resize mode for images of these shapes, with the reason."""

    fit: str
    reason: str


@dataclass(frozen=True)
class Overview:
    """The results of ``topwork scan``; rows are those of the manifest.

    Attributes:
        duplicates: groups of rows with identical files.
        near_duplicates: groups of rows that show the same picture; None if not searched for.
        leaks: pairs of rows with the same picture or group in different parts of a predefined split.
    """

    classes: dict[str, ClassFacts]
    formats: dict[str, int]
    n_gray: int
    n_turned: int
    cameras: dict[str, int]
    imbalance: float
    duplicates: list[list[int]]
    near_duplicates: list[list[int]] | None
    near_duplicates_recall: float | None
    leaks: list[tuple[int, int]]
    dark: list[Outlier]
    bright: list[Outlier]
    blurred: list[Outlier]
    n_small: int
    advice: FitAdvice
    shortcuts: ShortcutCheck

    def as_dict(self, manifest: Manifest) -> dict[str, Any]:
        """Plain values for JSON, rows as paths."""
        path = [sample.path for sample in manifest.samples]
        near = self.near_duplicates
        return {
            "class_facts": {name: asdict(facts) for name, facts in self.classes.items()},
            "formats": self.formats,
            "n_gray": self.n_gray,
            "n_turned_by_exif": self.n_turned,
            "cameras": self.cameras,
            "imbalance": self.imbalance,
            "duplicates": [[path[row] for row in rows] for rows in self.duplicates],
            "near_duplicates": None if near is None else [[path[row] for row in rows] for rows in near],
            "near_duplicates_recall": self.near_duplicates_recall,
            "leaks": [[path[a], path[b]] for a, b in self.leaks],
            "outliers": {
                name: [asdict(outlier) for outlier in getattr(self, name)] for name in ("dark", "bright", "blurred")
            },
            "n_smaller_than_input": self.n_small,
            "suggested_fit": asdict(self.advice),
            "shortcuts": self.shortcuts.as_dict(),
        }


def overview(
    manifest: Manifest,
    traits: TraitTable,
    near: NearDuplicates | None,
    parts: Split | None,
    shortcuts: ShortcutCheck,
    input_side: int = 224,
) -> Overview:
    """Computes the summary.

    Args:
        parts: the predefined split, if any.
        input_side: side of the network's input in pixels.
    """
    samples = manifest.samples
    counts = manifest.counts
    cameras = Counter(camera for camera in traits.cameras if camera)
    return Overview(
        classes=_class_facts(manifest),
        formats=dict(Counter(sample.format for sample in samples).most_common()),
        n_gray=sum(sample.is_gray for sample in samples),
        n_turned=sum(sample.orientation != 1 for sample in samples),
        cameras=dict(cameras.most_common(10)),
        imbalance=round(max(counts.values()) / min(counts.values()), 2),
        duplicates=exact_duplicates(manifest),
        near_duplicates=None if near is None else _joined(near),
        near_duplicates_recall=near.recall if near else None,
        leaks=list(parts.leaks) if parts is not None else [],
        dark=_outliers(manifest, traits.column("brightness"), -1, _far_below(_open_scale(traits.column("brightness")))),
        bright=_outliers(
            manifest, traits.column("brightness"), 1, _far_below(-_open_scale(traits.column("brightness")))
        ),
        blurred=_blurred(manifest, traits),
        n_small=sum(min(sample.width, sample.height) < input_side / 2 for sample in samples),
        advice=advise_fit(np.array([sample.width / sample.height for sample in samples])),
        shortcuts=shortcuts,
    )


def advise_fit(aspects: NDArray[np.float64]) -> FitAdvice:
    """Squash, crop or pad, from the ratios of width by height.

    Squash keeps everything and works best with the default network; it is advised against only if it distorts shapes
    strongly and differently from image to image.
    """
    stretch = np.maximum(aspects, 1 / aspects)
    usual, extreme = float(np.median(stretch)), float(np.quantile(stretch, 0.9))
    low, high = (float(q) for q in np.quantile(aspects, [0.05, 0.95]))
    lost = 1 - 1 / float(np.quantile(stretch, 0.9))
    if lost < 0.005:
        return FitAdvice("squash", "the images are square, so there is nothing to crop or distort")
    if lost <= CUT_OFF:
        return FitAdvice(
            "crop", f"the images are nearly square: a center crop removes at most {100 * lost:.0f}% of nine in ten"
        )
    if high / low > STRETCHED and extreme > STRETCHED:
        return FitAdvice(
            "pad",
            f"aspect ratios range from 1:{1 / low:.1f} to {high:.1f}:1, so squashing would distort some images much more than others",
        )
    return FitAdvice(
        "squash",
        f"a center crop would remove {100 * (1 - 1 / usual):.0f}% of a typical image and {100 * lost:.0f}% of one in ten; "
        "squashing keeps everything",
    )


def findings(manifest: Manifest, found: Overview) -> list[str]:
    """Sentences on what to check, most important first, without the notes of the manifest."""
    lines = list(found.shortcuts.warnings)
    if len(found.classes) == 1 and not manifest.multi_label:
        lines.append("Only one class; a classifier needs at least two.")
    if found.leaks:
        n = len({row for row, _ in found.leaks})
        lines.insert(
            0,
            f"{count(n, 'image')} of valid or test {'is' if n == 1 else 'are'} also in train (the same picture, or one of the same group).",
        )
    if found.near_duplicates:
        n = sum(len(rows) - 1 for rows in found.near_duplicates)
        lines.append(
            f"Near duplicates: {count(n, 'image')} in {count(len(found.near_duplicates), 'group')}, which are kept in one part."
        )
    if found.imbalance > 3:
        lines.append(
            f"The largest class has {found.imbalance:.1f} times as many images as the smallest; see --balance."
        )
    if 0 < found.n_gray < len(manifest.samples):
        lines.append(f"Grayscale: {count(found.n_gray, 'image')}; the others are in color.")
    if found.n_turned:
        lines.append(f"Rotated upright according to EXIF: {count(found.n_turned, 'image')}.")
    if found.n_small:
        lines.append(f"Smaller than half the input size: {count(found.n_small, 'image')}.")
    for name, outliers in (("dark", found.dark), ("bright", found.bright), ("blurred", found.blurred)):
        if outliers:
            lines.append(
                f"Unusually {name}: {count(len(outliers), 'image')}, such as {first_names([o.path for o in outliers], 2)}."
            )
    return lines


# ---- pieces


def _class_facts(manifest: Manifest) -> dict[str, ClassFacts]:
    rows: dict[str, list[int]] = defaultdict(list)
    for row, sample in enumerate(manifest.samples):
        for name in manifest.names_of(sample):
            rows[name].append(row)
    size = np.array([(sample.width, sample.height) for sample in manifest.samples], float)
    parts = [sample.part for sample in manifest.samples]
    found = {}
    for name in manifest.classes:
        width, height = size[rows[name]].T
        counted = Counter(part for row in rows[name] if (part := parts[row]) is not None)
        found[name] = ClassFacts(
            len(rows[name]), dict(counted), _middle(width), _middle(height), _middle(width / height)
        )
    return found


def _middle(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """5%, 50% and 95% quantiles."""
    low, median, high = (round(float(value), 3) for value in np.quantile(values, [0.05, 0.5, 0.95]))
    return low, median, high


def _joined(near: NearDuplicates) -> list[list[int]]:
    """Pairs as groups."""
    group: dict[int, set[int]] = {}
    for pair in near.pairs:
        both = group.get(pair.a, {pair.a}) | group.get(pair.b, {pair.b})
        group.update(dict.fromkeys(both, both))
    return sorted({min(rows): sorted(rows) for rows in group.values()}.values())


def _open_scale(brightness: NDArray[np.float32]) -> NDArray[np.float32]:
    """Gray levels on an unbounded scale (logit), so that black and white can be outliers."""
    share = np.clip(brightness / 255, 0.002, 0.998)
    return np.asarray(np.log(share / (1 - share)), np.float32)


def _far_below(values: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Whether each value is an outlier below the median."""
    median = np.median(values)
    spread = 1.4826 * np.median(abs(values - median))
    return np.asarray(values < median - OUTLIER_SPREADS * max(float(spread), 1e-6))


def _blurred(manifest: Manifest, traits: TraitTable) -> list[Outlier]:
    """Outliers in log sharpness, which is roughly symmetric; images without any contrast are not blurred."""
    sharpness = traits.column("sharpness")
    known = traits.column("contrast") > 4
    if not known.any():
        return []
    logarithm = np.log(np.maximum(sharpness, 1e-5))
    logarithm[~known] = np.median(logarithm[known])
    return _outliers(manifest, sharpness, -1, _far_below(logarithm))


def _outliers(
    manifest: Manifest, values: NDArray[np.float32], direction: int, chosen: NDArray[np.bool_]
) -> list[Outlier]:
    rows: Sequence[int] = sorted(np.flatnonzero(chosen).tolist(), key=lambda row: -direction * float(values[row]))
    return [Outlier(manifest.samples[row].path, round(float(values[row]), 4)) for row in rows[:MAX_LISTED]]
