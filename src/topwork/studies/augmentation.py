"""What each kind of augmentation brings: heads on frozen features of augmented views, and the grid of views.

Every training image is seen unchanged and in two random views; the head is evaluated on unchanged held-out images. Once with
few images per class, where there is most to gain, and once with all.
"""

from __future__ import annotations

import numpy as np

from topwork.blocks import Grid, Table
from topwork.data.augment import pipeline, stream
from topwork.data.images import decode
from topwork.data.transforms import Pixels, fit_to_input
from topwork.features.embed import Features
from topwork.features.views import asked_views, with_views
from topwork.models.backbone import Backbone
from topwork.studies.bench import Bench, Bools, Ints
from topwork.studies.study import Findings, accuracies, accuracy_bars, difference
from topwork.text import join_names

SIDE, QUICK_SIDE = 160, 48
N_TRAIN, QUICK_TRAIN = 320, 40
VIEWS = 2
FEW = 4  # images per class
KINDS = ("flip", "mild-crop", "random-resized-crop", "rotation", "color-jitter", "standard", "trivial")
QUICK_KINDS = ("flip", "random-resized-crop", "color-jitter")
VIEWS_SHOWN = 6


def run(bench: Bench) -> Findings:
    """The study."""
    backbone = bench.scaled(bench.side(SIDE, QUICK_SIDE))
    features, kinds = bench.features(backbone), QUICK_KINDS if bench.quick else KINDS
    train = bench.train[: QUICK_TRAIN if bench.quick else N_TRAIN]
    sizes = {"few": train[: FEW * len(bench.classes)], "all": train}
    answers = {s: {"none": bench.correct(bench.probe(features, rows), features)} for s, rows in sizes.items()}
    for kind in kinds:
        bench.say(f"augmentation: {kind}")
        for size, rows in sizes.items():
            answers[size][kind] = _with(bench, backbone, features, rows, kind)
    return Findings(
        sentences=tuple(_sentence(size, len(sizes[size]), found, bench.seed) for size, found in answers.items()),
        parts=(
            *(
                accuracy_bars(f"{s.capitalize()} training images: {len(sizes[s])}", found)
                for s, found in answers.items()
            ),
            Table(
                "Against none",
                ("augmentation", "few images", "all images"),
                tuple((k, *(str(difference(a["none"], a[k], bench.seed)) for a in answers.values())) for k in kinds),
                "Change of accuracy with its paired 95% interval.",
            ),
            _views(bench, backbone, kinds),
        ),
        values={"accuracy": {size: accuracies(found) for size, found in answers.items()}},
        facts=bench.facts(side=backbone.spec.height, views=VIEWS, n_train=len(train)),
    )


def _with(bench: Bench, backbone: Backbone, features: Features, rows: Ints, kind: str) -> Bools:
    """(n_held_out,) right or wrong, of a head that also saw views of the training images."""
    views = with_views(
        bench.manifest, features, bench.labels, np.arange(len(bench.labels)).tolist(), rows, bench.embedder(backbone, features.store),
        asked_views(kind, VIEWS), bench.seed, bench.settings.workers,
    )  # fmt: skip
    return bench.correct(bench.probe_with(views.features, views.labels, views.rows, views.groups), features)


def _sentence(size: str, n: int, found: dict[str, Bools], seed: int) -> str:
    gains = {kind: difference(found["none"], right, seed) for kind, right in found.items() if kind != "none"}
    better = [kind for kind, gain in gains.items() if gain.is_clear and gain.value > 0]
    worse = [kind for kind, gain in gains.items() if gain.is_clear and gain.value < 0]
    best = max(gains, key=lambda kind: gains[kind].value)
    facts = f"With {size} images ({n}), the best augmentation is {best}: {gains[best]}"
    if not better and not worse:
        return f"{facts}. None of {len(gains)} kinds differs significantly from none."
    helps = f"{join_names(better)} significantly better" if better else "none significantly better"
    harms = f", {join_names(worse)} significantly worse" if worse else ""
    return (
        f"{facts}. Of {len(gains)} kinds, {helps}{harms}; each was tested separately, so one in twenty may be chance."
    )


def _views(bench: Bench, backbone: Backbone, kinds: tuple[str, ...]) -> Grid:
    """What the network sees of one image: unchanged, and in random views of each kind."""
    row = int(bench.train[0])
    spec, sample = backbone.spec, bench.manifest.samples[row]
    pixels = decode(bench.manifest.read(row), min_side=spec.min_side).pixels
    rows: list[tuple[str, tuple[Pixels, ...]]] = [("none", (fit_to_input(pixels, spec),))]
    for kind in kinds:
        streams = (stream(bench.seed, view, sample.content_hash) for view in range(VIEWS_SHOWN))
        rows.append((kind, tuple(pipeline(kind).view(pixels, spec, one) for one in streams)))
    return Grid("What the network sees", ("",) * VIEWS_SHOWN, tuple(rows))
