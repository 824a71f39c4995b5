"""The page of ``topwork scan --report``.

In: the results of a scan, and the images. Out: one page. Numbers come from ``evaluation/dataset_summary.py``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from topwork.blocks import (
    Bar,
    Beside,
    Block,
    Card,
    Cell,
    Chart,
    Facts,
    Gallery,
    Grid,
    Heading,
    Notes,
    Section,
    Series,
    Share,
    Stack,
    Table,
    Text,
    Tile,
)
from topwork.commands.scan import Surveyed
from topwork.data.augment import Pipeline, pipeline, stream
from topwork.data.images import decode
from topwork.data.loader import in_order
from topwork.data.manifest import Manifest
from topwork.data.transforms import InputSpec, Pixels, fit_to_input
from topwork.errors import ImageError
from topwork.evaluation.dataset_summary import ClassFacts, Overview
from topwork.report.page import render_page
from topwork.report.pictures import MISTAKE, Album
from topwork.report.sections.data import examples, rejected
from topwork.text import count, escape, percent

MAX_ROWS = 1000  # of the table of classes
MAX_DOTS = 3000
MAX_GROUPS, GROUP_PICTURES = 12, 4
OUTLIER_PICTURES = 8
N_VIEWS, N_VIEWED = 5, 8  # augmented views of each image, images
RATIOS = ((-3, "1:8"), (-2, "1:4"), (-1, "1:2"), (-0.585, "2:3"), (0, "1:1"), (0.585, "3:2"), (1, "2:1"), (2, "4:1"), (3, "8:1"))  # fmt: skip


def scan_page(surveyed: Surveyed, augment: str = "standard", seed: int = 0) -> str:
    """The page as text.

    Args:
        augment: the pipeline whose views the example grid shows.

    Raises:
        UsageError: no such pipeline.
    """
    manifest, found, album = surveyed.manifest, surveyed.overview, Album()
    sections = (
        Section("overview", "Overview", _overview(surveyed)),
        Section("classes", "Classes", [*_classes(found), *_examples(manifest, album)]),
        Section("sizes", "Image sizes", _sizes(manifest, found)),
        Section("shortcuts", "Shortcuts", _shortcuts(found)),
        Section("duplicates", "Duplicates and leaks", _duplicates(manifest, found, album)),
        Section("outliers", "Outliers", _outliers(manifest, found, album)),
        Section("augmentation", "Augmentation", _views(surveyed, pipeline(augment), seed)),
        Section("files", "Files", _files(manifest, found)),
    )
    title = manifest.root.name or str(manifest.root)
    return render_page(
        title, "scan", sections, subtitle="Dataset before training", pictures=album.make(surveyed.manifest)
    )


def _overview(surveyed: Surveyed) -> list[Block]:
    manifest, found = surveyed.manifest, surveyed.overview
    near = "–" if found.near_duplicates is None else f"{len(found.near_duplicates):,}"
    is_divided = any(sample.part for sample in manifest.samples)
    rejected = count(len(manifest.rejects), "rejected file")
    facts = (
        ("Images", f"{len(manifest.samples):,}", rejected),
        ("Classes", f"{len(manifest.classes):,}", f"largest / smallest: {found.imbalance:g}"),
        ("Exact duplicates", f"{len(found.duplicates):,}", "groups of identical files"),
        ("Near duplicates", near, "not checked (--quick)" if found.near_duplicates is None else "groups"),
        ("Leaks", f"{len(found.leaks):,}" if is_divided else "–", "images of valid or test that are also in train" if is_divided else "not split yet"),
    )  # fmt: skip
    notes = tuple(escape(line) for line in (*surveyed.findings, *manifest.notes))
    said: Block = Notes(notes, "Check before training") if notes else Text("No problems found.", "lead")
    return [Facts(facts), said]


# ---- classes


def _classes(found: Overview) -> list[Block]:
    parts = sorted({part for facts in found.class_facts.values() for part in facts.parts})
    largest = max(facts.n for facts in found.class_facts.values())
    rows = tuple(_class_row(name, facts, largest, parts) for name, facts in list(found.class_facts.items())[:MAX_ROWS])
    columns = ("Class", "", "Images", *parts, "Median size", "Aspect ratio (middle 90%)")
    note = f"The first {MAX_ROWS:,} of {len(found.class_facts):,} classes." if len(found.class_facts) > MAX_ROWS else ""
    return [Table("Images per class", columns, rows, note, heading=False, is_sortable=True, legend=tuple(parts))]


def _class_row(name: str, facts: ClassFacts, largest: int, parts: Sequence[str]) -> tuple[Any, ...]:
    pieces = tuple((part, n / largest) for part, n in (facts.parts or {"all": facts.n}).items())
    low, middle, high = facts.aspect
    aspect = Cell(f"{middle:.2f} ({low:.2f}–{high:.2f})", middle)
    size = Cell(f"{facts.width[1]:.0f} × {facts.height[1]:.0f}", facts.width[1])
    return escape(name), Stack(pieces), facts.n, *(facts.parts.get(part, 0) for part in parts), size, aspect


def _examples(manifest: Manifest, album: Album) -> list[Block]:
    by_class: dict[str, list[int]] = {name: [] for name in manifest.classes}
    for row, sample in enumerate(manifest.samples):
        for name in manifest.names_of(sample):
            by_class[name].append(row)
    return [Heading("Examples"), *examples(manifest, by_class, album)]


# ---- sizes


def _sizes(manifest: Manifest, found: Overview) -> list[Block]:
    advice = Text(f"Suggested: --resize {found.suggested_fit.fit}. {found.suggested_fit.reason[:1].upper()}{found.suggested_fit.reason[1:]}.", "lead")  # fmt: skip
    return [advice, Beside(([size_chart(manifest)], [aspect_chart(manifest)]))]


def size_chart(manifest: Manifest) -> Chart:
    """Width against height on logarithmic axes, at most ``MAX_DOTS`` different sizes."""
    counts = Counter((sample.width, sample.height) for sample in manifest.samples)
    sizes = sorted(counts)[:: 1 + len(counts) // MAX_DOTS]
    labels = tuple(f"{w:,} × {h:,} px: {count(counts[w, h], 'image')}" for w, h in sizes)
    series = Series("sizes", tuple((float(w), float(h)) for w, h in sizes), kind="dots", labels=labels)
    widths, heights = [w for w, _ in sizes], [h for _, h in sizes]
    return Chart("Image sizes (px)", "width", "height", (series,), "log", "log",
                 x_range=(min(widths) / 1.1, max(widths) * 1.1), y_range=(min(heights) / 1.1, max(heights) * 1.1))  # fmt: skip


def aspect_chart(manifest: Manifest) -> Chart:
    """Histogram of the ratio of width to height; bins are logarithmic."""
    values = np.log2([sample.width / sample.height for sample in manifest.samples])
    reach = min(3.0, max(1.0, math.ceil(2 * float(abs(values).max())) / 2))
    counts, edges = np.histogram(np.clip(values, -reach, reach), bins=31, range=(-reach, reach))
    middles = ((edges[:-1] + edges[1:]) / 2).tolist()
    labels = tuple(f"{2**m:.2f}: {count(n, 'image')}" for m, n in zip(middles, counts.tolist(), strict=True))
    series = Series("images", tuple(zip(middles, map(float, counts.tolist()), strict=True)), kind="bars", labels=labels)
    marks = tuple((float(at), text) for at, text in RATIOS if abs(at) <= reach)
    return Chart("Aspect ratios", "width : height", "images", (series,), x_range=(-reach, reach), x_ticks=marks)


# ---- shortcuts


def _shortcuts(found: Overview) -> list[Block]:
    check = found.shortcuts
    if check.reason:
        return [Text(f"Not checked: {check.reason}.", "lead")]
    rows = []
    for family in check.families:
        share = Share(family.balanced_accuracy, family.low, family.high)
        away = [escape(name) for name in family.given_away[:6]]
        more = len(family.given_away) - len(away)
        rows.append((f"{family.family}: {family.facts}", Bar(share, family.chance), share,
                     ", ".join(away) + (f" and {more} more" if more > 0 else "")))  # fmt: skip
    warned = tuple(n for n, family in enumerate(check.families) if family.warning is not None)
    about = f"{count(check.n_images, 'image')} of {count(check.n_classes, 'class', 'classes')}, cross-validated; the thin line is chance."
    lead = "Accuracy from metadata alone, without looking at the image. If it is high, a network can use the same shortcut."
    columns = ("Metadata", "", "Balanced accuracy (95% CI)", "Classes it reveals")
    return [Text(lead, "lead"), Table("Shortcut check", columns, tuple(rows), about, heading=False, text_columns=(3,), chosen=warned)]  # fmt: skip


# ---- duplicates and outliers


def _duplicates(manifest: Manifest, found: Overview, album: Album) -> list[Block]:
    """Leaks first, then exact and near duplicates; a few pictures of each group."""
    kinds: list[tuple[str, Iterable[Sequence[int]]]] = [
        ("leak", [sorted(pair) for pair in found.leaks]),
        ("identical files", found.duplicates),
        ("near duplicates", found.near_duplicates or []),
    ]
    groups = [(kind, list(rows)) for kind, groups in kinds for rows in list(groups)[:MAX_GROUPS]][: 2 * MAX_GROUPS]
    blocks: list[Block] = []
    if not groups:
        looked = found.near_duplicates is not None
        blocks.append(Text("None found." if looked else "No identical files. Near duplicates were not checked (--quick).", "lead"))  # fmt: skip
    cards = []
    for kind, rows in groups:
        tiles = tuple(
            Tile(album.want(row, MISTAKE), f"image of a group ({kind})", escape(manifest.samples[row].path))
            for row in rows[:GROUP_PICTURES]
        )
        cards.append(Card(tiles, title=f"{kind}, {count(len(rows), 'image')}"))
    n_all = len(found.duplicates) + len(found.near_duplicates or []) + len(found.leaks)
    if cards:
        blocks.append(Gallery(tuple(cards), "l"))
    if n_all > len(groups):
        blocks.append(Text(f"{len(groups):,} of {n_all:,} groups; --json lists all.", "small"))
    if found.near_duplicates_recall is not None:
        blocks.append(Text(f"The thresholds were tuned on modified copies of these images (resized, compressed, cropped, flipped); they find {percent(found.near_duplicates_recall, 0)} of them.", "small"))  # fmt: skip
    return blocks


def _outliers(manifest: Manifest, found: Overview, album: Album) -> list[Block]:
    row_of = {sample.path: row for row, sample in enumerate(manifest.samples)}
    blocks: list[Block] = []
    for name, outliers in found.outliers.items():
        if outliers:
            paths = [one["path"] for one in outliers[:OUTLIER_PICTURES]]
            tiles = [Tile(album.want(row_of[path], MISTAKE), f"{name} image") for path in paths]
            cards = tuple(Card((tile,), path=escape(path)) for tile, path in zip(tiles, paths, strict=True))
            blocks += [Heading(f"{name.capitalize()}: {count(len(outliers), 'image')}"), Gallery(cards, "s")]
    return blocks or [Text("No image is unusually dark, bright or blurry.", "lead")]


# ---- augmentation


def _views(surveyed: Surveyed, augment: Pipeline, seed: int) -> list[Block]:
    """One image from each of some classes: the network's input in prediction, and in training."""
    manifest, spec = surveyed.manifest, surveyed.spec
    first: dict[str, int] = {}
    for row in np.random.default_rng(seed).permutation(len(manifest.samples)).tolist():
        first.setdefault(manifest.samples[row].label, row)
    rows = list(first.values())[:N_VIEWED]
    made = in_order(lambda row: _views_of(manifest, row, spec, augment, seed), rows)
    shown = tuple((escape(manifest.samples[row].label), views) for row, views in zip(rows, made, strict=True) if views)
    lead = f"Network input at {spec.width} × {spec.height} pixels: for prediction, then {N_VIEWS} random views for training with --augment {augment.name}."  # fmt: skip
    columns = ("prediction", *[f"view {n}" for n in range(1, N_VIEWS + 1)])
    return [Text(lead, "lead"), Grid("Views", columns, shown)]


def _views_of(manifest: Manifest, row: int, spec: InputSpec, augment: Pipeline, seed: int) -> tuple[Pixels, ...]:
    sample = manifest.samples[row]
    try:
        pixels = decode(manifest.read(row), min_side=spec.min_side).pixels
    except (ImageError, MemoryError, OSError):
        return ()
    views = [augment.view(pixels, spec, stream(seed, epoch, sample.content_hash)) for epoch in range(N_VIEWS)]
    return (fit_to_input(pixels, spec), *views)


# ---- files


def _files(manifest: Manifest, found: Overview) -> list[Block]:
    n = len(manifest.samples)
    modes = dict(Counter(sample.mode for sample in manifest.samples).most_common())
    tables = [
        Table(title, (title[:-1], "Images", "Share"), tuple((escape(k), v, Share(v / n)) for k, v in counts.items()))
        for title, counts in (("Formats", found.formats), ("Color modes", modes))
    ]
    blocks: list[Block] = [Beside(tuple([table] for table in tables))]
    if found.cameras:
        cameras = tuple((escape(name), k) for name, k in found.cameras.items())
        blocks.append(Table("Cameras", ("Camera", "Images"), cameras))
    return [*blocks, *rejected(manifest)]
