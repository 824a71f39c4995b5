"""The page of ``topwork scan --report``: what the data look like before anything is trained.

In: what a scan found, and the images. Out: one self-contained file that needs no network and runs no script. Numbers come
from ``evaluation/dataset_summary.py``; here they get positions, colors and pictures. Every text that comes from the data goes
through ``shown``; the template escapes it.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from topwork import __version__
from topwork.commands.scan import Surveyed
from topwork.data.augment import Pipeline, pipeline, stream
from topwork.data.images import decode
from topwork.data.loader import in_order
from topwork.data.manifest import Manifest
from topwork.data.transforms import InputSpec, Pixels, fit_to_input
from topwork.errors import ImageError, TopworkError
from topwork.evaluation.dataset_summary import ClassFacts, Overview
from topwork.files import atomic_file
from topwork.report.charts import LEFT, Scale, ticks
from topwork.report.pictures import Picture, make_picture
from topwork.text import escape

HERE = Path(__file__).parent
MAX_ROWS = 1000  # of the table of classes
MAX_REJECTS = 500
MAX_DOTS = 3000
MAX_GROUPS = 12
GROUP_PICTURES = 4
OUTLIER_PICTURES = 8
EXAMPLES = 10
VIEWS = 5
SIDE = 112
_WIDTH, _HEIGHT = 460, 300


@dataclass(frozen=True)
class Dots:
    """A scatter plot as SVG: positions of dots, and ticks of both axes."""

    dots: tuple[tuple[float, float], ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    width: int = _WIDTH
    height: int = _HEIGHT
    left: int = LEFT
    bottom: int = _HEIGHT - 40


@dataclass(frozen=True)
class Bars:
    """A histogram as SVG: left, width, top and height of each bar."""

    bars: tuple[tuple[float, float, float, float], ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    width: int = _WIDTH
    height: int = _HEIGHT
    left: int = LEFT
    bottom: int = _HEIGHT - 40


def write_scan_page(surveyed: Surveyed, path: Path, augment: str = "standard", seed: int = 0) -> None:
    """Writes the page.

    Args:
        augment: the pipeline whose views the example grid shows.

    Raises:
        UsageError: no such pipeline.
        TopworkError: the file cannot be written.
    """
    page = render(surveyed, pipeline(augment), seed)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as partial:
            partial.write_text(page, encoding="utf-8", newline="\n")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise TopworkError(f"{escape(str(path))}: cannot be written: {reason}.") from None


def render(surveyed: Surveyed, augment: Pipeline, seed: int = 0) -> str:
    """The page as text."""
    manifest, found = surveyed.manifest, surveyed.overview
    groups, outliers = _shown_groups(found), _shown_outliers(manifest, found)
    rows = {row for group in groups for row in group["rows"]} | {row for kind in outliers for row in kind["rows"]}
    pictures = dict(zip(rows, in_order(lambda row: make_picture(manifest, row, SIDE), list(rows)), strict=True))
    style = "".join((HERE / "static" / name).read_text(encoding="utf-8") for name in ("report.css", "scan.css"))
    return _environment().get_template("scan.html").render(
        title=escape(manifest.root.name or str(manifest.root)),
        version=__version__,
        policy=_policy(style),
        style=Markup(style),
        facts=_facts(manifest, found),
        findings=[escape(line) for line in (*surveyed.findings, *manifest.notes)],
        classes=_class_rows(found)[:MAX_ROWS],
        n_classes=len(found.classes),
        parts=sorted({part for facts in found.classes.values() for part in facts.parts}),
        sizes=size_plot(manifest),
        aspects=aspect_plot(manifest),
        advice=found.advice,
        shortcuts=[_shortcut_row(family) for family in found.shortcuts.families],
        shortcut=found.shortcuts,
        groups=groups,
        n_groups=len(found.duplicates) + len(found.near_duplicates or []) + len(found.leaks),
        looked=found.near_duplicates is not None,
        recall=found.near_duplicates_recall,
        outliers=outliers,
        pictures=pictures,
        spec=surveyed.spec,
        examples=_examples(surveyed, augment, seed),
        augment=augment.name,
        formats=_shares(found.formats, len(manifest.samples)),
        modes=_shares(dict(Counter(sample.mode for sample in manifest.samples).most_common()), len(manifest.samples)),
        cameras=[(escape(name), n) for name, n in found.cameras.items()],
        rejects=[(escape(reject.path), escape(reject.reason)) for reject in manifest.rejects[:MAX_REJECTS]],
        n_rejects=len(manifest.rejects),
        path_of=lambda row: escape(manifest.samples[row].path),
    )  # fmt: skip


# ---- numbers


def _facts(manifest: Manifest, found: Overview) -> list[tuple[str, str, str]]:
    near = "not looked for" if found.near_duplicates is None else f"{len(found.near_duplicates):,}"
    is_divided = any(sample.part for sample in manifest.samples)
    leaks = "of valid or test that train has, too" if is_divided else "the data are not divided yet"
    return [
        ("Images", f"{len(manifest.samples):,}", f"{len(manifest.rejects):,} files rejected"),
        ("Classes", f"{len(manifest.classes):,}", f"largest by smallest: {found.imbalance:g}"),
        ("Exact duplicates", f"{len(found.duplicates):,}", "groups with the same bytes"),
        ("Near duplicates", near, "groups that show the same picture"),
        ("Leaks", f"{len(found.leaks):,}" if is_divided else "–", leaks),
    ]


def _class_rows(found: Overview) -> list[dict[str, Any]]:
    largest = max(facts.n for facts in found.classes.values())
    widest = max(max(facts.aspect[2], 1 / facts.aspect[0]) for facts in found.classes.values())
    aspect = Scale(1 / max(widest, 1.5), max(widest, 1.5), 0, 100, is_log=True)
    return [_class_row(name, facts, largest, aspect) for name, facts in found.classes.items()]


def _class_row(name: str, facts: ClassFacts, largest: int, aspect: Scale) -> dict[str, Any]:
    segments, start = [], 0.0
    for part, n in facts.parts.items() or [("all", facts.n)]:
        segments.append({"part": part, "start": round(start, 2), "length": round(100 * n / largest, 2)})
        start += 100 * n / largest
    return {
        "name": escape(name),
        "n": facts.n,
        "parts": facts.parts,
        "bars": segments,
        "size": f"{facts.width[1]:.0f} × {facts.height[1]:.0f}",
        "aspect": f"{facts.aspect[1]:.2f}",
        "range": [aspect(value) for value in facts.aspect],
        "square": aspect(1.0),
    }


def size_plot(manifest: Manifest) -> Dots:
    """Width against height on logarithmic axes, at most ``MAX_DOTS`` different sizes."""
    sizes = sorted({(sample.width, sample.height) for sample in manifest.samples})
    sizes = sizes[:: 1 + len(sizes) // MAX_DOTS]
    xs, ys = ([size[axis] for size in sizes] for axis in (0, 1))
    x_scale = Scale(min(xs) / 1.1, max(xs) * 1.1, LEFT + 6, _WIDTH - 14, is_log=True)
    y_scale = Scale(min(ys) / 1.1, max(ys) * 1.1, _HEIGHT - 46, 14, is_log=True)
    return Dots(
        dots=tuple((x_scale(x), y_scale(y)) for x, y in sizes),
        x_ticks=tuple((x_scale(x), f"{x:g}") for x in _pixel_ticks(min(xs), max(xs))),
        y_ticks=tuple((y_scale(y), f"{y:g}") for y in _pixel_ticks(min(ys), max(ys))),
    )


def aspect_plot(manifest: Manifest) -> Bars:
    """How many images have which ratio of width by height; bins are even on the logarithm."""
    values = np.log2([sample.width / sample.height for sample in manifest.samples])
    reach = min(3.0, max(1.0, math.ceil(2 * float(abs(values).max())) / 2))
    counts, edges = np.histogram(np.clip(values, -reach, reach), bins=31, range=(-reach, reach))
    levels = ticks(0, float(counts.max()))
    x_scale = Scale(-reach, reach, LEFT + 6, _WIDTH - 14)
    y_scale = Scale(0, levels[-1], _HEIGHT - 40, 14)
    bars = tuple(
        (x_scale(low), round(x_scale(high) - x_scale(low) - 1, 2), y_scale(n), round(_HEIGHT - 40 - y_scale(n), 2))
        for low, high, n in zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True)
        if n
    )
    names = [(-3, "1:8"), (-2, "1:4"), (-1, "1:2"), (-0.585, "2:3"), (0, "1:1"), (0.585, "3:2"), (1, "2:1"), (2, "4:1"), (3, "8:1")]  # fmt: skip
    return Bars(
        bars=bars,
        x_ticks=tuple((x_scale(at), text) for at, text in names if abs(at) <= reach),
        y_ticks=tuple((y_scale(n), f"{n:,.0f}") for n in levels if n == int(n)),
    )


def _pixel_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, or more steps where they are few; the ends where fewer than two lie between."""
    found: list[float] = []
    for steps in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        found = [m * 10.0**e for e in range(7) for m in steps if low <= m * 10.0**e <= high]
        if len(found) > 3:
            break
    if len(found) < 2:
        return [low] if low == high else [low, high]
    return found[:: 1 + len(found) // 7]


def _shortcut_row(family: Any) -> dict[str, Any]:
    return {
        "family": family.family,
        "facts": family.facts,
        "value": f"{100 * family.balanced_accuracy:.0f} %",
        "interval": f"{100 * family.low:.0f} to {100 * family.high:.0f}",
        "position": {"value": 100 * family.balanced_accuracy, "low": round(100 * family.low, 2), "high": round(100 * family.high, 2)},
        "chance": family.chance,
        "away": [escape(name) for name in family.given_away[:6]],
        "n_away": len(family.given_away),
        "is_warning": family.warning is not None,
    }  # fmt: skip


def _shares(counts: dict[str, int], n: int) -> list[tuple[str, str, str]]:
    return [(escape(name), f"{count:,}", f"{100 * count / n:.1f} %") for name, count in counts.items()]


# ---- pictures


def _shown_groups(found: Overview) -> list[dict[str, Any]]:
    """Leaks first, then exact and near duplicates; a few pictures of each group."""
    kinds: list[tuple[str, Iterable[Sequence[int]]]] = [
        ("leak", [sorted(pair) for pair in found.leaks]),
        ("same file", found.duplicates),
        ("same picture", found.near_duplicates or []),
    ]
    chosen = []
    for kind, groups in kinds:
        for rows in list(groups)[:MAX_GROUPS]:
            chosen.append({"kind": kind, "rows": list(rows)[:GROUP_PICTURES], "n": len(rows)})
    return chosen[: 2 * MAX_GROUPS]


def _shown_outliers(manifest: Manifest, found: Overview) -> list[dict[str, Any]]:
    row_of = {sample.path: row for row, sample in enumerate(manifest.samples)}
    kinds = (("Unusually dark", found.dark), ("Unusually bright", found.bright), ("Blurred", found.blurred))
    return [
        {"name": name, "n": len(outliers), "rows": [row_of[o.path] for o in outliers[:OUTLIER_PICTURES]]}
        for name, outliers in kinds
        if outliers
    ]


def _examples(surveyed: Surveyed, augment: Pipeline, seed: int) -> list[dict[str, Any]]:
    """One image of each of some classes: the whole, what the network sees in prediction, and in training."""
    manifest = surveyed.manifest
    first: dict[str, int] = {}
    for row in np.random.default_rng(seed).permutation(len(manifest.samples)).tolist():
        first.setdefault(manifest.samples[row].label, row)
    names = sorted(first, key=list(first).index)[:EXAMPLES]
    rows = [first[name] for name in names]
    made = in_order(lambda row: _views(manifest, row, surveyed.spec, augment, seed), rows)
    return [
        {"name": escape(manifest.samples[row].label), "path": escape(manifest.samples[row].path), "views": views}
        for row, views in zip(rows, made, strict=True)
    ]


def _views(manifest: Manifest, row: int, spec: InputSpec, augment: Pipeline, seed: int) -> list[Picture]:
    """The image, the very pixels that the network gets in prediction, and the views that the probe would train on."""
    sample = manifest.samples[row]
    try:
        pixels = decode(manifest.read(row), min_side=spec.min_side).pixels
    except (ImageError, MemoryError):
        return []
    views = [fit_to_input(pixels, spec)]
    views += [augment.view(pixels, spec, stream(seed, epoch, sample.content_hash)) for epoch in range(VIEWS)]
    return [make_picture(manifest, row, 2 * SIDE), *map(_picture, views)]


def _picture(pixels: Pixels) -> Picture:
    jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=70)
    source = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode("ascii")
    return Picture(source, pixels.shape[1], pixels.shape[0])


# ---- the page


def _environment() -> Environment:
    folder = FileSystemLoader(HERE / "templates")
    return Environment(loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _policy(style: str) -> str:
    """Allows this style and pictures inside the page; nothing else, from nowhere."""
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode("ascii")
    return f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
