"""A summary of a dataset before training, for ``topwork scan``, and the shortcut check.

In: a manifest, its traits, duplicates and groups. Out: :class:`Overview`, plain values for the terminal, JSON and the
page; in it :class:`ShortcutCheck`: for each family of metadata (file size, compression, border, ...), the
cross-validated accuracy of a small classifier with a 95% confidence interval, compared with chance.

A family leads to a warning if its skill, relative to chance and a perfect classifier, is above one half (lower end of
the interval), and, for facts about how an image was made rather than what it shows, also if they identify a single
class. Dimensions never lead to a warning about a single class, because the network sees all images at one size.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topwork.data.manifest import Manifest, exact_duplicates
from topwork.data.split import Split
from topwork.data.traits import TraitTable
from topwork.evaluation.intervals import balanced_accuracy_interval, wilson
from topwork.features.duplicates import NearDuplicates
from topwork.text import count, first_names, percent

OUTLIER_SPREADS = 3.5  # robust standard deviations from the median (Iglewicz & Hoaglin 1993)
MAX_LISTED = 50
CUT_OFF = 0.1  # share of an image that a center crop may cut off without a note
STRETCHED = 2.0  # ratio of the sides above which squashing distorts objects
# Of the shortcut check.
MIN_IMAGES = 10  # per class, without duplicates, to be included
MAX_IMAGES = 1200  # enough for intervals of a few points
MAX_CLASSES = 100
WARN_SKILL = 0.5  # relative to chance (0) and a perfect classifier (1)
WARN_CLASS = 0.7  # minimum recall and precision (lower ends) to identify a single class
N_FOLDS, N_TREES = 5, 16
# Facts about how an image was made, not about its content, so they should not depend on the class.
_MAKING = ("compression", "format", "camera", "border")


@dataclass(frozen=True)
class ClassFacts:
    """One class: its count, and medians with the middle 90% of size and aspect ratio (width by height)."""

    n: int
    parts: dict[str, int]
    width: tuple[float, float, float]
    height: tuple[float, float, float]
    aspect: tuple[float, float, float]


@dataclass(frozen=True)
class FitAdvice:
    """The recommended resize mode for images of these shapes, with the reason."""

    fit: str
    reason: str


@dataclass(frozen=True)
class Overview:
    """The results of ``topwork scan``, named as in its JSON; rows are those of the manifest.

    Attributes:
        duplicates: groups of rows with identical files.
        near_duplicates: groups of rows that show the same picture; None if not searched for.
        leaks: pairs of rows with the same picture or group in different parts of a predefined split.
        outliers: ``path`` and ``value`` of ``dark``, ``bright`` and ``blurred`` images, the most unusual first.
    """

    class_facts: dict[str, ClassFacts]
    formats: dict[str, int]
    n_gray: int
    n_turned_by_exif: int
    cameras: dict[str, int]
    imbalance: float
    duplicates: list[list[int]]
    near_duplicates: list[list[int]] | None
    near_duplicates_recall: float | None
    leaks: list[tuple[int, int]]
    outliers: dict[str, list[dict[str, Any]]]
    n_smaller_than_input: int
    suggested_fit: FitAdvice
    shortcuts: ShortcutCheck

    def as_dict(self, manifest: Manifest) -> dict[str, Any]:
        """Plain values for JSON, rows as paths."""
        groups = {key: getattr(self, key) for key in ("duplicates", "near_duplicates", "leaks")}
        paths = {
            key: None if rows is None else [[manifest.samples[row].path for row in some] for some in rows]
            for key, rows in groups.items()
        }
        return asdict(self) | paths | {"shortcuts": self.shortcuts.as_dict()}


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
    brightness = traits.column("brightness")
    share = np.clip(brightness / 255, 0.002, 0.998)
    unbounded = np.asarray(np.log(share / (1 - share)), np.float32)  # so that black and white can be outliers
    return Overview(
        class_facts=_class_facts(manifest),
        formats=dict(Counter(sample.format for sample in samples).most_common()),
        n_gray=sum(sample.is_gray for sample in samples),
        n_turned_by_exif=sum(sample.orientation != 1 for sample in samples),
        cameras=dict(cameras.most_common(10)),
        imbalance=round(max(counts.values()) / min(counts.values()), 2),
        duplicates=exact_duplicates(manifest.samples),
        near_duplicates=None if near is None else _joined(near),
        near_duplicates_recall=near.recall if near else None,
        leaks=list(parts.leaks) if parts is not None else [],
        outliers={
            "dark": _far_below(manifest, unbounded, brightness),
            "bright": _far_below(manifest, -unbounded, brightness, from_highest=True),
            "blurred": _blurred(manifest, traits),
        },
        n_smaller_than_input=sum(min(sample.width, sample.height) < input_side / 2 for sample in samples),
        suggested_fit=advise_fit(np.array([sample.width / sample.height for sample in samples])),
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
    if len(found.class_facts) == 1 and not manifest.multi_label:
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
    if found.n_turned_by_exif:
        lines.append(f"Rotated upright according to EXIF: {count(found.n_turned_by_exif, 'image')}.")
    if found.n_smaller_than_input:
        lines.append(f"Smaller than half the input size: {count(found.n_smaller_than_input, 'image')}.")
    for name, outliers in found.outliers.items():
        if outliers:
            lines.append(
                f"Unusually {name}: {count(len(outliers), 'image')}, such as {first_names([o['path'] for o in outliers], 2)}."
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


def _far_below(
    manifest: Manifest, scale: NDArray[np.float32], values: NDArray[np.float32], *, from_highest: bool = False
) -> list[dict[str, Any]]:
    """The images far below the median on a scale, with their values, sorted by these."""
    median = np.median(scale)
    spread = 1.4826 * np.median(abs(scale - median))
    rows = np.flatnonzero(scale < median - OUTLIER_SPREADS * max(float(spread), 1e-6)).tolist()
    rows.sort(key=lambda row: -values[row] if from_highest else values[row])
    return [{"path": manifest.samples[row].path, "value": round(float(values[row]), 4)} for row in rows[:MAX_LISTED]]


def _blurred(manifest: Manifest, traits: TraitTable) -> list[dict[str, Any]]:
    """Outliers in log sharpness, which is roughly symmetric; images without any contrast are not blurred."""
    sharpness = traits.column("sharpness")
    known = traits.column("contrast") > 4
    if not known.any():
        return []
    logarithm = np.log(np.maximum(sharpness, 1e-5))
    logarithm[~known] = np.median(logarithm[known])
    return _far_below(manifest, logarithm, sharpness)


# ---- shortcuts


@dataclass(frozen=True)
class FamilyCheck:
    """How well one family of metadata predicts the label.

    Attributes:
        balanced_accuracy: cross-validated; ``low`` and ``high`` are its 95% confidence interval, ``chance`` that of
            guessing.
        given_away: classes that the metadata identifies.
    """

    family: str
    facts: str
    balanced_accuracy: float
    low: float
    high: float
    chance: float
    given_away: tuple[str, ...]
    warning: str | None


@dataclass(frozen=True)
class ShortcutCheck:
    """The check of all families, strongest first; ``reason`` says why there is none."""

    families: tuple[FamilyCheck, ...]
    n_images: int
    n_classes: int
    reason: str | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences on shortcuts, for the scan."""
        return tuple(family.warning for family in self.families if family.warning)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"warnings": list(self.warnings)}


