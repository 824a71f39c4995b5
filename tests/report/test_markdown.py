"""The report as Markdown and JSON: the same figures, and names that break nothing."""

from __future__ import annotations

import json
import re

from topwork.report.markdown import as_json, write_plain
from topwork.report.run_data import read_record
from topwork.text import percent

from .conftest import HOSTILE_CLASSES, HOSTILE_FILES, MakeRun, add_insights


def test_markdown_holds_the_figures_and_the_advice(make_run: MakeRun) -> None:
    run = add_insights(make_run())
    text = write_plain(run, "md").read_text()
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert f"| Accuracy on test | {percent(evaluation['test']['accuracy']['value'])} |" in text
    assert percent(evaluation["test"]["per_class"]["ants"]["f1"]) in text
    assert "## Next steps" in text
    assert "## Label errors" in text
    assert "topwork fit" in text
    assert "| predicted bees 95.0% |" in text or "bees 95.0%" in text


def test_names_break_no_table_and_start_no_tag(make_run: MakeRun) -> None:
    text = write_plain(add_insights(make_run(HOSTILE_CLASSES, n_each=6, names=HOSTILE_FILES)), "md").read_text()
    outside = re.sub(r"(`{3,})\n.*?\n\1", "", text, flags=re.DOTALL)
    assert not re.search(r"(?<!\\)<", outside)
    for block in re.split(r"\n\n+", outside):
        lines = [line for line in block.splitlines() if line.startswith("| ")]
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) <= 1


def test_json_holds_everything(make_run: MakeRun) -> None:
    run = add_insights(make_run())
    found = json.loads(write_plain(run, "json").read_text())
    assert found["evaluation"] == json.loads((run / "evaluation.json").read_text())
    assert found["insights"]["advice"][0]["name"] == "images"
    assert found["summary"][-1].startswith("Next: more images")
    assert as_json(read_record(run)).keys() == found.keys()
