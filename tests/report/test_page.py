from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from topwork.data.manifest import load_manifest
from topwork.errors import TopworkError, UsageError
from topwork.report import pictures, results
from topwork.report.charts import line_plot, log_ticks, ticks
from topwork.report.page import write_report
from topwork.report.pictures import Album
from topwork.report.run_data import read_record
from topwork.report.sections import epoch_plots, quote, repeat_command
from topwork.report.summary import sentences, weakest_class
from topwork.text import escape, percent

from .conftest import HOSTILE_CLASSES, HOSTILE_FILES, MakeRun


class Page(HTMLParser):
    """Tags with attributes, and the text outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self.words: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside in self.raw:
            self.raw[self._inside].append(data)
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"[ \n]+", " ", " ".join(self.words))  # and not the narrow space before a percent sign

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def page_of(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


def test_every_number_is_there_without_the_script(make_run: MakeRun) -> None:
    run = make_run()
    page, judged = page_of(run), json.loads((run / "evaluation.json").read_text())
    for part in ("valid", "test"):
        for metric in ("balanced_accuracy", "macro_f1", "ece"):
            assert percent(judged[part][metric]) in page.text
        for bound in ("value", "low", "high"):
            assert percent(judged[part]["accuracy"][bound]) in page.text
    cells = [attributes for tag, attributes in page.tags if tag == "td" and "data-cell" in attributes]
    seen = [int(cell["data-n"] or "") for cell in cells]
    assert seen == [*np.ravel(judged["test"]["confusion"]), *np.ravel(judged["valid"]["confusion"])]


def test_page_runs_and_loads_nothing_but_its_own(make_run: MakeRun) -> None:
    page = page_of(make_run())
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a) or ""
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in
               (page.raw["style"][0], page.raw["script"][-1])]  # fmt: skip
    assert policy.startswith("default-src 'none';")
    assert f"style-src 'sha256-{digests[0]}'" in policy
    assert f"script-src 'sha256-{digests[1]}'" in policy
    for _, attributes in page.tags:
        assert not [name for name in attributes if name == "style" or name.startswith("on")]
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#"))


def test_hostile_names_are_text(make_run: MakeRun) -> None:
    run = make_run(HOSTILE_CLASSES, n_each=8, names=HOSTILE_FILES, rejects=["bad <script>\n.jpg"])
    page = page_of(run)
    assert page.count("script") == 2
    assert not [a for t, a in page.tags if t == "img" and not (a["src"] or "").startswith("data:image/jpeg;base64,")]
    for name in HOSTILE_CLASSES:
        assert escape(name) in page.text
    assert "/bad <script>\\n.jpg" in page.text
    data = json.loads(page.raw["script"][0])
    assert sorted(data["classes"]) == sorted(escape(name) for name in HOSTILE_CLASSES)
    assert "</" not in page.raw["script"][0]
    assert "\u2028" not in page.raw["script"][0]


def test_missing_and_changed_images_leave_a_placeholder(make_run: MakeRun) -> None:
    run = make_run(n_wrong=3)
    record = read_record(run)
    rows = [int(row) for p in record.predictions.values() for row in p.sample_indices[~p.correct]]
    (record.manifest.root / record.manifest.samples[rows[0]].path).unlink()
    (record.manifest.root / record.manifest.samples[rows[1]].path).write_bytes(b"something else")
    page = page_of(run)
    assert page.words.count("the file is gone") == 1
    assert page.words.count("the file has changed since") == 1
    assert "1 picture is not shown: the file is gone." in page.text
    (record.manifest.root).rename(record.manifest.root.with_name("moved"))
    assert page_of(run).count("img") == 0


@pytest.mark.parametrize(("valid", "test"), [(0.3, 0.0), (0.0, 0.3), (0.0, 0.0), (0.2, 0.2)])
def test_any_combination_of_parts(make_run: MakeRun, valid: float, test: float) -> None:
    page = page_of(make_run(valid=valid, test=test))
    titles = [a["id"] for t, a in page.tags if t == "h3" and "id" in a]
    assert titles == ["part-test"] * (test > 0) + ["part-valid"] * (valid > 0)
    assert ("There is no test part" in page.text) == (valid > 0 and test == 0)
    assert ("nothing can be said about how good it is" in page.text) == (valid == 0 and test == 0)


def test_many_classes_are_cut_and_it_is_said(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "MAX_MISTAKES", (10, 5))
    page = page_of(make_run([f"class {i}" for i in range(50)], n_each=4, valid=0.0, test=0.5))
    assert sum(t == "td" and "data-cell" in a for t, a in page.tags) == 40 * 40
    assert "The 40 classes with most mistakes, of 50" in page.text
    assert "Shown are the 10 with the highest loss; all are in predictions.parquet." in page.text


def test_without_a_mistake(make_run: MakeRun) -> None:
    page = page_of(make_run(n_wrong=0))
    assert "No mistake was made" in page.text
    assert "That is no promise" in page.text


def test_pictures_are_small_and_bounded(make_run: MakeRun) -> None:
    manifest = load_manifest(make_run() / "manifest.parquet")
    album = Album()
    for row in range(10):
        album.want(row, importance=10 - row)
    whole = album.make(manifest)
    assert all(p.source and max(p.width, p.height) <= pictures.SIDE for p in whole.values())
    length = max(len(p.source or "") for p in whole.values())
    kept = {row for row, p in album.make(manifest, max_characters=3 * length).items() if p.source}
    assert kept == {9, 8, 7}  # the most important ones


def test_no_run_and_damaged_run_are_named(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no finished run"):
        write_report(tmp_path)
    run = make_run()
    (run / "predictions.parquet").write_bytes(b"PAR1")
    with pytest.raises(TopworkError, match="damaged"):
        write_report(run)


def test_report_that_cannot_be_written_is_named_and_leaves_nothing(make_run: MakeRun) -> None:
    run = make_run()
    (run / "report.html").mkdir()
    (run / "report.html" / "x").touch()
    with pytest.raises(TopworkError, match="cannot be written"):
        write_report(run)
    assert not list(run.glob("*.partial")) + list(run.glob(".*.partial"))


def test_same_run_same_page(make_run: MakeRun) -> None:
    run = make_run()
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


# ---- sentences


def test_weak_class_needs_evidence(make_run: MakeRun) -> None:
    # One mistake in each class: no class stands out.
    record = read_record(make_run(n_each=20, n_wrong=1))
    assert (weakest_class(record, "test") or ("", 0, 0, 0.0))[3] > 0.5
    assert any("No class is clearly weaker" in sentence for sentence in sentences(record))
    # All ants wrong, no bee: by hand, a chance far below 1 in 1,000.
    judged = record.evaluation["test"]
    judged["confusion"] = [[0, 6], [0, 6]]
    record.__dict__.pop("_confusions")
    name, n_right, n, chance = weakest_class(record, "test") or ("", 0, 0, 1.0)
    # The others: (6 + 1) / (6 + 2) right by Laplace's rule, so 0 of 6 has probability (1/8)^6, for either of 2 classes.
    assert (name, n_right, n) == ("ants", 0, 6)
    assert chance == pytest.approx(2 * (1 / 8) ** 6)
    assert any("The weakest class is “ants” with 0 of 6 right" in sentence for sentence in sentences(record))


def test_two_classes_name_both_directions(make_run: MakeRun) -> None:
    text = " ".join(sentences(read_record(make_run())))
    assert "is taken for" in text
    assert "the other way round once" in text


def test_percent_never_rounds_to_certainty() -> None:
    assert percent(0.9996).startswith("99.96")
    assert percent(1.0).startswith("100.0")
    assert percent(0.0001).startswith("0.01")
    assert percent(0.954) == "95.4\u202f%"
    assert percent(None) == "–"


# ---- plots


def test_ticks_cover_the_values_with_round_steps() -> None:
    assert ticks(0.93, 0.96) == [0.93, 0.94, 0.95, 0.96]
    assert ticks(0, 7) == [0, 2, 4, 6, 8]
    assert ticks(3, 3)[0] <= 3 <= ticks(3, 3)[-1]
    assert log_ticks(3e-4, 1) == [1e-3, 1e-2, 0.1, 1]
    assert log_ticks(0.1, 0.3) == [0.1, 0.3]


def test_epoch_records_become_curves() -> None:
    history = [
        {"epoch": n, "train_loss": 1 / n, "valid_loss": 1.1 / n, "valid_accuracy": 1 - 0.5 / n, "rate": 0.1}
        for n in (1, 2, 3)
    ]
    loss, accuracy, rate = epoch_plots([{"candidate": "raw"}, *history])
    assert [line.name for line in loss.lines] == ["train loss", "valid loss"]
    heights = [y for _, y in loss.lines[0].dots]
    assert heights == sorted(heights)  # SVG counts from the top: a falling loss goes down
    assert accuracy.lines[0].dots[0][1] > accuracy.lines[0].dots[-1][1]
    assert len(rate.lines) == 1
    assert epoch_plots([{"candidate": "raw"}]) == []


def test_the_schedule_is_drawn_for_the_fastest_and_the_slowest_stage() -> None:
    history = [
        {
            "epoch": 1,
            "rates": {"stem": 0.0, "blocks.0": 1e-5, "head": 1e-4},
            "curve": [[0.0, 0.7, 0.1], [0.5, 0.6, 1.0]],
        },
        {"epoch": 2, "rates": {"stem": 0.0, "blocks.0": 1e-5, "head": 1e-4}, "curve": [[1.0, 0.5, 0.5]]},
    ]
    (rate,) = epoch_plots(history)
    assert rate.title == "Learning rate"
    assert [line.name for line in rate.lines] == ["head", "blocks.0"]
    assert [len(line.dots) for line in rate.lines] == [3, 3]


def test_curves_of_an_epoch_wise_run_are_drawn(make_run: MakeRun) -> None:
    run = make_run(
        history=[{"epoch": 1, "train_loss": 1.0}, {"epoch": 2, "train_loss": float("inf"), "valid_loss": 0.4}]
    )
    page = page_of(run)
    assert "Epochs" in page.words
    assert not re.search(r"\b(nan|inf)\b", " ".join(a.get("d") or "" for _, a in page.tags))


def test_a_single_point_is_drawn() -> None:
    from topwork.report.charts import Line

    plot = line_plot("t", [Line("a", ((1.0, 0.5),), 1)], "x", "y", str)
    assert plot.left < plot.lines[0].dots[0][0] < plot.right


# ---- the command to repeat a run


@pytest.mark.parametrize(
    "word", ["plain", "with space", "it's", "new\nline", "tab\t'\\", "\udcff bytes", "emoji \U0001f41c"]
)
def test_quoted_words_come_back_from_the_shell(word: str) -> None:
    printed = subprocess.run(["bash", "-c", f"printf %s {quote(word)}"], capture_output=True, check=True).stdout
    assert printed == word.encode("utf-8", "surrogateescape")


def test_command_names_what_is_not_the_default(make_run: MakeRun) -> None:
    command = repeat_command(read_record(make_run(valid=0.2, test=0.3)))
    assert "--test-fraction 0.3" in command
    assert "--seed 0" in command
    assert "--valid-fraction" not in command  # 0.2 is the default
    assert "--backbone" not in command


def test_two_classes_get_their_curves_and_the_rule_in_use_is_marked(make_run: MakeRun) -> None:
    run = make_run()
    record = read_record(run)
    drawn = results.results(record, Album())["parts"][0]["curves"]
    roc, recalled = drawn["plots"]
    matrix = np.array(record.evaluation["test"]["confusion"])
    false, true = matrix[0, 1] / matrix[0].sum(), matrix[1, 1] / matrix[1].sum()
    width, height = roc["right"] - roc["left"] - 16, roc["bottom"] - roc["top"]
    x, y = roc["lines"][1]["mark"]
    assert x == pytest.approx(roc["left"] + 8 + width * false, abs=0.05)
    assert y == pytest.approx(roc["bottom"] - height * true, abs=0.05)
    assert recalled["lines"][1]["mark"][0] == pytest.approx(roc["left"] + 8 + width * true, abs=0.05)
    assert results.results(read_record(run), Album())["parts"][0]["figures"][4]["label"] == "Average precision"
    assert "Precision against recall" in page_of(run).text


def test_the_next_step_is_the_first_advice_that_is_worth_it(make_run: MakeRun) -> None:
    run = make_run()
    advice = {"name": "tuning", "title": "Tune the network", "text": "", "gain": [0.03, 0.01, 0.05], "basis": "elsewhere",
              "minutes": 7.0, "person_minutes": 0.0, "command": None}  # fmt: skip
    (run / "insights.json").write_text(json.dumps({"advice": [advice]}))
    said = sentences(read_record(run))[-1]
    assert said.startswith(
        "Next: tune the network, which should bring about +3.0 points (+1.0 to +5.0, judging by other data"
    )
    assert "about 7 min of computing" in said
    (run / "insights.json").write_text(json.dumps({"advice": [advice | {"gain": [0.001, 0.0, 0.002]}]}))
    assert "tune the network" not in sentences(read_record(run))[-1]
