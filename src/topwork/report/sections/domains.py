"""Domains: an adapted run on its source and its target, before and after, with a map of both and what changed."""

from __future__ import annotations

from collections import Counter
from typing import Any

from topwork.blocks import (
    Block,
    Card,
    Cell,
    Chart,
    Fold,
    Gallery,
    Line,
    Series,
    Share,
    Table,
    Text,
    Tile,
    as_share,
)
from topwork.data.manifest import load_manifest
from topwork.report.pictures import Album, make_pictures
from topwork.report.run_data import Record
from topwork.text import count, escape, percent, points

MAX_CLASSES = 200
N_COLORED = 11  # colored classes in a map; the others are gray
N_OPEN = 8


def domains(record: Record, _album: Album) -> list[Block]:
    """The section; nothing if the run was not adapted."""
    found = record.domains
    if found is None:
        return []
    names = [escape(name) for name in record.model.get("classes", [])]
    blocks: list[Block] = [
        Text(_lead(found), "lead"),
        *(Text(escape(note)) for note in found["notes"]),
        _accuracies(record, found),
        *_asked(found),
        domain_map("Source and target", found["map"].get("aligned", found["map"]), names),
        _classes(found),
        *_changed(record, found),
    ]
    return blocks + _tried(found["choice"]) + [Text(distance_text(found["choice"]["distance"]), "small")]


def _lead(found: dict[str, Any]) -> str:
    known = f" {count(found['n_known'], 'target label')} {'was' if found['n_known'] == 1 else 'were'} used." if found["n_known"] else ""  # fmt: skip
    n = found["n_changed"]
    changed = f"{n:,} of {count(found['n_target'], 'target image')} {'has' if n == 1 else 'have'} a different prediction than before."
    return changed + known


def _accuracies(record: Record, found: dict[str, Any]) -> Table:
    rows = []
    for name, title in (("target", "Target, measured"), ("source", "Source")):
        measured = record.evaluation.get("domains", {}).get(name)
        if measured and measured["before"]:
            part = f", {measured['part']}" if measured.get("part") else ""
            before, after = (as_share(measured[key]["accuracy"]) for key in ("before", "after"))
            rows.append((title + part, measured["after"]["n"], before, after))
    before, after = (as_share(found["predicted"][key]) for key in ("before", "after"))
    rows.append(("Target (expected, no labels)", None, before, after))
    return Table("Accuracy", ("Domain", "Images", "Before", "After"), tuple(rows), heading=False)


def _asked(found: dict[str, Any]) -> list[Block]:
    """The expected gain from labeling the images in ``ask.csv``, if requested."""
    asked = found.get("asked")
    if not asked or not asked.get("n"):
        return []
    text = f"Label the {count(asked['n'], 'image')} of ask.csv next"
    if asked.get("gain") is not None:
        low, high = points(asked["gain_low"]), points(asked["gain_high"])
        text += f": {points(asked['gain'])} points expected ({low} to {high})"
    return [Text(f"{text}.")]


def domain_map(
    title: str, positions: dict[str, list[list[float]]], names: list[str], rings: str = "by prediction"
) -> Chart:
    """Both domains in two dimensions: dots for the source, rings for the target, a color per class.

    Args:
        positions: (x, y, class) by domain.
        rings: whether target classes are labels or predictions.
        names: class names. The largest classes are colored, the others are gray.
    """
    counts = Counter(int(label) for _, _, label in (*positions["source"], *positions["target"]) if label >= 0)
    largest = sorted(counts, key=lambda label: (-counts[label], label))[: N_COLORED + (len(counts) == N_COLORED + 1)]
    series: list[Series] = []
    for domain, kind in (("source", "dots"), ("target", "rings")):
        for number, label in enumerate([*sorted(largest), None], start=1):
            own = [
                p for p in positions[domain] if (int(p[2]) == label if label is not None else int(p[2]) not in largest)
            ]
            if not own:
                continue
            name = names[label] if label is not None and label < len(names) else "other classes"
            labels = tuple(f"{domain}: {names[int(p[2])] if int(p[2]) < len(names) else ''}" for p in own)
            shown = name if domain == "source" or not any(one.name == name for one in series) else ""
            series.append(Series(shown, tuple((x, y) for x, y, _ in own), kind="dots" if kind == "dots" else "rings",
                                 labels=labels, color=number if label is not None else 0))  # fmt: skip
    said = f"Dots: source. Rings: target, {rings}."
    return Chart(title, "", "", tuple(series), has_axes=False, has_legend=True, note=said)


def _classes(found: dict[str, Any]) -> Table:
    has_truth = any(row["n"] for row in found["per_class"])
    rows = []
    for row in found["per_class"][:MAX_CLASSES]:
        expected = f"{percent(row['expected_before'], 0)} → {percent(row['expected_after'], 0)}"
        answered = f"{row['answered_before']:,} → {row['answered_after']:,}"
        cells: list[Any] = [escape(row["name"]), answered, Share(row["source"]), expected]
        if has_truth:
            before, after = (row[key]["value"] if row[key] else None for key in ("before", "after"))
            change = None if before is None or after is None else after - before
            cells += [Share(before), Share(after)]
            cells += [None if change is None else Cell(points(change), change, "bad" if change < 0 else "")]
        rows.append(tuple(cells))
    columns = ("Class", "Predicted", "Recall, source", "Recall, expected", *(["Before", "After", "Change"] if has_truth else []))  # fmt: skip
    note = f"The first {MAX_CLASSES} of {len(found['per_class']):,} classes." if len(found["per_class"]) > MAX_CLASSES else ""  # fmt: skip
    return Table("Classes", columns, tuple(rows), note)


def _changed(record: Record, found: dict[str, Any]) -> list[Block]:
    if not found["changed"]:
        return []
    target = load_manifest(record.folder / "target.parquet")
    pictures = make_pictures(target, [card["row"] for card in found["changed"]])
    cards = []
    for card, picture in zip(found["changed"], pictures, strict=True):
        lines = [
            Line("before", escape(card["before"])),
            Line("after", escape(card["after"]), percent(card["probability"])),
        ]
        if card["truth"] is not None:
            lines.append(Line("true", escape(card["truth"]), style="good" if card["truth"] == card["after"] else "bad"))
        tile = Tile(picture, f"image predicted as {escape(card['after'])}")
        cards.append(Card((tile,), tuple(lines), escape(str(card.get("path", "")))))  # fmt: skip
    return [Fold("Images predicted differently", [Gallery(tuple(cards), n_open=N_OPEN)])]


def _tried(choice: dict[str, Any]) -> list[Block]:
    rows = tuple(
        (escape(one["method"]), Share(one["neighbor_agreement"]), Share(one["agreement_with_source"]))
        for one in choice["tried"]
    )
    if not rows:
        return []
    note = "No target labels were used for this choice."
    columns = ("Method", "Neighbors with the same prediction", "Same prediction as the source model")
    return [Fold("Methods tried", [Table("Methods", columns, rows, note, heading=False)])]


def distance_text(distance: dict[str, Any]) -> str:
    """A sentence on whether the domains differ."""
    p_value = distance["p_value"]
    clear = "differ significantly" if p_value < 0.01 else "do not differ significantly"
    p = "p < 0.01" if p_value < 0.01 else f"p = {p_value:.2f}"
    return (
        f"The domains {clear} ({p}): energy distance {distance['energy']:.3f} ({distance['expected']:.3f} expected by "
        f"chance); linear separability (AUC) {distance['auc']:.2f}."
    )
