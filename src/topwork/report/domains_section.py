"""The section of an adapted run about its two domains: in goes a :class:`Record`, out come values for its template.

The numbers are those of ``domains.json`` and ``evaluation.json``; here they get positions and pictures.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from topwork.data.loader import in_order
from topwork.data.manifest import load_manifest
from topwork.report.charts import Scale
from topwork.report.pictures import Album, make_picture
from topwork.report.run_data import Record, read_json
from topwork.text import escape, percent

SIDE, MARGIN = 360, 12  # of a map, in the units of its SVG
N_COLORS = 6
MAX_CLASSES = 200
OUTCOMES = {"adapted": "Adapted", "unchanged": "Unchanged", "refused": "Not adapted"}


def is_adapted(record: Record) -> bool:
    """Whether ``topwork adapt`` made this run."""
    return (record.folder / "domains.json").is_file()


def domains(record: Record, album: Album) -> dict[str, Any]:
    """What was chosen and why, both domains before and after, by class, a map, and images that changed."""
    del album  # its pictures are of the source's images; those of the target are made here
    found = read_json(record.folder / "domains.json")
    target = load_manifest(record.folder / "target.parquet")
    choice = found["choice"]
    cards = found["changed"]
    pictures = list(in_order(lambda row: make_picture(target, row), [card["row"] for card in cards]))
    return {
        "outcome": OUTCOMES[choice["outcome"]],
        "is_adapted": choice["outcome"] == "adapted",
        "method": choice["method"],
        "reason": escape(choice["reason"]),
        "target": escape(str(target.root)),
        "n_target": found["n_target"],
        "n_changed": found["n_changed"],
        "n_known": found["n_known"],
        "figures": _figures(record, found),
        "distance": _distance(choice["distance"]),
        "tried": [
            {
                "method": tried["method"],
                "neighbors": percent(tried["neighbor_agreement"]),
                "agreement": percent(tried["agreement_with_source"]),
            }
            for tried in choice["tried"]
        ],
        "classes": [_class_row(row) for row in found["per_class"][:MAX_CLASSES]],
        "has_truth": any(row["n"] for row in found["per_class"]),
        "map": _map(found["map"]),
        "names": [(escape(name), 1 + number % N_COLORS) for number, name in enumerate(record.model.get("classes", []))],
        "cards": [
            card
            | {
                "picture": asdict(picture),
                "probability": percent(card["probability"]),
                "was_right": card["truth"] == card["before"],
                "is_right": card["truth"] == card["after"],
            }
            for card, picture in zip(cards, pictures, strict=True)
        ],
        "asked": found.get("asked"),
        "notes": [escape(note) for note in found["notes"]],
    }


def _figures(record: Record, found: dict[str, Any]) -> list[dict[str, str]]:
    """Accuracy before and after: rows of (domain, images, before, after)."""
    rows = []
    for name, title in (("target", "New domain"), ("source", "Source")):
        judged = record.evaluation.get("domains", {}).get(name)
        if judged and judged["before"]:
            part = f", {judged['part']} part" if judged.get("part") else ""
            before, after = (_with_interval(judged[key]["accuracy"]) for key in ("before", "after"))
            rows.append({"name": title + part, "n": f"{judged['after']['n']:,}", "before": before, "after": after})
    before, after = (_with_interval(found["predicted"][key]) for key in ("before", "after"))
    rows.append({"name": "New domain, expected without labels", "n": "", "before": before, "after": after})
    return rows


def _with_interval(figure: dict[str, float]) -> str:
    low, high = (percent(figure[key], 0).rstrip("%") for key in ("low", "high"))
    return f"{percent(figure['value'])} ({low}–{high})"


def _distance(distance: dict[str, Any]) -> str:
    chance = "below 0.01" if distance["p_value"] < 0.01 else f"{distance['p_value']:.2f}"
    differ = "differ significantly" if distance["p_value"] < 0.01 else "do not differ significantly"
    return (
        f"The domains {differ}: energy distance {distance['energy']:.3f}; {distance['expected']:.3f} would be expected by "
        f"chance (p-value: {chance}). Linear separability: AUC {distance['auc']:.2f}."
    )


def _class_row(row: dict[str, Any]) -> dict[str, Any]:
    measured = {key: row[key] for key in ("before", "after")}
    change = None
    if measured["before"] and measured["after"]:
        change = 100 * (measured["after"]["value"] - measured["before"]["value"])
    return {
        "name": row["name"],
        "n": row["n"],
        "answered": f"{row['answered_before']:,} → {row['answered_after']:,}",
        "source": percent(row["source"]),
        "expected": f"{percent(row['expected_before'], 0)} → {percent(row['expected_after'], 0)}",
        "before": percent(measured["before"]["value"]) if measured["before"] else "–",
        "after": percent(measured["after"]["value"]) if measured["after"] else "–",
        "change": "" if change is None else f"{change:+.1f}".replace("-", "−"),
        "is_worse": change is not None and change < 0,
    }


def _map(points: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Positions in an SVG of SIDE x SIDE: dots for the source, rings for the target."""
    everything = [*points["source"], *points["target"]]
    xs, ys = [p[0] for p in everything], [p[1] for p in everything]
    x = Scale(min(xs), max(xs), MARGIN, SIDE - MARGIN)
    y = Scale(min(ys), max(ys), SIDE - MARGIN, MARGIN)
    return {
        name: [(x(px), y(py), 1 + int(label) % N_COLORS) for px, py, label in points[name]]
        for name in ("source", "target")
    } | {"side": SIDE}
