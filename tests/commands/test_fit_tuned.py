"""``fit --mode tune`` from folder to model: what was tuned is what predicts, exports and is served, whatever its head."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

from drawing import draw_folders
from topwork.commands.fit import _within_what_is_left, fit
from topwork.errors import ModelError
from topwork.export.package import export_model
from topwork.export.predictor import Predictor
from topwork.models.classifier import FACTS, facts_digest, load_classifier
from topwork.settings import FitSettings

SETTINGS = {
    "backbone": "random:test_efficientnet", "size": 64, "mode": "tune", "epochs": 1, "batch_size": 8, "lr": "1e-3",
    "near_duplicates": False, "workers": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return draw_folders(tmp_path_factory.mktemp("data"), n_each=12, shapes=("disc", "cross"))


HIDDEN = {"hidden": "16:0.4,8:0.2", "outputs": "binary", "pooling": "max", "tta": True, "augment": "flip+vertical-flip"}


@pytest.fixture(scope="module")
def hidden(data, tmp_path_factory):
    """A run whose network has hidden layers in its head."""
    return fit(data, tmp_path_factory.mktemp("hidden") / "run", FitSettings(**SETTINGS, **HIDDEN))


@pytest.mark.parametrize(
    ("settings", "is_timm", "kind"),
    [
        ({"outputs": "binary"}, True, "plain"),
        (HIDDEN, False, "plain"),
        ({"head": "cosine", "strategy": "last", "last_stages": 1}, False, "extended"),
        pytest.param({"head": "extended"}, False, "extended", marks=pytest.mark.slow),
        pytest.param(
            {"head": "extended", "strategy": "last", "last_stages": 1}, False, "extended", marks=pytest.mark.slow
        ),
        pytest.param({"head": "plain", "tta": True}, False, "plain", marks=pytest.mark.slow),
    ],
)
def test_a_tuned_head_predicts_and_exports_as_it_was_judged(data, tmp_path, settings, is_timm, kind, request):
    if settings is HIDDEN:
        fitted = request.getfixturevalue("hidden")
    else:
        fitted = fit(data, tmp_path / "run", FitSettings(**SETTINGS, **settings))
    assert fitted.recipe["mode"] == "tune"
    assert (fitted.folder / "model" / "config.json").is_file() == is_timm
    kept = load_classifier(fitted.folder)
    assert kept.head.kind == kind
    assert kept.backbone.spec.mirror == ("both" if settings.get("tta") else "none")
    assert fitted.evaluation["n_parameters"] >= fitted.evaluation["n_trainable"] > 0
    rows = pq.read_table(fitted.folder / "predictions.parquet").to_pylist()
    tested = [row for row in rows if row["part"] == "test"]
    predictor = Predictor(fitted.folder)
    answers = predictor.predict([data / row["path"] for row in tested])
    assert [answer.label for answer in answers] == [row["predicted"] for row in tested]
    np.testing.assert_allclose([a.probability for a in answers], [r["probability"] for r in tested], atol=1e-4)
    package = export_model(fitted.folder, "onnx", tmp_path / "model.onnx", [str(data)])
    assert package.certificate.n_same == package.certificate.n_compared


def test_auto_says_what_it_decided_and_why(data, tmp_path):
    fitted = fit(data, tmp_path / "run", FitSettings(**SETTINGS | {"mode": "auto", "epochs": None, "lr": "auto"}))
    words = " ".join(fitted.recipe["words"])
    assert "In published results" in words or "which is too little" in words
    if fitted.recipe["mode"] == "tune":
        assert "Kept the tuned network" in words
    else:
        assert "not tuning" in words or "Kept the probe" in words


def test_auto_does_not_begin_what_cannot_be_finished(data, tmp_path, monkeypatch):
    from topwork.training import finetune

    monkeypatch.setattr(finetune, "training_rate", lambda *_: 3.0)
    settings = SETTINGS | {"mode": "auto", "epochs": None, "time_budget": "9s", "valid_fraction": 0.2}
    fitted = fit(data, tmp_path / "run", FitSettings(**settings))
    assert fitted.recipe["mode"] == "probe"
    assert fitted.recipe["words"] == [
        "Only 1 epoch would fit into the time budget, which is too little: not fine-tuning."
    ]
    assert len(fitted.split.valid)  # asked for by valid_fraction


def test_a_probe_kept_by_auto_trains_on_all_that_a_probe_does(data, tmp_path, monkeypatch):
    from topwork.training import finetune

    monkeypatch.setattr(finetune, "training_rate", lambda *_: 3.0)
    settings = SETTINGS | {"mode": "auto", "epochs": None, "time_budget": "9s"}
    kept = fit(data, tmp_path / "auto", FitSettings(**settings))
    assert "held out for fine-tuning" in kept.recipe["words"][1]
    shared = {name: settings[name] for name in ("backbone", "size", "near_duplicates", "workers")}
    probe = fit(data, tmp_path / "probe", FitSettings(**shared))
    for part in ("train", "valid", "test"):
        np.testing.assert_array_equal(getattr(kept.split, part), getattr(probe.split, part))
    np.testing.assert_array_equal(kept.classifier.head.weight, probe.classifier.head.weight)


def test_a_description_with_unknown_changes_is_refused(hidden, tmp_path):
    path = shutil.copytree(hidden.folder / "model", tmp_path / "model") / FACTS
    facts = json.loads(path.read_text())
    assert facts["format"] == 2
    for changes in ({"hidden": "999999999"}, {"hidden": "linear"}, {"pooling": "os.system"}, {"other": 1}):
        changed = facts | {"changes": facts["changes"] | changes}
        path.write_text(json.dumps(changed | {"digest": facts_digest(changed)}))
        with pytest.raises(ModelError):
            load_classifier(path.parent)


def test_tuning_gets_what_is_left_of_the_time_budget_or_it_is_said():
    def left(budget, total, n_images=1000, rate=100.0):
        clock = SimpleNamespace(total=total, seconds={"scan_and_embed": n_images / rate})
        embedder = SimpleNamespace(n_embedded=n_images, engine_seconds=1.0)
        data = SimpleNamespace(
            settings=FitSettings(mode="tune", time_budget=budget),
            manifest=SimpleNamespace(samples=range(n_images)),
            embedder=embedder,
        )
        said = []
        return _within_what_is_left(data, clock, said.append).time_budget_seconds, said

    assert left("200s", total=30) == (200 - 30 - 30 - 10, [])
    seconds, said = left("40s", total=50)
    assert seconds == 1
    assert "--time-budget 40s is too short" in said[0]
