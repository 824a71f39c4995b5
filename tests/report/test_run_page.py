"""The report of a run: the figures of its files, sentences that follow from them, bounded size, old and damaged runs."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from topwork.blocks import Chart, Fold, Gallery, Special, Table
from topwork.data.manifest import load_manifest
from topwork.errors import TopworkError, UsageError
from topwork.evaluation.explain import overlay
from topwork.evaluation.predictions import Predictions
from topwork.report import pictures
from topwork.report.pictures import Album
from topwork.report.run_data import read_record
from topwork.report.run_page import as_json, render, sections_of, write_report
from topwork.report.sections import errors
from topwork.report.sections.confidence import confidence
from topwork.report.sections.data import label_errors, repeats
from topwork.report.sections.errors import heatmaps
from topwork.report.sections.summary import headline_of, sentences, weakest_class
from topwork.report.sections.training import epoch_charts, repeat_command
from topwork.run import write_json
from topwork.settings import fit_command, quote
from topwork.text import escape, percent, percent_ci

from .conftest import HOSTILE_CLASSES, HOSTILE_FILES, MakeRun, add_insights
from .test_page import Page


def page_of(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


def test_every_number_is_there_without_the_script(make_run: MakeRun) -> None:
    run = make_run()
    page, evaluation = page_of(run), json.loads((run / "evaluation.json").read_text())
    for part in ("valid", "test"):
        for metric in ("balanced_accuracy", "macro_f1", "ece"):
            assert percent(evaluation[part][metric]) in page.text
        accuracy = evaluation[part]["accuracy"]
        assert percent(accuracy["value"]) in page.text
        assert f"95% CI {percent(accuracy['low'])[:-1]}–{percent(accuracy['high'])[:-1]}" in page.text
    cells = [attributes for tag, attributes in page.tags if tag == "td" and "data-cell" in attributes]
    seen = [int(cell["data-n"] or "") for cell in cells]
    assert seen == [*np.ravel(evaluation["test"]["confusion"]), *np.ravel(evaluation["valid"]["confusion"])]


def test_the_sections_come_in_the_order_a_reader_asks(make_run: MakeRun) -> None:
    record = read_record(add_insights(make_run()))
    names = [section.name for section in sections_of(record, Album())]
    assert names == ["result", "errors", "heatmaps", "confidence", "labels", "next", "data", "training", "settings"]


def test_a_run_without_insights_leaves_those_sections_out(make_run: MakeRun) -> None:
    run = make_run()
    assert [s.name for s in sections_of(read_record(run), Album())] == ["result", "errors", "confidence", "data", "training", "settings"]  # fmt: skip
    (run / "insights.json").write_text("{")
    assert "heatmaps" not in [s.name for s in sections_of(read_record(run), Album())]


def test_the_backbone_is_called_what_the_user_called_it(make_run: MakeRun) -> None:
    run = make_run()
    text = page_of(run).text
    assert "frozen features of lite0 (tf_efficientnet_lite0), trained on" in text
    recipe = json.loads((run / "recipe.json").read_text())
    for name, shown in (
        ("/a/folder" * 9, "of tf_efficientnet_lite0, trained"),
        ("random:tf_efficientnet_lite0", "of random:tf_efficientnet_lite0, trained"),
    ):
        (run / "recipe.json").write_text(json.dumps(recipe | {"backbone": name}))
        assert shown in page_of(run).text


def test_hostile_names_are_text(make_run: MakeRun) -> None:
    run = add_insights(make_run(HOSTILE_CLASSES, n_each=8, names=HOSTILE_FILES, rejects=["bad <script>\n.jpg"]))
    page = page_of(run)
    assert page.count("script") == 2
    sources = [a["src"] or "" for t, a in page.tags if t == "img" and "src" in a]
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
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
    assert page.words.count("file not found") == 1
    assert page.words.count("file has changed") == 1
    assert "1 picture is not shown: file not found." in page.text
    (record.manifest.root).rename(record.manifest.root.with_name("moved"))
    assert page_of(run).count("img") == 1  # the one that enlarges others


@pytest.mark.parametrize(("valid", "test"), [(0.3, 0.0), (0.0, 0.3), (0.0, 0.0), (0.2, 0.2)])
def test_any_combination_of_parts(make_run: MakeRun, valid: float, test: float) -> None:
    page = page_of(make_run(valid=valid, test=test))
    matrices = [a["data-part"] for t, a in page.tags if t == "div" and "data-part" in a]
    assert matrices == ["test"] * (test > 0) + ["valid"] * (valid > 0)
    assert ("There is no test part" in page.text) == (valid > 0 and test == 0)
    assert ("the accuracy is unknown" in page.text) == (valid == 0 and test == 0)


def test_many_classes_are_cut_and_it_is_said(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "MAX_MISTAKES", (10, 5))
    page = page_of(make_run([f"class {i}" for i in range(50)], n_each=4, valid=0.0, test=0.5))
    assert sum(t == "td" and "data-cell" in a for t, a in page.tags) == 40 * 40
    assert "The 40 classes with most errors, of 50" in page.text
    assert sum("data-true" in a for _, a in page.tags) == 10


def test_pictures_are_small_and_bounded(make_run: MakeRun) -> None:
    manifest = load_manifest(make_run() / "manifest.parquet")
    album = Album()
    for row in range(10):
        album.want(row, importance=10 - row)
    whole = album.make(manifest)
    assert all(p.source and max(p.width, p.height) <= pictures.SIDES[0][1] for p in whole.values())
    length = max(len(p.source or "") for p in whole.values())
    kept = {row for row, p in album.make(manifest, max_characters=3 * length).items() if p.source}
    assert kept == {9, 8, 7}  # the most important ones
    album.want(9, 1)  # shown twice
    kept = {row for row, p in album.make(manifest, max_characters=3 * length).items() if p.source}
    assert kept == {9, 8}


def test_many_suspects_keep_the_page_small(make_run: MakeRun) -> None:
    run = add_insights(make_run(n_each=200), n_suspects=60)
    (gallery,) = [b for b in label_errors(read_record(run), Album()) if isinstance(b, Gallery)]
    assert len(gallery.cards) == 40
    assert (write_report(run)).stat().st_size < 5_000_000


def test_no_run_and_damaged_run_are_named(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no finished run"):
        write_report(tmp_path)
    run = make_run()
    (run / "predictions.parquet").write_bytes(b"PAR1")
    with pytest.raises(TopworkError, match="damaged"):
        write_report(run)


def test_same_run_same_page(make_run: MakeRun) -> None:
    run = add_insights(make_run())
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


# ---- the result


def test_accuracy_comes_first_with_its_interval_and_the_baseline(make_run: MakeRun) -> None:
    record = read_record(make_run())
    headline = headline_of(record)
    assert headline is not None
    assert headline.label == "Accuracy on test"
    assert headline.bar.share.value == record.evaluation["test"]["accuracy"]["value"]
    assert headline.bar.base == 0.5
    assert headline.hint == "Always predicting the most frequent class: 50.0%"


@pytest.mark.parametrize("n", [1, 2])
def test_with_leaks_the_accuracy_without_them_comes_first(make_run: MakeRun, n: int) -> None:
    run = make_run()
    evaluation = json.loads((run / "evaluation.json").read_text())
    clean = {"n": 10, "accuracy": {"value": 0.7, "low": 0.4, "high": 0.9}}
    evaluation |= {"test_without_leaks": clean, "leaks": {"test": {"n_leaked": n, "without": clean}}}
    write_json(run / "evaluation.json", evaluation)
    record = read_record(run)
    headline = headline_of(record)
    assert headline is not None
    assert (headline.label, headline.bar.share.value) == ("Accuracy on test without leaked images", 0.7)
    assert percent(evaluation["test"]["accuracy"]["value"]) in headline.hint
    start = "1 image of test is also in train;" if n == 1 else "2 images of test are also in train;"
    assert any(text.startswith(start) for text in sentences(record))


def adapted(run: Path, *, measured: bool) -> Path:
    """What ``topwork adapt`` adds to a run, by hand."""
    figure = {"n": 50, "accuracy": {"value": 0.8, "low": 0.7, "high": 0.9}}
    before = {"n": 50, "accuracy": {"value": 0.6, "low": 0.5, "high": 0.7}}
    if measured:
        evaluation = json.loads((run / "evaluation.json").read_text())
        evaluation["domains"] = {"target": {"before": before, "after": figure}, "source": {"part": None, "before": None, "after": None}}  # fmt: skip
        write_json(run / "evaluation.json", evaluation)
    spots = [[0.0, 0.0, 0], [1.0, 1.0, 1]]
    choice = {"outcome": "adapted", "method": "centered", "reason": "It is better.", "tried": [],
              "distance": {"p_value": 0.001, "energy": 0.5, "expected": 0.1, "auc": 0.9}}  # fmt: skip
    share = {"value": 0.75, "low": 0.6, "high": 0.9}
    per_class = [{"name": name, "n": 0, "source": 0.9, "before": None, "after": None, "answered_before": 1, "answered_after": 2,
                  "expected_before": 0.5, "expected_after": 0.6} for name in ("ants", "bees")]  # fmt: skip
    write_json(run / "domains.json", {
        "choice": choice, "n_target": 50, "n_known": 0, "n_changed": 1, "per_class": per_class, "changed": [], "notes": [],
        "predicted": {"before": share | {"value": 0.55}, "after": share}, "map": {"source": spots, "target": spots},
        "asked": {"n": 3, "rows": [0, 1, 2]},
    })  # fmt: skip
    return run


@pytest.mark.parametrize("measured", [True, False])
def test_an_adapted_run_is_headed_by_the_target(make_run: MakeRun, measured: bool) -> None:
    record = read_record(adapted(make_run(), measured=measured))
    headline = headline_of(record)
    assert headline is not None
    if measured:
        assert (headline.label, headline.bar.share.value) == ("Accuracy on the target", 0.8)
        assert headline.hint == "Before adaptation: 60.0%"
    else:
        assert (headline.label, headline.bar.share.value) == ("Expected accuracy on the target", 0.75)
        assert headline.basis == "estimated without target labels"
    page = Page(render(record))
    assert "1 of 50 target images has a different prediction than before." in page.text
    assert "None" not in page.text


def test_the_folder_of_an_evaluation_gets_the_same_page(make_run: MakeRun) -> None:
    run = make_run(valid=0.0)
    for name in ("recipe.json", "split.json", "history.jsonl"):
        (run / name).unlink()
    write_json(
        run / "settings.json",
        {"path": "new", "model": "runs/pets", "command": ["topwork", "evaluate", "runs/pets", "new data"]},
    )
    record = read_record(run)
    assert [section.name for section in sections_of(record, Album())] == [
        "result",
        "errors",
        "confidence",
        "data",
        "settings",
    ]
    page = page_of(run)
    assert "The model “runs/pets” on 40 images of new." in page.text
    assert "topwork evaluate runs/pets 'new data'" in page.text
    assert "None" not in page.text
    assert "Traceback" not in write_report(run, "md").read_text()


# ---- sentences


def test_weak_class_needs_evidence(make_run: MakeRun) -> None:
    # One mistake in each class: no class stands out.
    record = read_record(make_run(n_each=20, n_wrong=1))
    assert (weakest_class(record, "test") or ("", 0, 0, 0.0))[3] > 0.5
    assert any("No class is clearly weaker" in sentence for sentence in sentences(record))
    # All ants wrong, no bee: by hand, a chance far below 1 in 1,000.
    labels, all_bees = np.repeat([0, 1], 6), np.tile([0.0, 9.0], (12, 1))
    record.predictions["test"] = Predictions(("ants", "bees"), np.arange(12), labels, all_bees)
    name, n_right, n, chance = weakest_class(record, "test") or ("", 0, 0, 1.0)
    # The others: (6 + 1) / (6 + 2) right by Laplace's rule, so 0 of 6 has probability (1/8)^6, for either of 2 classes.
    assert (name, n_right, n) == ("ants", 0, 6)
    assert chance == pytest.approx(2 * (1 / 8) ** 6)
    assert any("Weakest class: “ants” with 0.0% (0 of 6)." in sentence for sentence in sentences(record))


@pytest.mark.parametrize(("n_wrong", "text"), [
    (0, "No errors."),
    (1, "1 image of “bees” was predicted as “ants”, 1 the other way round."),
    (2, "2 images of “bees” were predicted as “ants”, 2 the other way round."),
])  # fmt: skip
def test_errors_in_words_for_none_one_and_many(make_run: MakeRun, n_wrong: int, text: str) -> None:
    said = " ".join(sentences(read_record(make_run(n_wrong=n_wrong))))
    assert text in said
    assert ("an error rate of up to" in said) == (n_wrong == 0)
    assert "100.0–100.0" not in said


@pytest.mark.parametrize(
    ("value", "low", "high", "text"),
    [
        (0.999998, 0.99997, 1.0, "99.9% (95% CI 99.9–100.0)"),
        (1.0, 1.0, 1.0, "100.0%"),
        (0.9999999, 0.9999998, 0.99999999, "99.9%"),
        (0.00001, 0.0, 0.00002, "0.1% (95% CI 0.0–0.1)"),
        (0.948, 0.912, 0.97, "94.8% (95% CI 91.2–97.0)"),
    ],
)
def test_shares_next_to_none_and_all(value: float, low: float, high: float, text: str) -> None:
    assert percent_ci({"value": value, "low": low, "high": high}) == text


def test_the_next_step_is_the_first_advice_that_is_worth_it(make_run: MakeRun) -> None:
    run = make_run()
    advice = {"name": "tuning", "title": "Tune the network", "text": "", "gain": [0.03, 0.01, 0.05], "basis": "elsewhere",
              "minutes": 7.0, "person_minutes": 0.0, "command": None}  # fmt: skip
    write_json(run / "insights.json", {"advice": [advice]})
    said = sentences(read_record(run))[-1]
    assert said == "Next: tune the network; +3.0 points expected (+1.0 to +5.0)."
    labels = advice | {"name": "labels", "title": "Check labels", "gain": None, "basis": None}
    write_json(run / "insights.json", {"advice": [advice | {"gain": [0.001, 0.0, 0.002]}, labels]})
    assert sentences(read_record(run))[-1] == "Next: check labels."


@pytest.mark.parametrize("n", [1, 2])
def test_repeats_and_leaks_for_one_and_many(n: int) -> None:
    share = {"value": 0.9, "low": 0.8, "high": 0.95}
    found = repeats({"test": {"n_repeated": n, "n_without": n, "accuracy_without": share}}, {"test": {"accuracy": share}, "test_without_leaks": {"accuracy": share}, "leaks": {"test": {"n_leaked": n}}})  # fmt: skip
    if n == 1:
        assert found[0] == "1 image of test is also in train (the same picture, or one of the same group). Accuracy without it: 90.0% (95% CI 80.0–95.0); with it: 90.0% (95% CI 80.0–95.0)."  # fmt: skip
        assert found[1].startswith("1 image of test repeats another image of test.")
    else:
        assert found[0] == "2 images of test are also in train (the same picture, or one of the same group). Accuracy without them: 90.0% (95% CI 80.0–95.0); with them: 90.0% (95% CI 80.0–95.0)."  # fmt: skip
        assert found[1].startswith("2 images of test repeat another image of test.")


# ---- values by hand


def test_values_by_hand(make_run: MakeRun) -> None:
    record, album = read_record(add_insights(make_run())), Album()
    (gallery,) = [block for block in heatmaps(record, album) if isinstance(block, Gallery)]
    assert [len(card.tiles) for card in gallery.cards] == [3, 2]  # the error also has the map of the true class
    blocks = confidence(record, album)
    table = next(b for b in blocks[0].columns[1] if isinstance(b, Table))  # type: ignore[union-attr]
    assert [cell.text for cell in table.rows[0][2:]] == ["75.0%", "16.7%", "8.3%"]  # type: ignore[union-attr]
    listed = [b for b in label_errors(record, album) if isinstance(b, Gallery)]
    assert len(listed[0].cards) == 3


def test_two_classes_get_their_curves_and_the_rule_in_use_is_marked(make_run: MakeRun) -> None:
    record = read_record(make_run())
    (fold,) = [block for block in confidence(record, Album()) if isinstance(block, Fold)]
    (roc,), (recalled,) = fold.blocks[0].columns  # type: ignore[union-attr]
    assert isinstance(roc, Chart)
    assert isinstance(recalled, Chart)
    matrix = np.array(record.evaluation["test"]["confusion"])
    false, true = matrix[0, 1] / matrix[0].sum(), matrix[1, 1] / matrix[1].sum()
    assert roc.series[1].mark == pytest.approx((false, true))
    assert recalled.series[1].mark == pytest.approx((true, matrix[1, 1] / matrix[:, 1].sum()))
    thresholds = fold.blocks[1]
    assert isinstance(thresholds, Table)
    assert thresholds.rows[0][0] == "50.0% (in use)"
    wanted = [row[1].value for row in thresholds.rows[1:]]  # type: ignore[union-attr]
    assert all(recall >= least for recall, least in zip(wanted, (0.9, 0.95, 0.99), strict=True))


def test_epoch_records_become_charts() -> None:
    history = [
        {"epoch": n, "train_loss": 1 / n, "valid_loss": 1.1 / n, "valid_accuracy": 1 - 0.5 / n, "rate": 0.1}
        for n in (1, 2, 3)
    ]
    loss, accuracy, rate = epoch_charts([{"candidate": "raw"}, *history])
    assert [series.name for series in loss.series] == ["train loss", "valid loss"]
    assert accuracy.y_is_share
    assert len(rate.series) == 1
    assert epoch_charts([{"candidate": "raw"}]) == []


def test_the_schedule_is_drawn_for_the_fastest_and_the_slowest_stage() -> None:
    rates = {"stem": 0.0, "blocks.0": 1e-5, "head": 1e-4}
    history = [
        {"epoch": 1, "rates": rates, "curve": [[0.0, 0.7, 0.1], [0.5, 0.6, 1.0]]},
        {"epoch": 2, "rates": rates, "curve": [[1.0, 0.5, 0.5]]},
    ]
    (rate,) = epoch_charts(history)
    assert [series.name for series in rate.series] == ["head", "blocks.0"]
    assert [len(series.points) for series in rate.series] == [3, 3]


def test_curves_of_a_diverged_run_are_drawn(make_run: MakeRun) -> None:
    history = [{"epoch": 1, "train_loss": 1.0}, {"epoch": 2, "train_loss": float("inf"), "valid_loss": 0.4}]
    page = page_of(make_run(history=history))
    assert "Loss" in page.words
    assert not re.search(r"\b(nan|inf)\b", " ".join(a.get("d") or "" for _, a in page.tags))


def test_the_matrix_has_a_table_for_markdown(make_run: MakeRun) -> None:
    record = read_record(make_run())
    (matrix, *_) = [b for b in errors.errors(record, Album()) if isinstance(b, Special)]
    (table,) = matrix.plain
    assert isinstance(table, Table)
    assert [list(row[1:]) for row in table.rows] == record.evaluation["test"]["confusion"]


def test_the_overlay_is_where_the_evidence_is() -> None:
    from topwork.data.transforms import InputSpec

    evidence = np.zeros((7, 7), np.float32)
    evidence[6, 6] = 1
    picture = np.full((70, 140, 3), 90, np.uint8)
    drawn = overlay(picture, evidence, InputSpec(), 1.0).astype(int)
    assert np.abs(drawn[-8:, -8:] - 90).max() > 60
    assert np.abs(drawn[:30, :60] - 90).max() <= 1


# ---- the command to repeat a run


@pytest.mark.parametrize(
    "word", ["plain", "with space", "it's", "new\nline", "tab\t'\\", "\udcff bytes", "emoji \U0001f41c"]
)
def test_quoted_words_come_back_from_the_shell(word: str) -> None:
    printed = subprocess.run(["bash", "-c", f"printf %s {quote(word)}"], capture_output=True, check=True).stdout
    assert printed == word.encode("utf-8", "surrogateescape")


def test_command_names_what_is_not_the_default(make_run: MakeRun) -> None:
    command = repeat_command(read_record(make_run()))
    assert "--test-fraction 0.3" in command
    assert "--seed 0" in command
    assert "--valid-fraction 0.2" in command  # a probe has no valid part by default
    assert "--near-duplicates" not in command
    assert "--backbone" not in command


def test_command_of_an_earlier_version_has_todays_options() -> None:
    asked = {"fit": "crop", "fsdp": False, "class_weights": "auto", "seed": 3}
    assert fit_command("data", "run", asked) == "topwork fit data --out run --resize crop --seed 3"


# ---- Markdown and JSON


def test_markdown_holds_the_figures_and_the_advice(make_run: MakeRun) -> None:
    run = add_insights(make_run())
    text = write_report(run, "md").read_text()
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert f"| Accuracy on test | {percent(evaluation['test']['accuracy']['value'])} |" in text
    assert percent(evaluation["test"]["per_class"]["ants"]["f1"]) in text
    assert "## Next steps" in text
    assert "## Label errors" in text
    assert "topwork fit" in text
    assert "| predicted bees 95.0% |" in text or "bees 95.0%" in text


def test_names_break_no_table_and_start_no_tag(make_run: MakeRun) -> None:
    text = write_report(add_insights(make_run(HOSTILE_CLASSES, n_each=6, names=HOSTILE_FILES)), "md").read_text()
    outside = re.sub(r"(`{3,})\n.*?\n\1", "", text, flags=re.DOTALL)
    assert not re.search(r"(?<!\\)<", outside)
    for block in re.split(r"\n\n+", outside):
        lines = [line for line in block.splitlines() if line.startswith("| ")]
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) <= 1


def test_json_holds_everything(make_run: MakeRun) -> None:
    run = add_insights(make_run())
    found = json.loads(write_report(run, "json").read_text())
    assert found["evaluation"] == json.loads((run / "evaluation.json").read_text())
    assert found["insights"]["advice"][0]["name"] == "images"
    assert found["summary"][-1].startswith("Next: more images")
    assert as_json(read_record(run)).keys() == found.keys()
