"""Tiny and degenerate data: a model or a clear sentence, never a numerical error (warnings are errors in these tests)."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from topwork.commands.evaluate import evaluate
from topwork.commands.fit import Fitted, fit
from topwork.data.manifest import scan
from topwork.errors import UsageError
from topwork.export.predictor import Predictor
from topwork.progress import Reporter
from topwork.report.run_page import write_report
from topwork.settings import FitSettings

SETTINGS = FitSettings(backbone="random:test_efficientnet", size=32)
KINDS = ("noise", "black", "twins", "copies")


def draw(root: Path, counts: tuple[int, ...], kind: str, has_parts: bool = False) -> Path:
    """Class folders ``c0``, ``c1`` … of tiny images.

    ``twins``: the classes hold the same pictures; ``copies``: one picture per class. With parts: the first image of each
    class is for training, the others are for testing.
    """
    for label, n in enumerate(counts):
        for number in range(n):
            seed = {"noise": [label, number], "twins": [number], "copies": [label]}.get(kind)
            pixels = (
                np.zeros((32, 32, 3))
                if seed is None
                else np.random.default_rng(seed).normal(60 + 60 * label, 25, (32, 32, 3))
            )
            folder = root / ("" if not has_parts else "train" if number == 0 else "test") / f"c{label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
    return root


def check(run: Fitted, data: Path) -> None:
    """Every later step works on such a run, and every number in it is one."""
    for path in run.folder.glob("*.json"):
        json.loads(path.read_text(), parse_constant=pytest.fail)
    assert np.isfinite(run.classifier.head.weight).all()
    assert write_report(run.folder).is_file()
    json.dumps(evaluate(run.folder, data), allow_nan=False)
    images = sorted(data.rglob("*.png"))
    assert {answer.outcome for answer in Predictor(run.folder).predict(images)} <= {"label", "ambiguous", "unknown"}


@pytest.mark.parametrize(
    ("counts", "kind", "has_parts"),
    [
        ((1, 1), "noise", False),
        pytest.param((2, 2), "noise", False, marks=pytest.mark.slow),
        pytest.param((1, 1, 1), "noise", False, marks=pytest.mark.slow),
        ((4, 3), "noise", True),
        ((30, 30), "black", False),
        ((6, 6), "copies", False),
        ((8, 8), "twins", False),
        ((12, 1), "noise", False),
    ],
)
def test_known_cases_give_a_model(counts, kind, has_parts, tmp_path) -> None:
    data = draw(tmp_path / "data", counts, kind, has_parts)
    check(fit(data, tmp_path / "run", SETTINGS), data)


@pytest.mark.parametrize("n", [1, 3])
def test_one_class_is_refused_with_a_sentence(n, tmp_path) -> None:
    with pytest.raises(UsageError, match="only one class"):
        fit(draw(tmp_path / "data", (n,), "noise"), tmp_path / "run", SETTINGS)


def test_the_files_of_the_class_that_was_lost_are_named(tmp_path) -> None:
    data = draw(tmp_path / "data", (3,), "noise")
    (data / "dog").mkdir()
    (data / "dog" / "1.jpg").write_text("<html>404</html>")
    with pytest.raises(UsageError, match=r"only one class: .*Not used: 1 file, such as dog/1\.jpg: not an image"):
        fit(data, tmp_path / "run", SETTINGS)


@pytest.mark.slow
@settings(
    max_examples=settings.default.max_examples // 25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(counts=st.lists(st.integers(1, 4), min_size=2, max_size=4), kind=st.sampled_from(KINDS), has_parts=st.booleans())
def test_any_counts_from_one_give_a_model_or_a_sentence(counts, kind, has_parts, tmp_path_factory) -> None:
    root = tmp_path_factory.mktemp("tiny")
    data = draw(root / "data", tuple(counts), kind, has_parts)
    try:
        run = fit(data, root / "run", SETTINGS)
    except UsageError:
        return  # a sentence
    check(run, data)


def test_fine_tuning_without_validation_images_is_refused_or_left_out(tmp_path) -> None:
    data, tuned = draw(tmp_path / "data", (1, 1), "noise"), replace(SETTINGS, epochs=1)
    with pytest.raises(UsageError, match="fine-tuning needs validation images, but there are too few"):
        fit(data, tmp_path / "tune", replace(tuned, mode="tune"))
    run = fit(data, tmp_path / "auto", replace(tuned, mode="auto"))
    assert run.recipe["mode"] == "probe"
    assert run.recipe["words"] == ["There are no validation images: not fine-tuning."]


def test_no_test_images_because_of_groups_is_said(tmp_path) -> None:
    said: list[str] = []
    reporter = Reporter()
    reporter.note = said.append
    data = draw(tmp_path / "data", (6, 6), "noise")
    run = fit(data, tmp_path / "run", replace(SETTINGS, group_by=r"(c\d)/"), reporter=reporter)
    assert "test" not in run.evaluation
    assert "No image is held out for testing: there are too few images or groups per class to hold any out." in said
    assert "valid was used" not in write_report(run.folder).read_text()


def test_too_few_images_to_calibrate_are_said_and_answered_with_labels(tmp_path) -> None:
    data = draw(tmp_path / "data", (10, 10, 10), "noise")
    run = fit(data, tmp_path / "run", SETTINGS)
    answers = Predictor(run.folder).predict(sorted(data.rglob("*.png")))
    assert "ambiguous" not in {answer.outcome for answer in answers}
    said = "Too few images to calibrate ambiguous answers (at least 39 are needed)"
    assert said in (run.folder / "model" / "README.md").read_text()
    assert said in write_report(run.folder).read_text()
    for folder in (run.folder, run.folder / "model"):
        with pytest.raises(UsageError, match="a run or model, not images"):
            fit(folder, tmp_path / "second", SETTINGS)
    shutil.copytree(run.folder, data / "runs" / "first")  # of fit in the folder of the images
    again = scan(data)
    assert again.counts == {"c0": 10, "c1": 10, "c2": 10}
    assert [(reject.path, reject.reason) for reject in again.rejects] == [("runs/first/", "a run or model")]
