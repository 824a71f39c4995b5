"""One line each: plots from a run, its folder, a manifest or predictions; short reprs; settings as keywords."""

from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import topwork
from drawing import draw_folders
from topwork import plots
from topwork.errors import UsageError
from topwork.evaluation.predictions import Predictions, Task
from topwork.settings import TuneSettings

SMALL = "random:test_efficientnet"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return draw_folders(tmp_path_factory.mktemp("plots"), n_each=12, shapes=("disc", "square", "cross"))


@pytest.fixture(scope="module")
def fitted(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    return topwork.fit(images, out, backbone=SMALL, size=64, near_duplicates=False, test_fraction=0.3)


@pytest.fixture(scope="module")
def run(fitted):
    return topwork.load_run(fitted.folder)


def drawn(figure):
    assert isinstance(figure, Figure)
    png = figure._repr_png_()
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("L"))
    assert pixels.std() > 5  # something is on it
    return figure


def test_a_run_is_read_as_it_was_fitted(fitted, run):
    assert run.evaluation == fitted.evaluation
    assert run.recipe == fitted.recipe
    assert [r["candidate"] for r in run.history] == [r["candidate"] for r in fitted.history]
    for name in ("train", "test"):
        np.testing.assert_array_equal(getattr(run.split, name), getattr(fitted.split, name))
        assert run.predictions[name].classes == fitted.predictions[name].classes
        np.testing.assert_array_equal(run.predictions[name].labels, fitted.predictions[name].labels)
        np.testing.assert_allclose(run.predictions[name].logits, fitted.predictions[name].logits, atol=1e-5)
    accuracy = float(run.predictions_of().correct.mean())
    assert accuracy == pytest.approx(run.evaluation["test"]["accuracy"]["value"])


def test_a_folder_that_is_no_run_is_named(tmp_path, fitted):
    with pytest.raises(UsageError, match="no finished run"):
        topwork.load_run(tmp_path)
    with pytest.raises(UsageError, match="part valid"):
        fitted.predictions_of("valid")


@pytest.mark.parametrize(
    "plot", [plots.show_batch, plots.confusion_matrix, plots.top_losses, plots.curves, plots.reliability]
)
def test_every_plot_takes_a_run_and_its_folder(plot, fitted):
    drawn(plot(fitted))
    drawn(plot(str(fitted.folder)))


def test_plots_take_what_they_need_alone(fitted):
    figure = drawn(plots.show_batch(fitted.manifest, n=5, seed=3))
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert len(titles) == 5
    assert set(titles) <= {"disc", "square", "cross"}
    drawn(plots.reliability(fitted.predictions["test"]))
    with pytest.raises(UsageError, match="no images in valid"):
        plots.show_batch(fitted, part="valid")


def test_a_confusion_matrix_has_true_classes_as_rows():
    found = Predictions(("a", "b"), np.arange(4), np.array([0, 0, 0, 1]), np.eye(2)[[0, 0, 1, 1]])
    figure = drawn(plots.confusion_matrix(found))
    cells = {(text.get_position()[::-1], text.get_text()) for text in figure.axes[0].texts}
    assert cells == {((0, 0), "2"), ((0, 1), "1"), ((1, 1), "1")}  # (row, column)
    assert "75.0%" in figure.axes[0].get_title()
    several = Predictions(("a", "b"), np.arange(2), np.eye(2) > 0, np.eye(2), Task("sigmoid"))
    with pytest.raises(UsageError, match="one label per image"):
        plots.confusion_matrix(several)


def test_curves_show_epochs_of_a_fine_tuned_run(images, tmp_path):
    tuned = topwork.fit(
        images, tmp_path / "run", backbone=SMALL, mode="tune", epochs=2, near_duplicates=False, valid_fraction=0.2,
        workers=1, size=64,
    )  # fmt: skip
    figure = drawn(plots.curves(tuned))
    loss, _ = figure.axes
    assert [line.get_label() for line in loss.lines] == ["train", "valid"]
    assert all(len(line.get_xdata()) == 2 for line in loss.lines)


def test_a_heatmap_shows_the_image_and_its_evidence(fitted):
    path = next((fitted.manifest.root / "disc").glob("*.jpg"))
    figure = drawn(plots.heatmap(fitted, path))
    assert figure.axes[1].get_title().endswith("%)")
    drawn(plots.heatmap(fitted, path.read_bytes(), "cross"))
    with pytest.raises(UsageError, match="not a class of the model"):
        plots.heatmap(fitted, path, "dog")
    with pytest.raises(UsageError, match="nowhere"):
        plots.heatmap(fitted, "nowhere.jpg")


def test_values_have_short_reprs_and_html(fitted, run, images, tmp_path):
    from topwork.commands.compare import compare_runs

    _, (compared,) = compare_runs([fitted.folder, fitted.folder])
    features = topwork.embed(fitted.classifier.backbone, fitted.manifest)
    (domains,) = topwork.compare_domains(images, images, model=fitted.folder)
    adapted = topwork.adapt(fitted.folder, images, tmp_path / "adapted")
    backbone = topwork.load_backbone(SMALL).with_spec(height=64, width=64)
    settings = TuneSettings(epochs=1, augment="none")
    tuned = topwork.fine_tune(backbone, fitted.manifest, topwork.split(fitted.manifest), settings)
    evaluated = topwork.evaluate(fitted.folder, images)
    values = (fitted, run, fitted.manifest, fitted.predictions["test"], compared, features, fitted.classifier)
    more = (fitted.split, fitted.probe, fitted.classifier.backbone, topwork.Predictor(fitted.folder))
    for value in (*values, *more, domains, adapted, tuned, evaluated):
        assert len(repr(value)) < 1000
        assert repr(value).startswith(type(value).__name__ + "(")
        html = value._repr_html_()
        assert "<table>" in html
        assert len(html) < 3000


def test_class_names_cannot_run_in_a_notebook(fitted):
    from dataclasses import replace

    hostile = replace(fitted.predictions["test"], classes=("<img src=x onerror=alert(1)>", "b", "c"))
    assert "<img" not in hostile._repr_html_()


def test_settings_are_keywords_and_wrong_ones_are_named(images, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"epochss: no such setting\. Did you mean epochs"):
        topwork.fit(images, tmp_path / "run", epochss=3)
    monkeypatch.chdir(tmp_path)
    run = topwork.fit(images, backbone=SMALL, size=64, near_duplicates=False)
    assert str(run.folder) == f"runs/{images.name}"