FACTS = {
    "file size": "bytes, and bytes per pixel",
    "dimensions": "width, height, aspect ratio",
    "format": "file format, color mode, stored as grayscale",
    "compression": "JPEG quantization, subsampling, progressive or not",
    "camera": "camera and orientation in EXIF",
    "mean color": "mean red, green, blue and contrast",
    "border": "color and uniformity of the outermost pixels",
    "background": "coarse colors of the outer half of the image",
}


def check_shortcuts(manifest: Manifest, traits: TraitTable, groups: Sequence[int], seed: int = 0) -> ShortcutCheck:
    """Cross-validates a small classifier on each family of metadata.

    Args:
        traits: of the manifest's samples.
        groups: (N,) group of each row; groups are never split across folds.
    """
    if manifest.multi_label:
        return ShortcutCheck((), 0, 0, "not checked for images with several labels")
    rows, folds = _chosen(manifest, np.asarray(groups), seed)
    labels, names = _labels(manifest, rows)
    if len(names) < 2:
        return ShortcutCheck(
            (), len(rows), len(names), f"needs two classes with at least {MIN_IMAGES} different images each"
        )
    columns = fact_columns(manifest, traits)
    checks = [_check(name, columns[name][rows], labels, names, folds, seed) for name in FACTS]
    checks.sort(key=lambda check: (check.warning is None, -check.low))
    return ShortcutCheck(tuple(checks), len(rows), len(names))


