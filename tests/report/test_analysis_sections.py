"""The sections made from insights.json: values by hand, hostile names, runs without the file, and a real browser."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from topwork.evaluation.explain import overlay
from topwork.report.analysis_sections import advice, knows, labels, looks
from topwork.report.page import render, write_report
from topwork.report.pictures import Album
from topwork.report.run_data import read_record

from .conftest import HOSTILE_CLASSES, HOSTILE_FILES, MakeRun
from .test_browser import CHROMIUM, FAINT_TEXT


def add_insights(run: Path, n_suspects: int = 3) -> Path:
    """An insights.json as a fit writes it, with values that can be told apart."""
    record = read_record(run)
    part = record.predictions["test"]
    rows = part.sample_indices.tolist()
    train = np.flatnonzero(record.part_of == "train").tolist()
    right = np.zeros((7, 7))
    right[1, 1] = 2.0
    images = [
        {"row": rows[i], "predicted": int(part.predicted[i]), "label": int(part.labels[i]), "probability": 0.9,
         "maps": [right.tolist(), (-right).tolist()], "logits": [2.0, -2.0], "nearest": train[:4], "similarity": [0.9] * 4}
        for i in (0, len(rows) - 1)
    ]  # fmt: skip
    suspects = [
        {"row": row, "path": "p", "label": "l", "suggested": record.manifest.classes[0], "score": 0.9, "is_confident": True,
         "label_probability": 0.04, "suggested_probability": 0.96, "neighbors": train[:3], "neighbor_agreement": 0.0}
        for row in rows[:n_suspects]
    ]  # fmt: skip
    outcome = {"n": 12, "n_label": 9, "n_ambiguous": 2, "n_unknown": 1, "accuracy": 0.75, "wrong_left_open": 2, "n_wrong": 3,
               "accuracy_of_labels": {"value": 8 / 9, "low": 0.56, "high": 0.98}}  # fmt: skip
    points = [
        {"n": n, "accuracy": a, "low": a - 0.03, "high": a + 0.02} for n, a in ((25, 0.8), (50, 0.85), (100, 0.9))
    ]
    insights = {
        "suspects": suspects,
        "n_suspects": n_suspects,
        "n_audited": len(record.manifest.samples),
        "outliers": [{"row": rows[0], "distance": 0.7, "neighbors": train[:2]}],
        "duplicates": {"test": {"n_repeated": 2, "n_without": 10, "accuracy": 0.75,
                                "accuracy_without": {"value": 0.7, "low": 0.4, "high": 0.9}}},
        "decisions": {"thresholds": {"unknown": 0.5, "unknown_false_alarm_rate": 0.01, "set_probability": 0.2,
                                     "set_coverage": 0.975, "confidence": None}, "parts": {"test": outcome}},
        "explanations": {"method": "activation", "part": "test", "images": images},
        "learning_curve": {"points": points, "forecasts": [{"n": n, "accuracy": a, "low": a - 0.02, "high": a + 0.02}
                           for n, a in ((125, 0.91), (250, 0.93), (500, 0.94))], "gain": [0.02, 0.005, 0.04],
                           "floor": 0.02, "scale": 1.0, "exponent": 0.5, "line": [[25, 0.8], [125, 0.91], [500, 0.94]]},
        "advice": [{"name": "images", "title": "More images", "text": "Twice the images bring +2.0 points.",
                    "gain": [0.02, 0.005, 0.04], "basis": "curve", "minutes": 0.0, "person_minutes": 21.0, "command": None}],
    }  # fmt: skip
    (run / "insights.json").write_text(json.dumps(insights))
    return run


def test_values_by_hand(make_run: MakeRun) -> None:
    record, album = read_record(add_insights(make_run())), Album()
    seen = looks(record, album)
    assert [card["is_wrong"] for card in seen["cards"]] == [True, False]
    assert [len(card["maps"]) for card in seen["cards"]] == [2, 1]
    found = knows(record, album)
    row = found["outcomes"][0]
    assert [share for _, _, share in row["shares"]] == ["75.0\u202f%", "16.7\u202f%", "8.3\u202f%"]
    assert (row["right"], row["left_open"], row["n_wrong"]) == ("88.9\u202f%", 2, 3)
    assert len(found["rule"]) == 2
    xs = [x for x, *_ in found["curve"]["points"]]
    assert xs == sorted(xs)
    listed = labels(record, album)
    assert len(listed["cards"]) == 3
    assert "2 images of test show the same as another image" in listed["repeats"][0]
    assert advice(record, album)["rows"][0]["gain"]["value"] == "+2.0"


def test_the_report_shows_the_sections_in_order(make_run: MakeRun) -> None:
    page = render(read_record(add_insights(make_run())))
    places = [
        page.index(f'<section id="{name}"') for name in ("mistakes", "looks", "knows", "labels", "advice", "reproduce")
    ]
    assert places == sorted(places)
    assert "Twice the images bring" in page
    assert "insights.json: it was made by" not in page


def test_a_run_without_insights_says_so(make_run: MakeRun) -> None:
    page = render(read_record(make_run()))
    assert page.count("This run holds no insights.json") == 4


def test_a_damaged_file_is_no_obstacle(make_run: MakeRun) -> None:
    run = make_run()
    (run / "insights.json").write_text("{")
    assert "This run holds no insights.json" in render(read_record(run))


def test_pictures_of_gone_files_are_named(make_run: MakeRun) -> None:
    run = add_insights(make_run())
    record = read_record(run)
    for path in record.manifest.root.rglob("*.jpg"):
        path.unlink()
    assert "the file is gone" in render(record)


def test_many_suspects_keep_the_page_small(make_run: MakeRun) -> None:
    run = add_insights(make_run(n_each=200), n_suspects=60)
    page = render(read_record(run))
    assert len(re.findall('<figure class="suspect">', page)) == 40
    assert len(page) < 5_000_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not Path(CHROMIUM).exists():
        pytest.skip("no Chromium here")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser_with_hostile_names(browser: Any, make_run: MakeRun, width: int, scheme: str) -> None:
    run = add_insights(make_run(HOSTILE_CLASSES, n_each=8, names=HOSTILE_FILES))
    path = write_report(run)
    said: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(path.as_uri())
    assert page.evaluate("window.pwned") is None
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator("#looks .look").count() == 2
    assert page.locator("#labels .suspect").count() == 3
    assert page.evaluate(FAINT_TEXT) == []
    assert said == []
    page.close()


def test_the_overlay_is_where_the_evidence_is() -> None:
    from topwork.data.transforms import InputSpec

    evidence = np.zeros((7, 7), np.float32)
    evidence[6, 6] = 1
    picture = np.full((70, 140, 3), 90, np.uint8)
    drawn = overlay(picture, evidence, InputSpec(), 1.0).astype(int)
    assert np.abs(drawn[-8:, -8:] - 90).max() > 60
    assert np.abs(drawn[:30, :60] - 90).max() <= 1
