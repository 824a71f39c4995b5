"""Which augmentations help: heads on frozen features of augmented views, with few and with all training images.

The head is trained on each image and two random views of it, and evaluated on unchanged held-out images.
"""

from __future__ import annotations

from topwork.blocks import Grid, Table
from topwork.data.augment import pipeline, stream
from topwork.data.images import decode
from topwork.data.transforms import Pixels, fit_to_input
from topwork.features.embed import Features
from topwork.features.probe import fit_probe
from topwork.features.views import asked_views, with_views
from topwork.models.backbone import Backbone
from topwork.studies.bench import Bench, Bools, Ints
from topwork.studies.study import Findings, accuracies, accuracy_bars, best_of, difference

VIEWS, VIEWS_SHOWN = 2, 6
FEW = 4  # images per class
KINDS = ("flip", "mild-crop", "random-resized-crop", "rotation", "color-jitter", "standard", "trivial")
QUICK_KINDS = ("flip", "random-resized-crop", "color-jitter")


def run(bench: Bench) -> Findings:
    """Runs the study."""
    backbone, kinds = bench.scaled(160, 48), bench.pick(KINDS, QUICK_KINDS)
    features, train = bench.features(backbone), bench.train[: bench.pick(320, 40)]
    answers: dict[str, dict[str, Bools]] = {}
    for rows in (train[: FEW * len(bench.classes)], train):
        found = {"none": bench.correct(bench.probe(features, rows), features)}
        for kind in kinds:
            bench.reporter.step(f"augmentation: {kind}, {len(rows)} images")
            found[kind] = _with_views(bench, backbone, features, rows, kind)
        answers[f"{len(rows)} training images"] = found
    gains = [(k, *(str(difference(a["none"], a[k], bench.seed)) for a in answers.values())) for k in kinds]
    return Findings(
        sentences=tuple(f"With {size}. {best_of(found, bench.seed)}" for size, found in answers.items()),
        parts=(
            *(accuracy_bars(size, found) for size, found in answers.items()),
            Table(
                "Gain over no augmentation",
                ("augmentation", *answers),
                tuple(gains),
                "Change in accuracy with its paired 95% CI. With this many comparisons, about one in twenty is significant by chance.",
            ),
            _views(bench, backbone, kinds),
        ),
        values={"accuracy": {size: accuracies(found) for size, found in answers.items()}},
        facts=bench.facts(side=backbone.spec.height, views=VIEWS, n_train=len(train)),
    )


def _with_views(bench: Bench, backbone: Backbone, features: Features, rows: Ints, kind: str) -> Bools:
    """(n_held_out,) right or wrong, of a head that also saw views of the training images."""
    seen = with_views(
        bench.manifest, features, rows, bench.embedder(backbone, features.store), asked_views(kind, VIEWS), bench.seed,
        bench.settings.workers,
    )  # fmt: skip
    probe = fit_probe(
        seen,
        bench.labels,
        len(bench.classes),
        rows=rows,
        groups=range(len(bench.labels)),
        head="plain",
        seed=bench.seed,
    )
    return bench.correct(probe, features)


def _views(bench: Bench, backbone: Backbone, kinds: tuple[str, ...]) -> Grid:
    """What the network sees of one image: unchanged, and in random views of each kind."""
    row, spec = int(bench.train[0]), backbone.spec
    pixels = decode(bench.manifest.read(row), min_side=spec.min_side).pixels
    rows: list[tuple[str, tuple[Pixels, ...]]] = [("none", (fit_to_input(pixels, spec),))]
    for kind in kinds:
        streams = [stream(bench.seed, view, bench.manifest.samples[row].content_hash) for view in range(VIEWS_SHOWN)]
        rows.append((kind, tuple(pipeline(kind).view(pixels, spec, one) for one in streams)))
    return Grid("What the network sees", ("",) * VIEWS_SHOWN, tuple(rows))
