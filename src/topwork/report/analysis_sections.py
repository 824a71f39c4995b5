"""What a run knows beyond its figures: in go a :class:`Record` and its ``insights.json``, out come values for four templates.

What the model looks at, what it knows, labels to check, advice. A run without that file (of an earlier version) gets a
sentence that says so. Every text that comes from the data goes through ``shown``; the templates escape it.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import simplejpeg

from topwork.data.images import decode
from topwork.data.transforms import InputSpec, Pixels, resize
from topwork.errors import ImageError
from topwork.evaluation.advice import times
from topwork.evaluation.analysis import advice_of
from topwork.evaluation.explain import overlay
from topwork.evaluation.metrics import accuracy_by_class_size, evaluate_part
from topwork.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Scale, log_ticks, tick_percent, ticks
from topwork.report.pictures import EXAMPLE, Album
from topwork.report.run_data import Record
from topwork.text import count, decimal, escape, percent

MAX_SUSPECTS, N_NEIGHBORS, MAX_OUTLIERS = 40, 3, 12
N_OPEN = 12  # suspects that are open at first; the rest unfolds
MAP_SIDE = 208  # pixels of the long side of a map; shown at about 190 CSS pixels
QUALITY = 72
MIN_CLASSES = 5  # for accuracy against images of a class
MAX_DOTS = 1000


# ---- what it looks at


def looks(record: Record, album: Album) -> dict[str, Any]:
    """Maps of evidence over the originals, with the most similar training images."""
    found = record.insights.get("explanations") or {}
    classes, spec = record.manifest.classes, _spec(record)
    cards = []
    for image in found.get("images", []):
        row = image["row"]
        pixels = _picture(record, row)
        wanted = [(image["predicted"], image["maps"][0])]
        if image["label"] != image["predicted"]:
            wanted.append((image["label"], image["maps"][1]))
        maps = [np.array(values, np.float32) for _, values in wanted]
        strongest = max(float(np.max(m)) for m in maps)
        cards.append(
            {
                "row": album.want(row, EXAMPLE, in_page=False),
                "path": escape(record.manifest.samples[row].path),
                "is_wrong": image["label"] != image["predicted"],
                "true": escape(classes[image["label"]]),
                "predicted": escape(classes[image["predicted"]]),
                "probability": percent(image["probability"]),
                "maps": [
                    {"name": escape(classes[label]), "source": _source(pixels, values, spec, strongest)}
                    for (label, _), values in zip(wanted, maps, strict=True)
                ],
                "near": [
                    {
                        "row": album.want(near, EXAMPLE, in_page=False),
                        "name": escape(record.manifest.samples[near].label),
                        "similarity": f"{similarity:.2f}",
                        "is_same": record.manifest.samples[near].label == classes[image["label"]],
                    }
                    for near, similarity in zip(image["nearest"], image["similarity"], strict=True)
                ],
            }
        )
    return {"has_insights": bool(found), "method": found.get("method"), "part": found.get("part"), "cards": cards}


def _spec(record: Record) -> InputSpec:
    values = record.recipe.get("preprocessing") or {}
    known = {key: values[key] for key in InputSpec.__dataclass_fields__ if key in values}
    return InputSpec.from_dict(known)


def _picture(record: Record, row: int) -> Pixels | None:
    """The upright original, small; None where the file is gone."""
    sample = record.manifest.samples[row]
    try:
        pixels = decode(record.manifest.read(row), min_side=MAP_SIDE).pixels
    except (ImageError, OSError, ValueError):
        return None
    scale = min(1.0, MAP_SIDE / max(sample.width, sample.height, 1), MAP_SIDE / max(pixels.shape[:2]))
    height, width = (max(1, round(n * scale)) for n in pixels.shape[:2])
    return resize(pixels, height, width)


def _source(pixels: Pixels | None, values: Any, spec: InputSpec, strongest: float) -> dict[str, Any] | None:
    if pixels is None:
        return None
    drawn = overlay(pixels, values, spec, strongest)
    jpeg = simplejpeg.encode_jpeg(
        np.ascontiguousarray(drawn), quality=QUALITY, colorspace="RGB", colorsubsampling="420"
    )
    text = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode("ascii")
    return {"uri": text, "width": drawn.shape[1], "height": drawn.shape[0]}


# ---- what it knows


def knows(record: Record, _album: Album) -> dict[str, Any]:
    """When it answers and when it does not, how accuracy grows with images, and whether large classes fare better."""
    insights = record.insights
    return {
        "has_insights": bool(insights),
        "outcomes": _outcomes(insights.get("decisions") or {}),
        "rule": _rule((insights.get("decisions") or {}).get("thresholds") or {}),
        "curve": _curve(insights.get("learning_curve")),
        "sizes": _class_sizes(record),
    }


def _outcomes(decisions: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name, part in (decisions.get("parts") or {}).items():
        n = part["n"] or 1
        right = part["accuracy_of_labels"]
        rows.append(
            {
                "part": name,
                "n": part["n"],
                "shares": [
                    (kind, part[f"n_{kind}"], percent(part[f"n_{kind}"] / n))
                    for kind in ("label", "ambiguous", "unknown")
                ],
                "bars": _stacked([part[f"n_{kind}"] / n for kind in ("label", "ambiguous", "unknown")]),
                "right": percent(right["value"]) if right else "–",
                "low": percent(right["low"]) if right else None,
                "high": percent(right["high"]) if right else None,
                "accuracy": percent(part["accuracy"]),
                "left_open": part["wrong_left_open"],
                "n_wrong": part["n_wrong"],
            }
        )
    return rows


def _stacked(shares: list[float]) -> list[tuple[int, float, float]]:
    """Number, start and length in percent of each piece."""
    pieces, start = [], 0.0
    for number, share in enumerate(shares, start=1):
        if share > 0:
            pieces.append((number, round(100 * start, 2), round(100 * share, 2)))
        start += share
    return pieces


def _rule(thresholds: dict[str, Any]) -> list[str]:
    """How label, ambiguous and unknown are told apart, in words."""
    said = []
    if thresholds.get("unknown") is not None:
        rate = percent(thresholds.get("unknown_false_alarm_rate"), 0)
        said.append(
            f"Unknown: it looks like none of the training images. Set so that about {rate} of the images of known classes are "
            "called so."
        )
    if thresholds.get("target_precision") is not None:
        asked, met = percent(thresholds["target_precision"]), thresholds.get("target_precision_met")
        how = {
            "surely": "the training images show it with 95 % certainty",
            "about": "the training images are too few to be certain of it",
            "no": "no threshold reaches it, so nearly everything is left open",
        }
        said.append(
            f"Ambiguous: the best class has less than {percent(thresholds['confidence'])}. Set so that {asked} of the answers "
            f"that stay are right; {how.get(str(met), 'estimated on the training images')}."
        )
    elif thresholds.get("set_probability") is not None:
        said.append(
            f"Ambiguous: no class or more than one has at least {percent(thresholds['set_probability'])}. Set so that the true class "
            f"is among those not ruled out for {percent(thresholds.get('set_coverage'))} of the images."
        )
    return said


def _curve(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """Positions of the learning curve: measured points with whiskers, and the law's future as a band."""
    if not found:
        return None
    points, forecasts = found["points"], found["forecasts"]
    every = [*points, *forecasts]
    x = Scale(min(p["n"] for p in every), max(p["n"] for p in every), LEFT + 10, WIDTH - RIGHT - 10, is_log=True)
    y_values = ticks(min(p["low"] for p in every), max(p["high"] for p in every))
    y_values = [v for v in y_values if v <= 1.0 + 1e-9]
    y = Scale(y_values[0], y_values[-1], HEIGHT - BOTTOM, TOP)
    law = [(n, min(max(v, y_values[0]), y_values[-1])) for n, v in found.get("line", ())]
    band = [(x(f["n"]), y(f["high"])) for f in forecasts] + [(x(f["n"]), y(f["low"])) for f in reversed(forecasts)]
    gain, low, high = found["gain"]
    return {
        "points": [(x(p["n"]), y(p["accuracy"]), y(p["low"]), y(p["high"])) for p in points],
        "law": "M" + " L".join(f"{x(n):g} {y(v):g}" for n, v in law) if law else "",
        "band": " ".join(f"{a:g},{b:g}" for a, b in band),
        "x_ticks": [(x(p["n"]), f"{p['n']:,}") for p in (points[0], points[-1], *forecasts[1:])],
        "y_ticks": [(y(v), tick_percent(v)) for v in y_values],
        "rows": [
            ("measured", f"{p['n']:,}", percent(p["accuracy"]), percent(p["low"]), percent(p["high"])) for p in points
        ]
        + [
            ("expected", f"{p['n']:,}", percent(p["accuracy"]), percent(p["low"]), percent(p["high"]))
            for p in forecasts
        ],
        "gain": f"{100 * gain:+.1f}",
        "low": f"{100 * low:+.1f}",
        "high": f"{100 * high:+.1f}",
        "frame": {
            "left": LEFT,
            "right": WIDTH - RIGHT,
            "top": TOP,
            "bottom": HEIGHT - BOTTOM,
            "width": WIDTH,
            "height": HEIGHT,
        },
    }


