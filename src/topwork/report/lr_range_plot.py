"""The curve of a learning-rate range test as an SVG file."""

from __future__ import annotations

from pathlib import Path

from topwork.commands.lr_range import Ranged
from topwork.report.examine_page import page_environment, write_page
from topwork.report.figures import stand_alone
from topwork.studies.study import Plot, Series


def range_plot(found: Ranged) -> Plot:
    """Loss over rate, with the suggestion as a dashed line."""
    test = found.test
    points = tuple(zip(test.rates.tolist(), test.losses.tolist(), strict=True))
    ends = (float(test.losses.min()), float(test.losses.max()))
    return Plot(
        title="Learning-rate range test",
        x_label="rate of the head",
        y_label="loss, smoothed",
        series=(
            Series("loss", points),
            Series(f"suggested: {test.suggestion:.1e}", tuple((test.suggestion, y) for y in ends), dashed=True),
        ),
        x_scale="log",
        note=test.reason,
    )


def write_range_plot(found: Ranged, path: Path) -> None:
    """Writes the plot, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_page(path, stand_alone(range_plot(found), page_environment()))
