"""Adapting to a new domain: gain, harm, seconds, and how well accuracy is predicted without labels.

    python benchmarks/adapt.py ../shared/data --seeds 5

Features of the embedded lite0 come from the store (the first run embeds). For every seed 70 % of the source's images
train a head, the other 30 % judge it; the target is 70 % of its images drawn by the seed. After that all is array
work: the guard rails choose without labels, and one head for both domains is judged on target and source.

Pairs: photo and art painting both ways; a half of a set against its other half, as it is, and made gray, blurred,
small, or a sketch; targets of an uneven class mix, of one class, of ten images; targets of other classes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageFilter, ImageOps

from topwork.adaptation.adapted_head import distil
from topwork.adaptation.align import N_SAMPLE, STYLES, Domains, clamped, nearest_style
from topwork.adaptation.expected import expected_recall, predicted_accuracy
from topwork.adaptation.guards import choose
from topwork.data.manifest import scan
from topwork.evaluation.predictions import softmax
from topwork.features.embed import Embedder
from topwork.features.engine import load_engine
from topwork.features.logistic import SoftmaxRegression
from topwork.models.backbone import load_backbone

PENALTY = 3e-3


def sketch(image: Image.Image) -> Image.Image:
    """Dark lines on white, as a pencil would draw the borders."""
    gray = ImageOps.grayscale(image)
    return ImageOps.invert(ImageChops.difference(gray, gray.filter(ImageFilter.GaussianBlur(3)))).point(
        lambda v: 255 if v > 245 else max(0, 3 * v - 510)
    )


def styled(style):
    """A restyling of arrays as one of Pillow images."""
    return lambda image: Image.fromarray(style(np.asarray(image)[None])[0])


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "gray": ImageOps.grayscale,
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(4)),
    "small": lambda image: image.resize((48, 48)),
    "sketch": sketch,
    **{name: styled(style) for name, style in STYLES.items() if name not in ("gray", "blurred")},
}


@dataclass(frozen=True)
class Set:
    """Features (N, D), labels (N,) and class names."""

    features: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    def take(self, rows):
        """Some of the images."""
        return replace(self, features=self.features[rows], labels=self.labels[rows])


class Sets:
    """Embedded sets by name; changed ones are written to a temporary folder."""

    def __init__(self, data: Path) -> None:
        self.data = data
        backbone = load_backbone("lite0")
        self.embedder = Embedder(backbone, load_engine(backbone))
        self.known: dict[tuple[str, str], Set] = {}

    def __call__(self, name: str, change: str = "") -> Set:
        """A set, as it is or changed."""
        if (name, change) not in self.known:
            if change:
                with tempfile.TemporaryDirectory() as folder:
                    self.known[name, change] = self._embedded(self._changed(name, change, Path(folder)))
            else:
                self.known[name, change] = self._embedded(self.data / name)
        return self.known[name, change]

    def _embedded(self, path: Path) -> Set:
        manifest = scan(path, visitor=self.embedder)
        self.embedder.flush()
        features = self.embedder.store.load([s.content_hash for s in manifest.samples], "last")
        return Set(features.astype(np.float32), np.array(manifest.labels), manifest.classes)

    def _changed(self, name: str, change: str, folder: Path) -> Path:
        manifest = scan(self.data / name)
        for sample in manifest.samples:
            place = (folder / sample.path).with_suffix(".png")
            place.parent.mkdir(parents=True, exist_ok=True)
            image = Image.open(manifest.root / sample.path).convert("RGB")
            image.thumbnail((256, 256))
            CHANGES[change](image).save(place)
        return folder


@dataclass(frozen=True)
class Case:
    """A source and a target."""

    name: str
    source: Set
    target: Set
    same_classes: bool = True
    styled: dict[str, Set] | None = None  # the source's images in other looks


def halves(n: int, seed: int):
    order = np.random.default_rng([seed, 3]).permutation(n)
    return order[: n // 2], order[n // 2 :]


def cases(sets: Sets, seed: int, quick: bool) -> Iterator[Case]:
    """All pairs of a seed. The two halves of a set never share an image."""
    rng = np.random.default_rng(seed)
    photo, art = sets("pacs-mini/photo"), sets("pacs-mini/art_painting")
    for a, b, name in ((photo, art, "photo > art"), (art, photo, "art > photo")):
        yield Case(name, a, some(b, 0.7, rng))
        yield Case(f"{name}, uneven mix", a, uneven(b, rng))
        yield Case(f"{name}, three classes", a, b.take(np.isin(b.labels, rng.permutation(7)[:3])))
        yield Case(f"{name}, one class", a, b.take(b.labels == rng.integers(7)))
        yield Case(f"{name}, ten images", a, b.take(rng.permutation(len(b.labels))[:10]))
    for name in ("pacs-mini/photo", "caltech-mini", "ants-bees"):
        whole = sets(name)
        a, b = halves(len(whole.labels), seed)
        yield Case(f"{name} > other half", whole.take(a), whole.take(b))
        for change in () if quick or name == "ants-bees" else ("gray", "blurred", "small", "sketch"):
            yield Case(f"{name} > {change}", whole.take(a), sets(name, change).take(b))
    for style in ("line drawings", "flat colors"):
        a, b = halves(len(photo.labels), seed)
        styled = {name: sets("pacs-mini/photo", name).take(a) for name in STYLES}
        yield Case(f"photo > own {style}", photo.take(a), sets("pacs-mini/photo", style).take(b), styled=styled)
    for a, b, name in ((photo, art, "photo > art"), (art, photo, "art > photo")):
        path = "pacs-mini/photo" if a is photo else "pacs-mini/art_painting"
        styled = {style: sets(path, style) for style in STYLES}
        yield Case(f"{name}, restyled", a, some(b, 0.7, np.random.default_rng(seed)), styled=styled)
    for a, b in (("pacs-mini/photo", "caltech-mini"), ("pacs-mini/photo", "ants-bees"), ("caltech-mini", "ants-bees"),
                 ("caltech-mini", "pacs-mini/photo"), ("pacs-mini/art_painting", "caltech-mini"),
                 ("pacs-mini/art_painting", "ants-bees"), ("ants-bees", "pacs-mini/photo")):  # fmt: skip
        yield Case(f"{a} > {b} (other classes)", sets(a), some(sets(b), 0.7, rng), False)
    caltech, some_classes, order = (
        sets("caltech-mini"),
        np.random.default_rng([seed, 7]).permutation(7),
        rng.permutation(20),
    )
    yield Case("caltech-mini, ten > other ten (other classes)", of(caltech, order[:10]), of(caltech, order[10:]), False)
    for target, name in ((photo, "photo"), (art, "art")):
        four, rest = of(photo, some_classes[:4]), of(target, some_classes[4:])
        yield Case(f"photo, four > {name}, other three (other classes)", four, rest, False)
    yield Case("photo, four > art, same four", of(photo, some_classes[:4]), of(art, some_classes[:4]))


def of(whole: Set, classes) -> Set:
    """The images of some classes, which are all that there are then."""
    classes = np.sort(classes)
    kept = whole.take(np.isin(whole.labels, classes))
    return replace(kept, labels=np.searchsorted(classes, kept.labels), classes=tuple(whole.classes[c] for c in classes))


def some(whole: Set, share: float, rng) -> Set:
    return whole.take(np.sort(rng.permutation(len(whole.labels))[: int(share * len(whole.labels))]))


def uneven(whole: Set, rng) -> Set:
    """Class sizes fall to a twelfth of the largest."""
    counts = np.bincount(whole.labels)
    kept = (counts * rng.permutation(np.geomspace(1, 1 / 12, len(counts)))).astype(int)
    return whole.take(np.concatenate([np.flatnonzero(whole.labels == c)[: max(1, n)] for c, n in enumerate(kept)]))


def source_head(x, y, n_classes):
    """A plain logistic regression, as the probe fits it."""
    mean, scale = x.mean(0), x.std(0) + 1e-2 * np.sqrt(x.var(0).mean())
    problem = SoftmaxRegression((x - mean) / scale, y, n_classes, np.ones((1, len(y))))
    for penalty in (0.3, 0.03, PENALTY):
        problem.solve(penalty, tolerance=1e-4, max_steps=100)
    weight, bias = problem.solution()
    weight = weight[0] / scale
    return np.vstack([weight.T, bias[0] - weight @ mean])


def judge(case: Case, seed: int, n_labels: int = 0) -> dict[str, float]:
    """Everything measured on one pair."""
    rng = np.random.default_rng([seed, 5])
    order = rng.permutation(len(case.source.labels))
    train, held = np.split(order, [int(0.7 * len(order))])
    n_classes = len(case.source.classes)
    x, y, t, truth = case.source.features, case.source.labels, case.target.features, case.target.labels
    head = source_head(x[train], y[train], n_classes)
    known = np.full(len(t), -1)
    for label in range(n_classes if n_labels else 0):
        own = rng.permutation(np.flatnonzero(truth == label))[:n_labels]
        known[own] = label
    domains = Domains(x[train], y[train], t, known, n_classes)
    given = softmax(t @ head[:-1] + head[-1])
    started = time.perf_counter()
    restyled = None
    if case.styled is not None:
        sample = train[:N_SAMPLE]
        style = nearest_style(x[sample], {name: found.features[sample] for name, found in case.styled.items()}, t)
        restyled = style and (style, case.styled[style].features[train])
    choice = choose(domains, given, seed=seed, restyled=restyled or None)
    after = head
    if choice.outcome == "adapted":
        eye = np.eye(n_classes)
        rows = np.flatnonzero(known >= 0) if choice.method == "labels only" else np.arange(len(t))
        after = distil(x[train], eye[y[train]], t[rows], clamped(choice.probabilities, known)[rows], PENALTY)
    seconds = time.perf_counter() - started
    judged = np.flatnonzero(known < 0)  # labels that were given are no achievement
    answers = [(t @ h[:-1] + h[-1]).argmax(1) for h in (head, after)]
    expected = (predicted_accuracy(answers[0], choice.votes) + given.max(1).mean()) / 2
    return {
        "before": 100 * (answers[0] == truth)[judged].mean() if case.same_classes and len(judged) else np.nan,
        "after": 100 * (answers[1] == truth)[judged].mean() if case.same_classes and len(judged) else np.nan,
        "source_before": 100 * ((x[held] @ head[:-1] + head[-1]).argmax(1) == y[held]).mean(),
        "source_after": 100 * ((x[held] @ after[:-1] + after[-1]).argmax(1) == y[held]).mean(),
        "expected": 100 * expected,
        "expected_after": 100 * predicted_accuracy(answers[1], choice.votes),
        "seconds": seconds,
        "adapted": choice.outcome == "adapted",
        "refused": choice.outcome == "refused",
        "class_method": choice.method + (f" [{restyled[0]}]" if restyled else ""),
        "class_errors": class_errors(truth, answers[0], choice.votes) if case.same_classes else [],
        "class_errors_after": class_errors(truth, answers[1], choice.votes) if case.same_classes else [],
    }


def class_errors(truth, answers, consensus) -> list[float]:
    """Expected recall minus true recall, in points, of each class with at least ten images."""
    errors = []
    for label in range(consensus.shape[1]):
        own, expected = truth == label, expected_recall(answers, consensus, label)
        if own.sum() >= 10 and expected is not None:
            errors.append(100 * float(expected - (answers == label)[own].mean()))
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--labels", type=int, default=0, help="labels a class of the target")
    parser.add_argument("--quick", action="store_true", help="no changed images")
    parser.add_argument("--only", default="", help="pairs whose name begins with this")
    asked = parser.parse_args()
    sets = Sets(asked.data)
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(asked.seeds):
        for case in cases(sets, seed, asked.quick):
            if case.name.startswith(asked.only):
                found.setdefault(case.name, []).append(judge(case, seed, asked.labels))
        print(f"seed {seed} done", flush=True)
    print(f"{'pair':44s} adapted refused  before  after   gain (95 % of seeds)  least  source before after  seconds")
    for name, rows in found.items():
        column = {key: np.array([row[key] for row in rows], float) for key in rows[0] if "class" not in key}
        gain = column["after"] - column["before"]
        half = 1.96 * gain.std(ddof=1) / np.sqrt(len(gain)) if len(gain) > 1 else np.nan
        print(
            f"{name:44s} {column['adapted'].mean():7.0%} {column['refused'].mean():7.0%} {column['before'].mean():7.1f} "
            f"{column['after'].mean():6.1f}  {gain.mean():+5.1f} ({gain.mean() - half:+.1f} to {gain.mean() + half:+.1f})"
            f"  {gain.min():+5.1f}  {column['source_before'].mean():6.1f} {column['source_after'].mean():6.1f}"
            f"  {column['seconds'].mean():.1f}"
        )
    everything = [row for rows in found.values() for row in rows if not np.isnan(row["before"])]
    errors = np.array([[r["expected"] - r["before"], r["expected_after"] - r["after"]] for r in everything])
    print(
        f"Predicted accuracy, mean absolute error: before {abs(errors[:, 0]).mean():.1f} points, after {abs(errors[:, 1]).mean():.1f}"
    )
    by_class = [np.concatenate([row[key] for row in everything]) for key in ("class_errors", "class_errors_after")]
    print(
        f"Expected recall of a class ({len(by_class[0])} classes of pairs and seeds): before {abs(by_class[0]).mean():.1f}, "
        f"after {abs(by_class[1]).mean():.1f}"
    )


if __name__ == "__main__":
    main()
