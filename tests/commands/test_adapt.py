"""Adapting, comparing domains, leaving one out: as a user runs them, on drawn images in other colors and on hostile ones."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from drawing import draw_folders
from topwork.adaptation import adapted_head
from topwork.commands.adapt import adapt
from topwork.commands.compare_domains import compare_domains
from topwork.commands.evaluate import evaluate
from topwork.commands.fit import fit
from topwork.data.manifest import read_labels, scan
from topwork.data.split import leave_out
from topwork.errors import UsageError
from topwork.export.predictor import Predictor
from topwork.models.classifier import load_classifier
from topwork.report.run_data import read_record
from topwork.report.run_page import write_report
from topwork.report.sections.summary import headline_of
from topwork.settings import AdaptSettings, DataSettings, FitSettings
from topwork.text import percent

SHAPES = ("disc", "square", "cross")
SMALL = "random:test_efficientnet"


def changed(source, target, change):
    """The same folders with every image changed."""
    for path in sorted(source.glob("*/*.jpg")):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        change(Image.open(path)).save(place, quality=92)
    return target


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return draw_folders(tmp_path_factory.mktemp("photos"), n_each=20, shapes=SHAPES)


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    return fit(photos, folder, FitSettings(backbone=SMALL, near_duplicates=False)).folder


@pytest.fixture(scope="module")
def negatives(tmp_path_factory):
    """Other pictures of the same shapes, with inverted colors."""
    root = tmp_path_factory.mktemp("negatives")
    return changed(draw_folders(root / "plain", n_each=20, shapes=SHAPES, seed=7), root / "inverted", ImageOps.invert)


@pytest.fixture(scope="module")
def few_colors(tmp_path_factory):
    """Other pictures of the same shapes, with two levels per channel: a shift that features follow."""
    root = tmp_path_factory.mktemp("few-colors")
    plain = draw_folders(root / "plain", n_each=20, shapes=SHAPES, seed=7)
    return changed(plain, root / "changed", lambda image: ImageOps.posterize(image, 1))


@pytest.fixture(scope="module")
def adapted(run, negatives, tmp_path_factory):
    return adapt(run, negatives, tmp_path_factory.mktemp("adapted") / "run", AdaptSettings(ask=6))


def test_an_adapted_run_holds_all_that_a_run_holds(adapted, run, negatives):
    names = {p.name for p in adapted.folder.iterdir()}
    assert {p.name for p in run.iterdir()} - {"report.html"} <= names
    assert {"domains.json", "target.parquet", "target_predictions.parquet", "source_model", "ask.csv"} <= names
    evaluation = json.loads((adapted.folder / "evaluation.json").read_text())
    assert evaluation["domains"]["source"]["part"] == "test"
    for name in ("target", "source"):
        assert evaluation["domains"][name]["before"]["n"] == evaluation["domains"][name]["after"]["n"]
    judged = evaluate(adapted.folder, negatives)
    assert judged["accuracy"]["value"] == pytest.approx(evaluation["target"]["accuracy"]["value"], abs=0.02)
    old = load_classifier(adapted.folder / "source_model")
    np.testing.assert_array_equal(old.head.weight, load_classifier(run).head.weight)


def test_its_report_shows_both_domains(adapted):
    page = write_report(adapted.folder).read_text()
    assert 'id="domains"' in page
    assert "Source and target" in page


def test_its_headline_is_the_target_before_and_after_and_says_whether_it_was_measured(
    adapted, run, negatives, tmp_path
):
    headline = headline_of(read_record(adapted.folder))
    domains = adapted.evaluation["domains"]
    assert (headline.label, headline.bar.share.value) == (
        "Accuracy on the target",
        domains["target"]["after"]["accuracy"]["value"],
    )
    assert headline.basis == f"measured on {domains['target']['after']['n']} labeled target images"
    assert headline.hint == f"Before adaptation: {percent(domains['target']['before']['accuracy']['value'])}"
    page = write_report(adapted.folder).read_text()
    assert page.index("Accuracy on the target") < page.index('id="domains"')
    assert "None, None" not in page
    (tmp_path / "flat").mkdir()
    for number, path in enumerate(sorted(negatives.glob("*/*.jpg"))):
        shutil.copy(path, tmp_path / "flat" / f"{number}.jpg")
    unlabeled = headline_of(read_record(adapt(run, tmp_path / "flat", tmp_path / "run", AdaptSettings(ask=6)).folder))
    assert unlabeled.label == "Expected accuracy on the target"
    assert unlabeled.basis == "estimated without target labels"
    assert unlabeled.hint.startswith("Expected before adaptation: ")


def test_the_predictor_reads_it_like_any_other_model(adapted, negatives):
    answers = Predictor(adapted.folder).predict([str(p) for p in sorted(negatives.glob("*/*.jpg"))[:3]])
    assert all(answer.error is None for answer in answers)


@pytest.mark.parametrize("is_kept", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_tuned_network_predicts_as_it_was_evaluated_or_is_dropped(is_kept, run, few_colors, tmp_path, monkeypatch):
    """Whether it is kept is decided here, so that both ends are seen; adaptation/test_adapted_head.py has the rule."""
    verdict = adapted_head.Verdict(is_kept, "so the test says", {"tuned: agreement": 0.5})
    monkeypatch.setattr("topwork.commands.adapt.is_better", lambda *_: verdict)
    monkeypatch.setattr(adapted_head, "LARGEST_DROP", 1.0)
    result = adapt(run, few_colors, tmp_path / "run", AdaptSettings(mode="tune", epochs=1, workers=1))
    model, source = load_classifier(tmp_path / "run"), load_classifier(tmp_path / "run" / "source_model")
    assert result.choice.outcome == "adapted"
    assert "so the test says" in result.choice.reason
    assert (model.backbone.weights_digest != source.backbone.weights_digest) == is_kept
    history = (tmp_path / "run" / "history.jsonl").read_text().splitlines()
    assert any("target_loss" in line for line in history) == is_kept
    if not is_kept:
        features = adapt(run, few_colors, tmp_path / "features")
        np.testing.assert_array_equal(model.head.weight, load_classifier(features.folder).head.weight)
        return
    assert result.choice.method.endswith("network fine-tuned")
    rows = pq.read_table(tmp_path / "run" / "target_predictions.parquet").to_pylist()
    answers = Predictor(tmp_path / "run").predict([few_colors / row["path"] for row in rows])
    assert [a.label for a in answers] == [row["predicted"] for row in rows]
    page = write_report(tmp_path / "run").read_text()
    assert "The model was adapted" in page
    assert "A fine-tuned " in page
    assert not (tmp_path / "run" / "insights.json").exists()  # the source's are about another network


def test_labels_in_the_folder_names_are_never_used_to_adapt(adapted, run, negatives, tmp_path):
    shuffled = tmp_path / "shuffled"
    places = [SHAPES[number % 3] for number in range(60)]
    for place, path in zip(places, sorted(negatives.glob("*/*.jpg")), strict=True):
        (shuffled / place).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, shuffled / place / path.name)
    other = adapt(run, shuffled, tmp_path / "run")
    assert other.choice.outcome == adapted.choice.outcome
    by_name = {}
    for result in (adapted, other):
        paths = [c["path"].rsplit("/", 1)[-1] + c["after"] for c in result.record["changed"]]
        by_name[result.folder] = sorted(paths)
    first, second = by_name.values()
    assert first == second


def test_labels_that_are_given_are_used(adapted, run, negatives, tmp_path):
    with (adapted.folder / "ask.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert all(row["label"] == "" and row["suggested"] for row in rows)
    with (tmp_path / "filled.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(row | {"label": row["path"].split("/")[0]} for row in rows)
    helped = adapt(run, negatives, tmp_path / "run", AdaptSettings(labels=str(tmp_path / "filled.csv")))
    assert helped.record["n_known"] == 6
    manifest = scan(negatives)
    known = read_labels(tmp_path / "filled.csv", manifest, SHAPES)
    assert (known >= 0).sum() == 6


def test_wrong_labels_are_named(run, negatives, tmp_path):
    manifest = scan(negatives)
    for text, words in (
        ("path,label\nnowhere.jpg,disc\n", "line 2: nowhere.jpg is not a usable image"),
        (f"path,label\n{manifest.samples[0].path},cat\n", "cat is not a class of the model"),
        (f"path,label\n{manifest.samples[0].path},\n", "has no labels yet"),
        ("image,class\na,b\n", "columns path and label"),
    ):
        (tmp_path / "labels.csv").write_text(text)
        with pytest.raises(UsageError, match=words):
            read_labels(tmp_path / "labels.csv", manifest, SHAPES)


def test_a_target_like_the_source_leaves_the_model_bit_for_bit(run, tmp_path):
    """The network too, which is left where the features are."""
    same = draw_folders(tmp_path / "same", n_each=20, shapes=SHAPES, seed=9)
    result = adapt(run, same, tmp_path / "run", AdaptSettings(mode="tune"))
    assert result.choice.outcome == "unchanged"
    before, after = load_classifier(run), load_classifier(tmp_path / "run")
    np.testing.assert_array_equal(before.head.weight, after.head.weight)
    assert before.thresholds == after.thresholds
    assert before.backbone.weights_digest == after.backbone.weights_digest


def test_other_classes_are_refused_with_a_warning(run, tmp_path):
    others = draw_folders(tmp_path / "others", n_each=25, shapes=("stripes",))
    result = adapt(run, others, tmp_path / "run")
    assert result.choice.outcome == "refused"
    assert "--unlabeled" in result.choice.reason
    assert result.record["n_changed"] == 0


def test_hostile_targets_are_named_or_handled(run, negatives, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no images"):
        adapt(run, tmp_path / "empty", tmp_path / "run-empty")
    assert not (tmp_path / "run-empty" / "evaluation.json").exists()
    corrupt = tmp_path / "corrupt" / "disc"
    corrupt.mkdir(parents=True)
    for number in range(4):
        (corrupt / f"{number}.jpg").write_bytes(b"\xff\xd8\xff" + bytes([number]) * 99)
    with pytest.raises(UsageError, match="none of 4 files is a usable image"):
        adapt(run, tmp_path / "corrupt", tmp_path / "run-corrupt")
    flat = tmp_path / "ten"
    flat.mkdir()
    for number, path in enumerate(sorted(negatives.glob("*/*.jpg"))[::6]):
        shutil.copyfile(path, flat / f"{number}.jpg")
    ten = adapt(run, flat, tmp_path / "run-ten")
    assert ten.choice.outcome == "unchanged"
    assert "target" not in ten.evaluation
    assert ten.record["predicted"]["after"]["value"] > 0
    one = adapt(run, negatives / "disc", tmp_path / "run-one")
    assert one.choice.outcome in ("unchanged", "refused", "adapted")
    write_report(one.folder)


@pytest.mark.parametrize("change", [ImageOps.grayscale, lambda image: image.resize((24, 24))])
def test_gray_and_small_targets_are_handled(change, run, photos, tmp_path):
    plain = draw_folders(tmp_path / "plain", n_each=10, shapes=SHAPES, seed=5)
    result = adapt(run, changed(plain, tmp_path / "changed", change), tmp_path / "run")
    assert result.evaluation["domains"]["target"]["after"]["n"] == 30


@pytest.fixture(scope="module")
def both(photos, negatives, tmp_path_factory):
    """A folder of domains with class folders inside."""
    root = tmp_path_factory.mktemp("both")
    shutil.copytree(photos, root / "photo")
    shutil.copytree(negatives, root / "negative")
    return root


DOMAINS = {"label_regex": r"/([^/]+)/[^/]+$", "domain_by": "^([^/]+)/"}


def test_one_domain_is_left_out_and_each_is_judged(both, tmp_path):
    settings = FitSettings(backbone=SMALL, near_duplicates=False, leave_out="negative", **DOMAINS)
    fitted = fit(both, tmp_path / "run", settings)
    test = {fitted.manifest.samples[row].domain for row in fitted.split.test}
    rest = {fitted.manifest.samples[row].domain for row in [*fitted.split.train, *fitted.split.valid]}
    assert (test, rest) == ({"negative"}, {"photo"})
    judged = evaluate(tmp_path / "run", both, DataSettings(**DOMAINS), by="domain")
    assert judged["by"]["domain"]["negative"]["n"] == 60
    assert judged["by"]["domain"]["negative"]["accuracy"]["value"] == fitted.evaluation["test"]["accuracy"]["value"]
    with pytest.raises(UsageError, match="has no domain"):
        evaluate(tmp_path / "run", both / "photo", by="domain")


def test_a_domain_that_is_not_there_is_named(photos):
    with pytest.raises(UsageError, match="--domain-by"):
        leave_out(scan(photos), "sketch", 0.2, 0, list(range(60)))


def test_domains_are_compared_with_and_without_a_model(both, run, photos, tmp_path):
    from topwork.report.other_pages import domains_page

    (found,) = compare_domains(both / "photo", both / "negative", model=run)
    values = found.as_dict()
    assert values["clear_difference"]
    assert values["expected_accuracy"]["low"] <= values["expected_accuracy"]["value"]
    assert {row["name"] for row in values["classes"]} == set(SHAPES)
    assert all(row["accuracy"] for row in values["classes"])
    json.dumps(values, allow_nan=False)
    (tmp_path / "page.html").write_text(domains_page((found,)))
    assert (tmp_path / "page.html").read_text().count("data:image/jpeg") == 12
    other = draw_folders(tmp_path / "again", n_each=20, shapes=SHAPES, seed=11)
    (same,) = compare_domains(photos, other, model=run)
    assert "No significant difference" in same.sentence