def _class_sizes(record: Record) -> dict[str, Any] | None:
    """Recall of each class against its training images, and whether the two go together."""
    part = record.main_part
    if part is None or len(record.manifest.classes) < MIN_CLASSES:
        return None
    judged = record.evaluation[part]["per_class"]
    counts = {name: scores["n_train"] or 0 for name, scores in judged.items()}
    effect = accuracy_by_class_size(evaluate_part(record.predictions[part], n_train=counts))
    sizes = [max(n, 1) for n in effect.n_train]
    if max(sizes) < 1.5 * min(sizes):
        return None
    is_log = max(sizes) > 8 * min(sizes)
    x = Scale(min(sizes), max(sizes), LEFT + 10, WIDTH - RIGHT - 10, is_log)
    y = Scale(0.0, 1.0, HEIGHT - BOTTOM, TOP)
    x_values = log_ticks(min(sizes), max(sizes)) if is_log else ticks(min(sizes), max(sizes))
    dots = [
        (x(n), y(accuracy), escape(name))
        for n, accuracy, name in zip(sizes[:MAX_DOTS], effect.accuracy, effect.names, strict=False)
    ]
    return {
        "dots": dots,
        "x_ticks": [(x(v), f"{v:,g}") for v in x_values if min(sizes) <= v <= max(sizes)],
        "y_ticks": [(y(v / 4), tick_percent(v / 4)) for v in range(5)],
        "sentence": _size_sentence(effect.rank_correlation, effect.p_value),
        "frame": {
            "left": LEFT,
            "right": WIDTH - RIGHT,
            "top": TOP,
            "bottom": HEIGHT - BOTTOM,
            "width": WIDTH,
            "height": HEIGHT,
        },
    }


