"""Reviewing a run's doubtful labels: what is offered, what a decision does, and the fit that follows."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from drawing import draw, draw_folders
from topwork.commands.fit import fit
from topwork.commands.review import Conflict, Review, outcome_of
from topwork.data.manifest import load_manifest
from topwork.errors import UsageError
from topwork.report.run_page import write_report
from topwork.run import read_evaluation, read_insights, read_split
from topwork.settings import FitSettings

N_WRONG = 3


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Discs, squares and crosses; three discs lie among the squares."""
    root = tmp_path_factory.mktemp("review")
    draw_folders(root / "data", n_each=20, shapes=("disc", "square", "cross"))
    for number in range(N_WRONG):
        draw("disc", 900 + number).save(root / "data" / "square" / f"wrong_{number}.jpg", quality=92)
    fit(root / "data", root / "run", FitSettings(backbone="random:test_efficientnet", near_duplicates=False))
    return root / "run"


@pytest.fixture
def review(run: Path, tmp_path: Path) -> Iterator[Review]:
    opened = Review(run, tmp_path / "c.csv")
    yield opened
    opened.close()


def wrong_ones(review: Review) -> list[int]:
    return [doubt.row for doubt in review.doubts if "wrong" in review.manifest.samples[doubt.row].path]


def test_images_that_were_moved_after_training_are_named(run: Path, tmp_path: Path) -> None:
    data = run.parent / "data"
    data.rename(run.parent / "elsewhere")
    try:
        with pytest.raises(UsageError, match="data: the images of the run are no longer there"):
            Review(run, tmp_path / "c.csv")
    finally:
        (run.parent / "elsewhere").rename(data)
    Review(run, tmp_path / "c.csv").close()


def test_wrong_labels_are_offered_with_the_right_one_and_evidence(review: Review) -> None:
    assert len(wrong_ones(review)) == N_WRONG
    for doubt in review.doubts:
        if doubt.row in wrong_ones(review):
            assert review.manifest.classes[doubt.suggested] == "disc"
            assert doubt.suggested_probability > doubt.label_probability
            assert doubt.neighbors
    assert review.tally() == {
        "doubts": len(review.doubts),
        "open": len(review.doubts),
        "kept": 0,
        "changed": 0,
        "removed": 0,
    }


def test_its_likely_errors_are_those_of_the_report(review: Review, run: Path) -> None:
    n = sum(doubt.is_confident for doubt in review.doubts)
    insights = read_insights(run)
    assert n == insights["n_suspects"] > 0
    assert f"{n} of {insights['n_audited']} labels" in write_report(run).read_text()


def test_decisions_stand_are_undone_and_found_again(run: Path, tmp_path: Path) -> None:
    first = Review(run, tmp_path / "c.csv")
    row = first.doubts[0].row
    state = first.decide(row, "relabel", 1, version=0)
    assert state == {"decision": "relabel", "label": 1, "version": 1}
    assert first.decide(row, "remove", None, version=1)["decision"] == "remove"
    assert first.decide(row, "undo", None, version=2) == {"decision": "relabel", "label": 1, "version": 3}
    first.close()
    again = Review(run, tmp_path / "c.csv")
    assert again.state(row) == {"decision": "relabel", "label": 1, "version": 3}
    assert again.tally()["changed"] == 1
    again.close()


def test_the_second_of_two_people_is_told(review: Review) -> None:
    row = review.doubts[0].row
    review.decide(row, "keep", None, version=0)
    with pytest.raises(Conflict):
        review.decide(row, "relabel", 0, version=0)
    assert review.state(row)["decision"] == "keep"


@pytest.mark.parametrize(
    ("row", "decision", "label"),
    [(-1, "keep", None), (10**9, "keep", None), (None, "burn", None), (None, "relabel", None), (None, "relabel", 3),
     (None, "relabel", -1), (None, "keep", 1)],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(row: int | None, decision: str, label: int | None, review: Review) -> None:
    with pytest.raises(UsageError):
        review.decide(review.doubts[0].row if row is None else row, decision, label, version=0)
    assert review.tally()["open"] == len(review.doubts)


def test_the_fit_that_follows_uses_the_labels_and_the_same_split(review: Review, run: Path) -> None:
    files = {path: path.read_bytes() for path in (run.parent / "data").rglob("*") if path.is_file()}
    evaluation = (run / "evaluation.json").read_bytes()
    for row in wrong_ones(review):
        review.decide(row, "relabel", review.manifest.classes.index("disc"), version=0)
    aside = next(doubt.row for doubt in review.doubts if doubt.row not in wrong_ones(review))
    review.decide(aside, "remove", None, version=0)
    outcome = review.fit_again()
    assert outcome.run == run.with_name("run-corrected")
    hash_aside = review.manifest.samples[aside].content_hash
    for name, items in read_split(run)["parts"].items():
        now = {item["content_hash"] for item in read_split(outcome.run)["parts"][name]}
        assert now == {item["content_hash"] for item in items} - {hash_aside}
    manifest = load_manifest(outcome.run / "manifest.parquet")
    labels = {sample.path: sample.label for sample in manifest.samples}
    assert [labels[f"square/wrong_{n}.jpg"] for n in range(N_WRONG)] == ["disc"] * N_WRONG
    assert "Only the retrained model is correct on" in outcome.sentence
    n_judged = sum("wrong" in item["path"] for item in read_split(run)["parts"][outcome.part])
    assert outcome.n_changed == n_judged
    assert ("both scores may be optimistic" in outcome.sentence) == bool(n_judged)
    found = outcome.comparison
    assert found.n == read_evaluation(outcome.run)[outcome.part]["n"]
    assert found.accuracy_second == read_evaluation(outcome.run)[outcome.part]["accuracy"]["value"]
    assert (run / "evaluation.json").read_bytes() == evaluation
    assert {path: path.read_bytes() for path in (run.parent / "data").rglob("*") if path.is_file()} == files
    assert outcome_of(run, outcome.run).sentence == outcome.sentence
    assert review.corrected_run == run.with_name("run-corrected-2")  # nothing is overwritten
    assert "--split-of" in review.command
    assert "--corrections" in review.command
    review.close()
    again = Review(outcome.run)  # goes on in the same file
    assert again.journal.path == review.journal.path
    assert again.settings.seed == review.settings.seed
    again.close()
    shutil.rmtree(outcome.run)


def test_a_run_without_doubts_of_its_own_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no finished run here"):
        Review(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "insights.json").unlink()
    with pytest.raises(UsageError, match="no list of likely label errors"):
        Review(copy)
