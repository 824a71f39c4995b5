"""The page of ``topwork compare-domains``: distances, classes that shift, expected accuracy, the farthest images.

In: comparisons. Out: one self-contained file without a script, in the look of the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from topwork import __version__
from topwork.commands.compare_domains import ComparedDomains
from topwork.data.loader import in_order
from topwork.report.examine_page import page_environment, policy_of, style_of, write_page
from topwork.report.pictures import make_picture
from topwork.text import escape, percent


def write_domains_page(compared: Sequence[ComparedDomains], path: Path) -> None:
    """Writes the page.

    Raises:
        TopworkError: the file cannot be written.
    """
    style = style_of("report.css", "insights.css", "examine.css")
    page = (
        page_environment()
        .get_template("domains.html")
        .render(
            title=escape(compared[0].name_a),
            version=__version__,
            policy=policy_of(style),
            style=Markup(style),
            pairs=[_pair(found) for found in compared],
        )
    )
    write_page(path, page)


def _pair(found: ComparedDomains) -> dict[str, Any]:
    values = found.as_dict()
    pictures = list(in_order(lambda row: make_picture(found.manifest, row), list(found.farthest)))
    return {
        "a": values["a"],
        "b": values["b"],
        "sentence": values["sentence"],
        "notes": values["notes"],
        "figures": [
            ("Energy distance", f"{found.distance.energy:.3f}", f"{found.distance.expected:.3f} expected by chance"),
            ("p-value", f"{found.distance.p_value:.3f}", "permutation test"),
            ("Linear separability", f"{found.distance.auc:.2f}", "AUC; 0.5: not separable"),
            *(
                [("Expected accuracy", _figure(values["expected_accuracy"]), "of the model, without labels")]
                if found.expected
                else []
            ),
            *([("Measured accuracy", _figure(values["accuracy"]), "on the labeled images")] if found.measured else []),
        ],
        "classes": [
            row
            | {
                "shift": "–" if row["shift"] is None else f"{row['shift']:.2f}",
                "moves": "–" if row["moves"] is None else "yes" if row["moves"] else "not significant",
                "expected": _figure(row["expected"]),
                "accuracy": _figure(row["accuracy"]),
            }
            for row in values["classes"]
        ],
        "cards": [
            {"picture": picture, "path": path} for picture, path in zip(pictures, values["farthest"], strict=True)
        ],
    }


def _figure(figure: dict[str, float] | None) -> str:
    return (
        "–"
        if not figure
        else f"{percent(figure['value'], 0)} ({percent(figure['low'], 0).rstrip('%')}–{percent(figure['high'], 0).rstrip('%')})"
    )
