"""Impossible values and options without effect are named, in every mode; what can be passes."""

from dataclasses import fields

import pytest

from terminal import topwork
from topwork.data.samples import rules_of
from topwork.errors import UsageError
from topwork.settings import TUNING, AdaptSettings, DataSettings, FitSettings, ModelSettings, TuneSettings, check

# a value that is not the default, for every setting that only tuning reads
OTHER = {
    "strategy": "all", "last_stages": 3, "lora_rank": 4, "epochs": 5, "lr": "1e-3", "lr_spread": "linear", "lr_decay": 0.8,
    "schedule": "flat", "warmup": 0.1, "optimizer": "sgd", "weight_decay": 0.1, "batch_size": 8, "batch_norm": "train",
    "outputs": "binary", "label_smoothing": 0.1, "mixup": 0.2, "cutmix": 1.0, "clip_norm": 0.0, "ema": 0.0,
    "monitor": "accuracy", "patience": 3, "interpolate": False, "average_best": 2, "track": "tensorboard",
    "compile": True, "hidden": "16",
}  # fmt: skip


def test_every_setting_that_only_tuning_reads_has_a_value_here():
    tuning = {item.name for item in fields(FitSettings) if item.metadata["needs"].get("mode") == TUNING["mode"]}
    assert tuning <= OTHER.keys()


@pytest.mark.parametrize("name", OTHER)
def test_an_option_of_tuning_is_an_error_without_tuning(name, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: "installed")
    flag = "no-interpolate" if name == "interpolate" else name.replace("_", "-")
    with pytest.raises(UsageError, match=f"^--{flag}.* has no effect without --mode tune"):
        check(FitSettings(**{name: OTHER[name]}))
    allowed = {"last_stages": {"strategy": "last"}, "lora_rank": {"strategy": "lora"}}.get(name, {})
    check(FitSettings(mode="tune", **allowed, **{name: OTHER[name]}))
    check(FitSettings(mode="auto", **allowed, **{name: OTHER[name]}))


@pytest.mark.parametrize("mode", ["probe", "tune"])
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr": "fast"}, "--lr fast: use one number"),
        ({"lr": "1e-3:1e-5"}, "--lr 1e-3:1e-5: use one number"),
        ({"lr": "nan"}, "--lr nan"),
        ({"time_budget": "soon"}, "soon: not a time"),
        ({"warmup": 1.0}, "--warmup 1.0: must be at least 0 and below 1"),
        ({"epochs": 0}, "--epochs 0: must be at least 1"),
        ({"seed": -1}, "--seed -1: must be at least 0"),
        ({"workers": -2}, "--workers -2: must be at least 1"),
        ({"test_fraction": float("nan")}, "--test-fraction nan: must be at least 0 and below 1"),
        ({"max_reject_fraction": 7.0}, "--max-reject-fraction 7.0: must be at least 0 and at most 1"),
        ({"size": 0}, "--size 0: must be at least 1"),
        ({"weight_decay": float("nan")}, "--weight-decay nan: must be"),
        ({"mixup": -1.0}, "--mixup -1.0: must be above 0"),
        ({"batch_size": 0}, "--batch-size 0: must be at least 1"),
    ],
)
def test_an_impossible_value_is_an_error_in_every_mode(mode, settings, words):
    with pytest.raises(UsageError, match=words):
        check(FitSettings(mode=mode, **settings))


def test_a_setting_that_needs_another_names_it():
    with pytest.raises(UsageError, match="--last-stages 3 has no effect without --strategy last"):
        check(FitSettings(mode="tune", last_stages=3))
    with pytest.raises(UsageError, match="--last-stages 3 has no effect without --strategy last"):
        check(ModelSettings(last_stages=3))
    with pytest.raises(UsageError, match="--epochs 9 has no effect without --mode tune"):
        check(AdaptSettings(epochs=9))
    check(TuneSettings(epochs=5))  # in Python, where there is no mode
    check(FitSettings())


def test_a_package_that_is_missing_is_named_before_the_work_begins(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(
        UsageError, match="--track mlflow: the package mlflow is not installed \\(pip install mlflow\\)"
    ):
        check(FitSettings(mode="tune", track="mlflow"))
    with pytest.raises(UsageError, match="--strategy lora: the package peft is not installed"):
        check(FitSettings(mode="tune", strategy="lora"))


def test_every_command_that_reads_images_looks_at_these_values():
    with pytest.raises(UsageError, match="--seed -1"):
        rules_of(DataSettings(seed=-1))
    rules_of(FitSettings(epochs=3))  # what only fit minds is none of its business


@pytest.mark.parametrize(
    ("option", "value"),
    [("--workers", "-1"), ("--top", "0"), ("--max-reject-fraction", "nan"), ("--max-reject-fraction", "-1")],
)
def test_numbers_of_predict_have_limits(option, value):
    ended = topwork("predict", "model", "image.jpg", option, value)
    assert ended.returncode == 2
    assert option in ended.stderr
    assert ended.stderr.count("\n") == 1
