"""Charts as SVG: ticks, positions, tooltips, and names that break nothing."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from topwork.blocks import Bars, Chart, Series, Share
from topwork.report.charts import axes_of, draw, legend, log_ticks, stand_alone, ticks


def circles(text: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', text)]


def test_ticks_cover_the_values_with_round_steps() -> None:
    assert ticks(0.93, 0.96) == [0.93, 0.94, 0.95, 0.96]
    assert ticks(0, 7) == [0, 2, 4, 6, 8]
    assert ticks(3, 3)[0] <= 3 <= ticks(3, 3)[-1]
    assert log_ticks(3e-4, 1) == pytest.approx([1e-3, 1e-2, 0.1, 1])
    assert log_ticks(0.1, 0.3) == pytest.approx([0.1, 0.2]) or len(log_ticks(0.1, 0.3)) > 2
    assert log_ticks(224, 224) == [224]


def test_logarithmic_axes_put_powers_of_ten_at_equal_distances() -> None:
    chart = Chart("t", "x", "y", (Series("a", ((1, 1e-3), (10, 1e-2), (100, 1e-1))),), "log", "log")
    (x1, y1), (x2, y2), (x3, y3) = circles(draw(chart))
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.1)
    assert y1 - y2 == pytest.approx(y2 - y3, abs=0.1)


def test_bars_are_as_long_as_their_shares() -> None:
    text = draw(Bars("t", "accuracy", (("a", Share(0.25, 0.2, 0.3)), ("b", Share(0.5, 0.4, 0.6)))))
    first, second = (float(w) for w in re.findall(r'class="value"[^>]* width="([\d.]+)"', text))
    assert 2 * first == pytest.approx(second, abs=0.1)


def test_differences_lie_on_both_sides_of_zero() -> None:
    rows = (("worse", Share(-0.02, -0.04, 0.0)), ("better", Share(0.03, 0.01, 0.05)))
    text = draw(Bars("t", "points", rows, is_difference=True))
    zero = float(re.findall(r'class="zero" d="M([\d.]+)', text)[0])
    worse, better = (float(x) for x in re.findall(r'class="point" cx="([\d.]+)"', text))
    assert worse < zero < better
    assert "better: +3.0 (+1.0 to +5.0)" in text


def test_every_point_says_its_numbers() -> None:
    series = Series("model", ((0.5, 0.8), (0.6, 0.9)), ((0.7, 0.85), (0.8, 1.0)))
    text = draw(Chart("t", "x", "accuracy", (series,), y_is_share=True))
    assert "<title>x 0.5, accuracy 80.0% (70.0% to 85.0%)</title>" in text
    assert text.count("<title>") == 2


def test_names_are_escaped_in_pages_and_files() -> None:
    evil = "<script>alert(1)</script>\n"
    chart = Chart(evil, evil, evil, (Series(evil, ((0, 1), (1, 2))), Series("b", ((0, 2), (1, 3)))))
    for text in (draw(chart), stand_alone(chart), stand_alone(Bars(evil, evil, ((evil, Share(0.5, 0.4, 0.6)),)))):
        ElementTree.fromstring(text)
        assert "<script" not in text
    assert [name for name, _ in legend(chart)][1] == "b"


def test_one_point_and_no_spread_are_drawn_inside() -> None:
    text = draw(Chart("t", "x", "y", (Series("a", ((1.0, 0.5),)),)))
    (x, y) = circles(text)[0]
    assert 60 < x < 460
    assert 0 < y < 290
    assert "nan" not in text


def test_a_share_axis_ends_at_one() -> None:
    _, y, _, y_ticks = axes_of(Chart("t", "x", "y", (Series("a", ((0, 0.93), (1, 0.999))),), y_is_share=True))
    assert y.high == 1.0
    assert y_ticks[-1][1] == "100%"


def test_colors_do_not_repeat_up_to_twelve() -> None:
    series = tuple(Series(str(n), ((0, n), (1, n))) for n in range(12))
    assert len({style for _, style in legend(Chart("t", "x", "y", series))}) == 12
