"""Killed and resumed is the same as never interrupted, bit for bit; what is on disk is whole or not there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from topwork.errors import ModelError, TopworkError, UsageError
from topwork.training import checkpoint as disk
from topwork.training.loop import TrainerContext, fit
from training.drawn import TinyNetwork, recipe_for, streams

SCRIPT = Path(__file__).with_name("killed_run.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, to kill runs without importing torch for each")
@pytest.mark.parametrize(("n_kills", "n_epochs"), [(1, 2), pytest.param(3, 5, marks=pytest.mark.slow)])
def test_killed_and_resumed_gives_the_same_bits(tmp_path, n_kills, n_epochs):
    source = Path(__file__).parents[2] / "src"
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path), "--kills", str(n_kills), "--epochs", str(n_epochs)],
        check=False, capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": str(source)},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    report = json.loads(ended.stdout)
    assert report["n_killed"] >= min(n_kills, 2)  # a fast machine may finish before the third
    assert report["killed_and_resumed"] == report["uninterrupted"]


def stop_after(n):
    calls = iter(range(n))
    return lambda: next(calls, None) is None


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_stopped_mid_epoch_and_resumed_gives_the_same_bits(tmp_path, optimizer):
    recipe = recipe_for(optimizer=optimizer, augment="light", cutmix=1.0)
    whole = fit(TinyNetwork(), recipe, *streams(recipe=recipe))
    context = TrainerContext(folder=tmp_path, resume=True, stop=stop_after(8))
    first = fit(TinyNetwork(), recipe, *streams(recipe=recipe), context)
    assert first.ending == "interrupted"
    assert len(first.history) == 1
    # the resumed process starts from another network: everything has to come from the checkpoint
    context = TrainerContext(folder=tmp_path, resume=True)
    resumed = fit(TinyNetwork(seed=5), recipe, *streams(recipe=recipe), context)
    for kind in ("best", "last", "start"):
        for name, value in getattr(whole, kind).items():
            assert torch.equal(value, getattr(resumed, kind)[name]), (kind, name)
    keys = ("train_loss", "train_accuracy", "valid_loss", "valid_accuracy", "curve", "best")
    assert [[r[k] for k in keys] for r in whole.history] == [[r[k] for k in keys] for r in resumed.history]


def test_resuming_a_finished_run_trains_no_more(tmp_path):
    recipe = recipe_for(epochs=1)
    done = fit(TinyNetwork(), recipe, *streams(), TrainerContext(folder=tmp_path))
    seen = []
    again = fit(TinyNetwork(), recipe, *streams(), TrainerContext(folder=tmp_path, resume=True, on_epoch=seen.append))
    assert not seen
    assert again.ending == "finished"
    assert all(torch.equal(value, again.best[name]) for name, value in done.best.items())


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    fit(TinyNetwork(), recipe_for(epochs=1), *streams(), TrainerContext(folder=tmp_path))
    with pytest.raises(UsageError, match="a different recipe"):
        fit(TinyNetwork(), recipe_for(epochs=2), *streams(), TrainerContext(folder=tmp_path, resume=True))


def saved(folder):
    disk.save_checkpoint(folder, {"a": torch.arange(4.0), "b": torch.tensor(3)}, {"epoch": 1, "loss": 0.1})


def test_checkpoint_comes_back_bit_for_bit_and_older_ones_go(tmp_path):
    assert disk.load_checkpoint(tmp_path) is None
    saved(tmp_path)
    saved(tmp_path)
    loaded = disk.load_checkpoint(tmp_path)
    assert torch.equal(loaded.tensors["a"], torch.arange(4.0))
    assert loaded.values == {"epoch": 1, "loss": 0.1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.safetensors"]


def test_altered_weights_are_refused(tmp_path):
    saved(tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelError, match="digest"):
        disk.load_checkpoint(tmp_path)


def test_altered_values_are_refused(tmp_path):
    saved(tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    data = path.read_bytes()
    value = rb"\"epoch\": "
    assert data.count(value + b"1") == 1
    path.write_bytes(data.replace(value + b"1", value + b"7"))
    with pytest.raises(ModelError, match="damaged or modified"):
        disk.load_checkpoint(tmp_path)
    path.write_text("{")
    with pytest.raises(ModelError, match=r"checkpoint\.safetensors: damaged"):
        disk.load_checkpoint(tmp_path)


def test_a_disk_that_is_full_leaves_the_last_checkpoint_and_says_so(tmp_path, monkeypatch):
    saved(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk.Path, "write_bytes", full)
    with pytest.raises(TopworkError, match="no space left"):
        disk.save_checkpoint(tmp_path, {"a": torch.zeros(2)}, {"epoch": 2})
    monkeypatch.undo()
    assert disk.load_checkpoint(tmp_path).values["epoch"] == 1
    assert not list(tmp_path.glob(".*.partial"))


def test_a_disk_that_fills_up_during_a_run_is_named_and_the_run_goes_on_from_the_last_checkpoint(tmp_path, monkeypatch):
    recipe = recipe_for(epochs=4)
    whole = fit(TinyNetwork(), recipe, *streams(recipe=recipe))
    write, n_left = disk.Path.write_bytes, iter(range(3))  # the first save, and those of two epochs

    def fill(path, data):
        if next(n_left, None) is None:
            write(path, data[: len(data) // 2])
            raise OSError(28, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(disk.Path, "write_bytes", fill)
    with pytest.raises(TopworkError, match=f"{tmp_path}.*: no space left on device"):
        fit(TinyNetwork(), recipe, *streams(recipe=recipe), TrainerContext(tmp_path))
    monkeypatch.undo()
    assert disk.load_checkpoint(tmp_path).values["epoch"] == 2
    resumed = fit(TinyNetwork(seed=5), recipe, *streams(recipe=recipe), TrainerContext(tmp_path, resume=True))
    assert all(torch.equal(value, resumed.last[name]) for name, value in whole.last.items())
