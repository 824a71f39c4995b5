"""The page of ``topwork compare``: which run is better, by class, with the images the runs disagree on.

In: comparisons and the images of the first run. Out: one self-contained file without a script, in the look of the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from topwork import __version__
from topwork.commands.compare import Compared
from topwork.data.loader import in_order
from topwork.report.examine_page import page_environment, policy_of, style_of, write_page
from topwork.report.pictures import make_picture
from topwork.text import escape, percent

MAX_SHOWN = 60  # disagreements of a pair
MAX_CLASSES = 200


def write_compare_page(part: str, compared: Sequence[Compared], path: Path) -> None:
    """Writes the page.

    Raises:
        TopworkError: the file cannot be written.
    """
    style = style_of("report.css", "insights.css", "examine.css")
    page = (
        page_environment()
        .get_template("compare.html")
        .render(
            title=escape(", ".join([compared[0].first.name, *(found.second.name for found in compared)])),
            part=part,
            version=__version__,
            policy=policy_of(style),
            style=Markup(style),
            pairs=[_pair(found) for found in compared],
        )
    )
    write_page(path, page)


def _pair(found: Compared) -> dict[str, Any]:
    values = found.as_dict()
    differing = values["disagreements"]
    rows = [row["row"] for row in differing[:MAX_SHOWN]]
    pictures = list(in_order(lambda row: make_picture(found.first.manifest, row), rows))
    changed = [(name, c) for name, c in values["per_class"].items() if c["n_gained"] or c["n_lost"]]
    changed.sort(key=lambda item: (item[1]["n_lost"] - item[1]["n_gained"], item[0]))
    return {
        "first": escape(found.first.name),
        "second": escape(found.second.name),
        "sentence": escape(found.sentence),
        "classes": [
            {
                "name": escape(name),
                "n": c["n"],
                "first": percent(c["accuracy_first"]),
                "second": percent(c["accuracy_second"]),
                "gained": c["n_gained"],
                "lost": c["n_lost"],
            }
            for name, c in changed[:MAX_CLASSES]
        ],
        "cards": [
            {
                "picture": picture,
                "path": escape(row["path"]),
                "true": escape(row["label"]),
                "first": escape(row["first"]),
                "second": escape(row["second"]),
                "first_probability": percent(row["first_probability"]),
                "second_probability": percent(row["second_probability"]),
                "change": row["change"],
            }
            for row, picture in zip(differing[:MAX_SHOWN], pictures, strict=True)
        ],
        "n_differing": len(differing),
    }