def fact_columns(manifest: Manifest, traits: TraitTable) -> dict[str, NDArray[np.float32]]:
    """(N, k) numbers of each family, in the order of FACTS."""
    samples = manifest.samples
    width, height, n_bytes = (
        np.array([getattr(s, key) for s in samples], float) for key in ("width", "height", "n_bytes")
    )
    column = traits.column
    outer = np.ones(traits.colors.shape[1:3], dtype=bool)
    outer[2:-2, 2:-2] = False
    colors = traits.colors.astype(np.float32)
    families = {
        "file size": [np.log(np.maximum(n_bytes, 1)), np.log(np.maximum(n_bytes, 1) / (width * height))],
        "dimensions": [width, height, width / height],
        "format": [
            _codes([s.format for s in samples]),
            _codes([s.mode for s in samples]),
            [s.is_gray for s in samples],
        ],
        "compression": [column("jpeg_level"), column("jpeg_subsampling"), column("jpeg_progressive")],
        "camera": [_codes(traits.cameras), [s.orientation for s in samples]],
        "mean color": [*colors.mean((1, 2)).T, column("contrast")],
        "border": [column(f"border_{name}") for name in ("red", "green", "blue", "spread")],
        "background": [*colors[:, outer].reshape(len(samples), -1).T],
    }
    return {name: np.stack([np.asarray(values, np.float32) for values in families[name]], 1) for name in FACTS}


def _check(
    family: str,
    columns: NDArray[np.float32],
    labels: NDArray[np.int64],
    names: Sequence[str],
    folds: NDArray[np.int64],
    seed: int,
) -> FamilyCheck:
    n = np.bincount(labels, minlength=len(names))
    predicted = _predicted(columns, labels, folds, seed)
    right = np.bincount(labels[predicted == labels], minlength=len(names))
    interval = balanced_accuracy_interval(right, n)
    chance = 1 / len(names)
    given = np.bincount(predicted, minlength=len(names))
    is_given_away = [
        wilson(r / a, a).low >= WARN_CLASS and wilson(r / g, g).low >= WARN_CLASS if g else False
        for r, a, g in zip(right, n, given, strict=True)
    ]
    away = tuple(name for name, given_away in zip(names, is_given_away, strict=True) if given_away)
    check = FamilyCheck(
        family, FACTS[family], float((right / n).mean()), interval.low, interval.high, chance, away, None
    )
    return replace(check, warning=_warning(check))


def _predicted(
    columns: NDArray[np.float32], labels: NDArray[np.int64], folds: NDArray[np.int64], seed: int
) -> NDArray[np.int64]:
    """(N,) cross-validated predictions; constant if the facts are the same for all images."""
    from sklearn.ensemble import ExtraTreesClassifier
    from sklearn.model_selection import PredefinedSplit, cross_val_predict

    if (columns == columns[0]).all():
        return np.zeros_like(labels)
    model = ExtraTreesClassifier(N_TREES, min_samples_leaf=2, class_weight="balanced", random_state=seed)
    return np.asarray(cross_val_predict(model, columns, labels, cv=PredefinedSplit(folds)), np.int64)


def _warning(check: FamilyCheck) -> str | None:
    skill = (check.low - check.chance) / (1 - check.chance)
    figures = (
        f"balanced accuracy {percent(check.balanced_accuracy, 0)} (95% CI {100 * check.low:.0f}–{100 * check.high:.0f}), "
        f"chance {percent(check.chance, 0)}"
    )
    if skill >= WARN_SKILL:
        return f"The label can be predicted from {check.family} alone ({check.facts}): {figures}."
    if check.given_away and check.family in _MAKING:
        return f"Recognizable from {check.family} alone ({check.facts}): {first_names(list(check.given_away))}."
    return None


# ---- which images


def _chosen(manifest: Manifest, groups: NDArray[Any], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Selected rows of each large enough class, and their folds: one image per group, because copies have the same facts."""
    hashes = [sample.content_hash for sample in manifest.samples]
    by_label: dict[str, dict[int, int]] = defaultdict(dict)
    for row in sorted(range(len(hashes)), key=hashes.__getitem__):
        by_label[manifest.samples[row].label].setdefault(int(groups[row]), row)
    large = sorted(
        (label for label in by_label if len(by_label[label]) >= MIN_IMAGES), key=lambda x: (-len(by_label[x]), x)
    )[:MAX_CLASSES]
    n_each = max(MIN_IMAGES, MAX_IMAGES // max(1, len(large)))

    def lot(row: int) -> bytes:
        return hashlib.sha256(f"{seed} {hashes[row]}".encode()).digest()

    drawn = [sorted(by_label[label].values(), key=lot)[:n_each] for label in large]
    rows = [row for own in drawn for row in own]
    folds = [number % N_FOLDS for own in drawn for number in range(len(own))]
    return np.array(rows, np.int64), np.array(folds, np.int64)


def _labels(manifest: Manifest, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], list[str]]:
    present = {manifest.samples[row].label for row in rows}
    names = [name for name in manifest.classes if name in present]
    index = {name: number for number, name in enumerate(names)}
    return np.array([index[manifest.samples[row].label] for row in rows], np.int64), names


def _codes(values: Sequence[str]) -> NDArray[np.int64]:
    return np.asarray(np.unique(np.array(values, dtype=str), return_inverse=True)[1])
