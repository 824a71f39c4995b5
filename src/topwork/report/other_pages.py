"""The pages of ``compare``, ``compare-domains`` and ``study``, and the chart of ``lr-range``.

In: the results of the commands. Out: pages with the same blocks as the report; studies also write numbers and charts as
files.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from topwork.blocks import (
    Bars,
    Block,
    Card,
    Cell,
    Chart,
    Facts,
    Figure,
    Figures,
    Gallery,
    Grid,
    Heading,
    Line,
    Links,
    Notes,
    Section,
    Series,
    Share,
    Table,
    Text,
    Tile,
    as_share,
)
from topwork.commands.compare import Compared
from topwork.commands.compare_domains import ComparedDomains
from topwork.commands.lr_range import Ranged
from topwork.commands.study import Studied
from topwork.data.transforms import resize
from topwork.files import atomic_file, writing
from topwork.report.charts import stand_alone
from topwork.report.page import render_page, write_page
from topwork.report.pictures import jpeg_of, make_pictures
from topwork.report.sections.domains import domain_map
from topwork.text import duration, escape, join_names, percent

MAX_SHOWN = 60  # pictures of a pair
MAX_CLASSES = 200
TILE, GAP = 80, 4  # of a grid as a file, in pixels
FACT_NAMES = {
    "backbone": "Backbone", "n_classes": "Classes", "n_train": "Training images", "n_held_out": "Held-out images",
    "side": "Input size (px)", "epochs": "Epochs", "seed": "Seed", "data_digest": "Dataset digest",
}  # fmt: skip


# ---- compare


def compare_page(part: str, compared: Sequence[Compared]) -> str:
    """The page of runs against the first of them."""
    names = [compared[0].first.name, *(found.second.name for found in compared)]
    sections = [Section("overview", "Overview", _differences(compared))]
    for number, found in enumerate(compared, start=1):
        title = f"{escape(found.second.name)} vs. {escape(found.first.name)}"
        sections.append(Section(f"pair-{number}", title, _pair(found)))
    note = "McNemar's exact test and a paired bootstrap on the same images."
    subtitle = f"{escape(', '.join(names))}; {part}"
    return render_page("Comparison", "compare", sections, subtitle=subtitle, footer=[note])


def _differences(compared: Sequence[Compared]) -> list[Block]:
    """The sentences, and the difference in accuracy with its interval."""
    rows = []
    for found in compared:
        interval = found.comparison.difference_interval
        low, high = (interval.low, interval.high) if interval else (None, None)
        rows.append((found.second.name, Share(found.comparison.difference, low, high)))
    first = escape(compared[0].first.name)
    said = Notes(tuple(escape(found.sentence) for found in compared), kind="plain")
    chart = Bars(f"Accuracy difference to {first}", "points", tuple(rows), "With 95% CI.", is_difference=True)
    return [said, chart]


def _pair(found: Compared) -> list[Block]:
    values = found.as_dict()
    first, second = escape(found.first.name), escape(found.second.name)
    changed = [(name, c) for name, c in values["per_class"].items() if c["n_gained"] or c["n_lost"]]
    changed.sort(key=lambda item: (item[1]["n_lost"] - item[1]["n_gained"], item[0]))
    rows = tuple(
        (escape(name), c["n"], Share(c["accuracy_first"]), Share(c["accuracy_second"]), c["n_gained"], c["n_lost"])
        for name, c in changed[:MAX_CLASSES]
    )
    runs = (found.first, found.second)
    links = ((f"Report of {escape(one.name)}", (one.run.resolve() / "report.html").as_uri()) for one in runs)
    blocks: list[Block] = [Links(tuple(links))]
    if rows:
        columns = ("Class", "Images", first, second, "Gained", "Lost")
        blocks.append(Table("Classes that change", columns, rows, is_sortable=True))
    differing = values["disagreements"]
    blocks.append(Heading(f"Images predicted differently: {len(differing):,}"))
    shown = differing[:MAX_SHOWN]
    pictures = make_pictures(found.first.manifest, [row["row"] for row in shown])
    cards = tuple(_disagreement(row, picture, first, second) for row, picture in zip(shown, pictures, strict=True))
    kinds = tuple(dict.fromkeys((card.keys["change"], card.keys["change"]) for card in cards))
    name = f"images-{second}" if second.isidentifier() else "images"
    blocks.append(Gallery(cards, n_open=24, name=name, filters=(("change", "Change", kinds),)))
    if len(differing) > len(shown):
        blocks.append(Text(f"{len(shown)} of {len(differing):,} are shown; for all of them, use --json.", "small"))
    return blocks


def _disagreement(row: dict[str, Any], picture: Any, first: str, second: str) -> Card:
    lines = [Line("true", escape(row["label"]))]
    for key, name in (("first", first), ("second", second)):
        style = "good" if row[key] == row["label"] else "bad"
        lines.append(Line(name, escape(row[key]), percent(row[f"{key}_probability"]), style))
    tile = Tile(picture, f"image of {escape(row['label'])}")
    return Card((tile,), tuple(lines), escape(row["path"]), keys={"change": row["change"]})


# ---- compare-domains


def domains_page(compared: Sequence[ComparedDomains]) -> str:
    """The page of domains against the first of them."""
    sections = [
        Section(f"pair-{number}", f"{found.name_a} and {found.name_b}", _domains(found))
        for number, found in enumerate(compared, start=1)
    ]
    note = "Permutation tests on the features of a frozen network."
    others = join_names([found.name_b for found in compared])
    title = f"Distribution shift: {compared[0].name_a} and {others}" if len(compared) < 4 else "Distribution shift"
    return render_page(title, "compare-domains", sections, footer=[note])


def _domains(found: ComparedDomains) -> list[Block]:
    blocks: list[Block] = [Text(escape(found.sentence), "lead"), *(Text(escape(note)) for note in found.notes)]
    if found.expected is None:
        blocks.append(Text("With --model RUN, this page also shows the accuracy to expect on the second domain."))
    blocks.append(Figures(tuple(_distances(found))))
    names = [str(row["name"]) for row in found.classes]
    if found.positions:
        blocks.append(domain_map("Both domains", found.positions, names, "by label"))
    blocks.append(_class_shifts(found))
    pictures = make_pictures(found.manifest, found.farthest)
    cards = tuple(
        Card((Tile(picture, "image far from the first domain"),), path=escape(found.manifest.samples[row].path))
        for row, picture in zip(found.farthest, pictures, strict=True)
    )
    return [*blocks, Heading(f"Images of {found.name_b} least like {found.name_a}"), Gallery(cards, "s")]


def _distances(found: ComparedDomains) -> list[Figure]:
    distance = found.distance
    rows = [
        Figure("Energy distance", f"{distance.energy:.3f}", hint=f"{distance.expected:.3f} expected by chance"),
        Figure("p-value", f"{distance.p_value:.3f}", hint="permutation test"),
        Figure("Linear separability (AUC)", f"{distance.auc:.2f}", hint="0.5 means not separable"),
    ]
    for name, figure, pattern, hint in (
        ("Expected accuracy", found.expected, "range {}", "of the model, without labels"),
        ("Measured accuracy", found.measured, "95% CI {}", "on the labeled images"),
    ):
        if figure:
            share = as_share(figure)
            rows.append(Figure(name, percent(share.value), share.interval(pattern), hint))
    return rows


def _class_shifts(found: ComparedDomains) -> Table:
    rows = []
    for row in found.classes:
        moves = None if row["moves"] is None else "yes" if row["moves"] else "no"
        cells = [row["name"], row["n_a"], row["n_b"], None if row["shift"] is None else Cell(f"{row['shift']:.2f}", row["shift"]), moves]  # fmt: skip
        rows.append(tuple(cells + ([as_share(row["expected"]), as_share(row["accuracy"])] if found.expected else [])))
    extra = ("Expected recall", "Measured recall") if found.expected else ()
    columns = ("Class", found.name_a, found.name_b, "Shift", "Significant", *extra)
    note = "Shift: distance between the class means, in standard deviations of the class."
    return Table("Classes", columns, tuple(rows), note, is_sortable=True)


# ---- study


def write_study(studied: Studied, folder: Path) -> Path:
    """Writes page, numbers and charts of a study; returns the path of the page.

    Raises:
        TopworkError: a file cannot be written.
    """
    name = studied.study.name
    page = write_page(folder / f"{name}.html", study_page(studied))
    write_page(folder / f"{name}.json", json.dumps(studied.as_dict(), indent=1, allow_nan=False) + "\n")
    for number, part in enumerate(studied.findings.parts, start=1):
        if isinstance(part, (Chart, Bars)):
            write_page(folder / f"{name}-{number}.svg", stand_alone(part))
        elif isinstance(part, Grid):
            _write_sheet(part, folder / f"{name}-{number}.jpg")
    return page


def study_page(studied: Studied) -> str:
    """The page as text."""
    study, found = studied.study, studied.findings
    sections = [Section("result", "Result", [Notes(tuple(map(escape, found.sentences)), kind="plain")])]
    for number, part in enumerate(found.parts, start=1):
        untitled = replace(part, heading=False) if isinstance(part, Table) else replace(part, title="")
        sections.append(Section(f"part-{number}", part.title, [untitled]))
    sections.append(Section("setup", "Setup", [Facts(tuple(_study_facts(studied)), "list")]))
    note = "95% confidence intervals. Significance: McNemar's exact test on the same held-out images (p < 0.05)."
    footer = [f"{note} Based on: {study.source}."]
    return render_page(study.title, f"study {study.name}", sections, subtitle=study.teaches, footer=footer)


def _study_facts(studied: Studied) -> list[tuple[str, str, str]]:
    facts = [("Images", escape(studied.path) if studied.path else "drawn shapes", "")]
    for name, value in studied.findings.facts.items():
        if name == "quick":
            continue
        text = FACT_NAMES.get(name) or name.replace("_", " ").removeprefix("n ").capitalize()
        shown = str(value)[:16] if name == "data_digest" else f"{value:,}" if isinstance(value, int) else str(value)
        facts.append((text, escape(shown), ""))
    if studied.findings.facts.get("quick"):
        facts.append(("Quick", "yes (few images and short training, so the results are rough)", ""))
    return [*facts, ("Time", duration(studied.seconds), "")]


def _write_sheet(part: Grid, path: Path) -> None:
    """All pictures of a grid as one JPEG, one row of pictures per row of the grid."""
    n_columns = max(len(pictures) for _, pictures in part.rows)
    sheet = np.full((len(part.rows) * (TILE + GAP) + GAP, n_columns * (TILE + GAP) + GAP, 3), 245, np.uint8)
    for row, (_, pictures) in enumerate(part.rows):
        for column, pixels in enumerate(pictures):
            top, left = GAP + row * (TILE + GAP), GAP + column * (TILE + GAP)
            sheet[top : top + TILE, left : left + TILE] = resize(np.ascontiguousarray(pixels), TILE, TILE)
    with writing(path), atomic_file(path) as partial:
        partial.write_bytes(jpeg_of(sheet))


# ---- lr-range


def range_plot(found: Ranged) -> str:
    """Loss against learning rate, with the suggestion as a dashed line, as an SVG file."""
    test = found.test
    curve = tuple(zip(test.rates.tolist(), test.losses.tolist(), strict=True))
    ends = (float(test.losses.min()), float(test.losses.max()))
    suggested = Series(f"suggested: {test.suggestion:.1e}", tuple((test.suggestion, y) for y in ends), kind="dashed")
    series = (Series("loss", curve), suggested)
    chart = Chart("Learning-rate range test", "learning rate of the head", "loss, smoothed", series, "log", note=test.reason)  # fmt: skip
    return stand_alone(chart)
