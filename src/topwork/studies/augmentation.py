"""What each kind of augmentation brings here: heads on frozen features of augmented views, and the grid of views.

Every training image is seen as it is and in two random views; the head is judged on the held-out images as they are.
Once with few images a class, where there is most to gain, and once with all.
"""

from __future__ import annotations

import numpy as np

from topwork.blocks import Bars, Grid, Table
from topwork.data.augment import pipeline, stream
from topwork.data.images import decode
from topwork.data.transforms import Pixels, fit_to_input
from topwork.features.embed import Embedder, Features
from topwork.features.engine import load_engine
from topwork.features.views import asked_views, with_views
from topwork.models.backbone import Backbone
from topwork.studies.bench import Bench, Bools
from topwork.studies.study import Findings, Measured
from topwork.studies.words import difference
from topwork.text import join_names, points

SIDE, QUICK_SIDE = 160, 48
N_TRAIN, QUICK_TRAIN = 320, 40
VIEWS = 2
FEW = 4  # images a class
KINDS = ("flip", "mild-crop", "random-resized-crop", "rotation", "color-jitter", "standard", "trivial")
QUICK_KINDS = ("flip", "random-resized-crop", "color-jitter")
N_SHOWN, VIEWS_SHOWN = 1, 6


def run(bench: Bench) -> Findings:
    """The study."""
    backbone = bench.scaled(bench.side(SIDE, QUICK_SIDE))
    features = bench.features(backbone)
    kinds = QUICK_KINDS if bench.quick else KINDS
    train = bench.train[: QUICK_TRAIN if bench.quick else N_TRAIN]
    sizes = {"few": train[: FEW * len(bench.classes)], "all": train}
    answers: dict[str, dict[str, Bools]] = {size: {} for size in sizes}
    for size, rows in sizes.items():
        answers[size]["none"] = bench.judged(bench.probe(features, rows), features)
    for kind in kinds:
        bench.say(f"augmentation: {kind}")
        for size, rows in sizes.items():
            answers[size][kind] = _with(bench, backbone, features, rows, kind)
    return Findings(
        sentences=tuple(_sentence(size, len(sizes[size]), found, bench.seed) for size, found in answers.items()),
        parts=(
            *(
                Bars(
                    f"{size.capitalize()} training images: {len(sizes[size])}", "accuracy on held-out images",
                    tuple((kind, Measured.of(right)) for kind, right in found.items()),
                )
                for size, found in answers.items()
            ),
            Table(
                "Against none", ("augmentation", "few images", "all images"),
                tuple((kind, *(_change(found["none"], found[kind], bench.seed) for found in answers.values())) for kind in kinds),
                "Change of accuracy in points, with its paired 95 % interval.",
            ),
            _views(bench, backbone, kinds),
        ),
        values={"accuracy": {size: {kind: float(right.mean()) for kind, right in found.items()} for size, found in answers.items()}},
        facts=bench.facts(side=backbone.spec.height, views=VIEWS, n_train=len(train)),
    )  # fmt: skip


def _with(bench: Bench, backbone: Backbone, features: Features, rows: np.ndarray, kind: str) -> Bools:
    """Right or wrong, of a head that also saw views of the training images."""
    embedder = Embedder(backbone, load_engine(backbone, "torch" if bench.quick else "auto"), features.store)
    views = with_views(
        bench.manifest, features, bench.labels, np.arange(len(bench.labels)).tolist(), rows, embedder,
        asked_views(kind, VIEWS), bench.seed, bench.settings.workers,
    )  # fmt: skip
    head = bench.probe_with(views.features, views.labels, views.rows, views.groups)
    return bench.judged(head, features)


def _sentence(size: str, n: int, found: dict[str, Bools], seed: int) -> str:
    gains = {kind: difference(found["none"], right, seed) for kind, right in found.items() if kind != "none"}
    better = [kind for kind, gain in gains.items() if gain.is_clear and gain.value > 0]
    worse = [kind for kind, gain in gains.items() if gain.is_clear and gain.value < 0]
    best = max(gains, key=lambda kind: gains[kind].value)
    which = f"With {size} images" if size == "few" else "With all images"
    facts = f"{which} ({n}), the best augmentation is {best}: {points(gains[best].value)} points ({points(gains[best].low)} to {points(gains[best].high)})"
    if not better and not worse:
        return f"{facts}. No clear difference from none, for any of {len(gains)} kinds."
    told = [f"{join_names(better)} clearly help" if better else "none clearly helps"]
    told += [f"{join_names(worse)} clearly harm"] if worse else []
    return (
        f"{facts}. Of {len(gains)} kinds, {', '.join(told)}; each was tested by itself, so one in twenty may be luck."
    )


def _change(none: Bools, right: Bools, seed: int) -> str:
    gain = difference(none, right, seed)
    return f"{points(gain.value)} ({points(gain.low)} to {points(gain.high)})"


def _views(bench: Bench, backbone: Backbone, kinds: tuple[str, ...]) -> Grid:
    """What the network sees of one image: as it is, and in random views of each kind."""
    row = int(bench.train[0])
    spec, sample = backbone.spec, bench.manifest.samples[row]
    pixels = decode(bench.manifest.read(row), min_side=spec.min_side).pixels
    rows: list[tuple[str, tuple[Pixels, ...]]] = [("none", (fit_to_input(pixels, spec),))]
    for kind in kinds:
        made = pipeline(kind)
        shown = (made.view(pixels, spec, stream(bench.seed, view, sample.content_hash)) for view in range(VIEWS_SHOWN))
        rows.append((kind, tuple(shown)))
    return Grid("What the network sees", ("",) * VIEWS_SHOWN, tuple(rows))
