"""The report as Markdown and JSON: the same figures, and names that break nothing."""

from __future__ import annotations

import json
import re

import numpy as np

from topwork.report.markdown import as_json, markdown, write_plain
from topwork.report.run_data import read_record

from .conftest import HOSTILE_CLASSES, HOSTILE_FILES, MakeRun
from .test_analysis_sections import add_insights


def test_markdown_holds_the_figures_and_the_advice(make_run: MakeRun) -> None:
    run = add_insights(make_run())
    text = write_plain(run, "md").read_text()
    evaluation = json.loads((run / "evaluation.json").read_text())
    value = f"{100 * evaluation['test']['accuracy']['value']:.1f}\u202f%"
    assert f"| Accuracy | {value} |" in text
    scores, spans = evaluation["test"]["per_class"]["ants"], evaluation["test"]["per_class_intervals"]["ants"]["f1"]
    assert (
        f"{100 * scores['f1']:.1f}\u202f% ({100 * spans['low']:.0f}\u202f% to {100 * spans['high']:.0f}\u202f%)" in text
    )
    loss = -np.log(0.05)  # of a mistake stated with 95 %
    assert f"| {loss:.2f} |" in text
    assert "## What would help most" in text
    assert "## Labels to check" in text
    assert "topwork fit" in text


def test_names_break_no_table_and_start_no_tag(make_run: MakeRun) -> None:
    text = markdown(read_record(add_insights(make_run(HOSTILE_CLASSES, n_each=6, names=HOSTILE_FILES))))
    body = text[: text.index("## Reproduce")]
    assert not re.search(r"(?<!\\)<", body)
    tables = [line for line in body.splitlines() if line.startswith("| ")]
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in tables}
    assert widths <= {4, 5, 6, 7}


def test_json_holds_everything(make_run: MakeRun) -> None:
    run = add_insights(make_run())
    found = json.loads(write_plain(run, "json").read_text())
    assert found["evaluation"] == json.loads((run / "evaluation.json").read_text())
    assert found["insights"]["advice"][0]["name"] == "images"
    assert len(found["summary"]) == 5
    assert as_json(read_record(run)).keys() == found.keys()
