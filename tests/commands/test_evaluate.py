"""``topwork evaluate``: images seen in training, renamed classes, and the output folder."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from drawing import draw_folders
from topwork.commands.compare import list_runs
from topwork.commands.evaluate import evaluate, seen_notes
from topwork.commands.examine import examine_model
from topwork.commands.fit import fit
from topwork.errors import UsageError
from topwork.settings import DataSettings, FitSettings

SETTINGS = FitSettings(backbone="random:test_efficientnet", size=64)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Two classes of noisy pictures, so that no two of them are near duplicates."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for label, color in {"blue": (60, 80, 170), "red": (170, 80, 60)}.items():
        (root / label).mkdir()
        for number in range(30):
            coarse = rng.normal(color, 50, (6, 6, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(coarse).resize((96, 96), Image.Resampling.BICUBIC).save(root / label / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    return fit(photos, tmp_path_factory.mktemp("runs") / "run", SETTINGS)


def test_images_seen_in_training_are_counted_and_left_out_of_the_first_figure(run, photos) -> None:
    found = evaluate(run.folder, photos)
    seen, n_train = found["seen_in_training"], len(run.split.train)
    assert (seen["n"], seen["n_exact"], seen["n_near"]) == (n_train, n_train, 0)
    assert found["n"] == 60
    assert seen["without"]["n"] == 60 - n_train
    assert any(f"{n_train} images were seen in training" in note for note in found["notes"])
    assert seen["without"]["accuracy"]["value"] == run.evaluation["test"]["accuracy"]["value"]
    json.dumps(found, allow_nan=False)


def test_without_a_path_the_held_out_images_of_the_run_are_used(run, tmp_path) -> None:
    assert evaluate(run.folder)["accuracy"] == run.evaluation["test"]["accuracy"]
    examined = examine_model(run.folder, n_images=10)
    assert set(examined.rows.tolist()) <= set(run.split.test.tolist())
    with pytest.raises(UsageError, match="need a PATH"):
        evaluate(run.folder, settings=DataSettings(label_regex="(a)"))
    shutil.copytree(run.folder / "model", tmp_path / "model")
    with pytest.raises(UsageError, match="so a PATH of images is needed"):
        examine_model(tmp_path / "model")


def test_an_evaluation_of_the_same_images_is_compared_with_the_run(run, tmp_path) -> None:
    evaluate(run.folder, part="test", out=tmp_path / "again")
    shutil.copytree(run.folder, tmp_path / "run")
    found = list_runs(tmp_path)
    assert [row["mode"] for row in found["runs"]] == ["evaluation", "probe"]
    assert found["best"].startswith(f"On the same {run.evaluation['test']['n']} images")


def test_nearly_the_same_picture_counts_as_seen(run, photos, tmp_path) -> None:
    trained, new = (run.manifest.samples[rows[0]] for rows in (run.split.train, run.split.test))
    for name, sample in (("trained", trained), ("new", new)):
        (tmp_path / sample.label).mkdir(exist_ok=True)
        with Image.open(photos / sample.path) as image:
            image.resize((80, 80)).save(tmp_path / sample.label / f"{name}.jpg", quality=90)
    found = evaluate(run.folder, tmp_path)["seen_in_training"]
    assert (found["n"], found["n_exact"], found["n_near"]) == (1, 0, 1)
    assert found["without"]["n"] == 1


def test_a_model_folder_alone_does_not_know_its_training_images(run, photos, tmp_path) -> None:
    shutil.copytree(run.folder / "model", tmp_path / "model")
    found = evaluate(tmp_path / "model", photos)
    assert found["seen_in_training"] is None
    assert seen_notes(found) == []


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (0, []),
        (1, ["1 image was seen in training; trust the metrics without it."]),
        (2, ["2 images were seen in training; trust the metrics without them."]),
    ],
)
def test_the_note_reads_well_at_one_and_many(n, expected) -> None:
    assert seen_notes({"seen_in_training": {"n": n, "n_exact": n, "n_near": 0, "without": {}}}) == expected


def test_classes_are_renamed_on_request(run, photos, tmp_path) -> None:
    shutil.copytree(photos / "blue", tmp_path / "bleu")
    shutil.copytree(photos / "red", tmp_path / "red")
    found = evaluate(run.folder, tmp_path, rename=["bleu=blue"])
    assert found["n"] == 60
    assert found["accuracy"] == evaluate(run.folder, photos)["accuracy"]
    assert evaluate(run.folder, tmp_path)["n"] == 30
    with pytest.raises(UsageError, match="--map green=blue: the data has no class green"):
        evaluate(run.folder, tmp_path, rename=["green=blue"])
    with pytest.raises(UsageError, match="must be OLD=NEW"):
        evaluate(run.folder, tmp_path, rename=["bleu"])


def test_the_output_folder_holds_page_predictions_and_confusion_matrix(run, photos, tmp_path) -> None:
    from topwork.report.run_page import write_report

    out = tmp_path / "deep" / "evaluation"
    found = evaluate(run.folder, photos, out=out)
    stored = json.loads((out / "evaluation.json").read_text())
    assert stored["test"]["accuracy"] == found["accuracy"]
    assert stored["test_without_leaks"]["accuracy"] == found["seen_in_training"]["without"]["accuracy"]
    rows = list(csv.reader((out / "confusion.csv").read_text().splitlines()))
    assert rows[0][1:] == ["blue", "red"]
    assert [[int(cell) for cell in row[1:]] for row in rows[1:]] == found["confusion"]
    page = write_report(out).read_text()
    assert "Confusion matrix" in page
    with pytest.raises(UsageError, match="finished"):
        evaluate(run.folder, photos, out=out)
    evaluate(run.folder, photos, out=out, overwrite=True)


def test_drawings_that_are_alike_still_evaluate(tmp_path) -> None:
    root = draw_folders(tmp_path / "data", n_each=6, shapes=("disc", "square"))
    made = fit(root, tmp_path / "run", SETTINGS)
    assert evaluate(made.folder, root)["seen_in_training"]["n"] >= len(made.split.train)