def _size_sentence(correlation: float | None, p_value: float | None) -> str:
    if correlation is None or p_value is None:
        return "All classes do equally well, or have equally many images: nothing to relate."
    facts = f"Rank correlation {correlation:+.2f}, p = {p_value:.2g}"
    if p_value >= 0.05:
        return f"{facts}: no clear relation between the images of a class and how well it is recognized."
    more = "better" if correlation > 0 else "worse"
    return f"{facts}: classes with more training images are recognized {more}."


# ---- labels to check


def labels(record: Record, album: Album) -> dict[str, Any]:
    """Suspected wrong labels with their neighbors as evidence, outliers, repeated and leaked images."""
    insights = record.insights
    samples = record.manifest.samples
    cards = []
    counted = [suspect for suspect in insights.get("suspects", []) if suspect["is_confident"]]
    for suspect in counted[:MAX_SUSPECTS]:
        row = suspect["row"]
        cards.append(
            {
                "row": album.want(row, EXAMPLE, in_page=False),
                "path": escape(samples[row].path),
                "part": str(record.part_of[row]),
                "label": escape(samples[row].label),
                "suggested": escape(suspect["suggested"]),
                "label_probability": percent(suspect["label_probability"]),
                "suggested_probability": percent(suspect["suggested_probability"]),
                "near": [
                    {"row": album.want(near, EXAMPLE, in_page=False), "name": escape(samples[near].label)}
                    for near in suspect["neighbors"][:N_NEIGHBORS]
                ],
            }
        )
    odd = [
        {
            "row": album.want(item["row"], EXAMPLE, in_page=False),
            "path": escape(samples[item["row"]].path),
            "label": escape(samples[item["row"]].label),
            "distance": decimal(item["distance"], 2),
        }
        for item in insights.get("outliers", [])[:MAX_OUTLIERS]
    ]
    return {
        "has_insights": bool(insights),
        "cards": cards,
        "n_open": N_OPEN,
        "n_suspects": insights.get("n_suspects", 0),
        "n_audited": insights.get("n_audited", 0),
        "share": percent(insights.get("n_suspects", 0) / max(insights.get("n_audited", 0), 1)),
        "outliers": odd,
        "repeats": _repeats(insights.get("duplicates") or {}, record.evaluation.get("leaks") or {}),
    }


def _repeats(duplicates: dict[str, Any], leaks: dict[str, Any]) -> list[str]:
    """Leaked and repeated images, with the score without them."""
    said = []
    for part, found in leaks.items():
        without = found.get("without")
        score = f"; without them accuracy is {percent(without['accuracy']['value'])}" if without else ""
        with_them = f" instead of {percent(found['with']['accuracy']['value'])}" if without and "with" in found else ""
        said.append(f"{count(found['n_leaked'], 'image')} of {part} are in train, too{score}{with_them}.")
    for part, found in duplicates.items():
        value = found["accuracy_without"]
        said.append(
            f"{count(found['n_repeated'], 'image')} of {part} show the same as another image of {part}. With one of each "
            f"({found['n_without']:,} images) accuracy is {percent(value['value'])} ({percent(value['low'])} to "
            f"{percent(value['high'])}) instead of {percent(found['accuracy'])}."
        )
    return said


# ---- advice


def advice(record: Record, _album: Album) -> dict[str, Any]:
    """What would help most, with gains and minutes."""
    insights = record.insights
    rows = []
    for item in advice_of(insights):
        gain = None
        if item.gain is not None:
            value, low, high = (f"{100 * v:+.1f}".replace("-", "−") for v in item.gain)
            span = None if item.basis == "bound" else f"{low} to {high}"
            gain = {"value": f"≤ {high}" if item.basis == "bound" else value, "span": span}
            gain["basis"] = _BASIS.get(item.basis or "", "")
        rows.append(
            {
                "title": item.title,
                "text": escape(item.text),
                "gain": gain,
                "times": times(item),
                "command": escape(item.command) if item.command else None,
            }
        )
    return {"has_insights": bool(insights), "rows": rows}


_BASIS = {
    "curve": "by this data's learning curve",
    "elsewhere": "from other data sets",
    "bound": "a bound; it may be nothing",
}
