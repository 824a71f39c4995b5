"""The command under ``torchrun``: two processes make the run that one makes, and only the first writes it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from drawing import draw_folders
from topwork.progress import tracking

OPTIONS = (
    "--backbone", "random:test_efficientnet", "--size", "64", "--mode", "tune", "--epochs", "2", "--batch-size", "8",
    "--lr", "1e-3", "--no-near-duplicates", "--workers", "1", "--outputs", "binary", "--quiet", "--json",
)  # fmt: skip


def run(launcher, data, out):
    source = Path(__file__).parents[2] / "src"
    environment = os.environ | {"PYTHONPATH": str(source), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [*launcher, "-m", "topwork.cli", "fit", str(data), "--out", str(out), *OPTIONS]
    ended = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.count('"run"') == 1  # one process answers
    return pq.read_table(out / "predictions.parquet").to_pylist()


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes_make_the_run_of_one(tmp_path):
    data = draw_folders(tmp_path / "data", n_each=15, shapes=("disc", "cross"))
    one = run([sys.executable], data, tmp_path / "one")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29631"]
    two = run(launcher, data, tmp_path / "two")
    assert [row["path"] for row in two] == [row["path"] for row in one]
    np.testing.assert_allclose([row["logits"] for row in two], [row["logits"] for row in one], rtol=2e-2, atol=2e-2)
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == sorted(p.name for p in (tmp_path / "one").iterdir())


def test_epochs_go_to_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    with tracking("tensorboard", tmp_path / "run-x", {"lr": "auto", "ema": None}) as track:
        track({"epoch": 1, "train_loss": 0.5, "rates": {"head": 1e-3}, "curve": [[0.5, 0.6, 0.1]]})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folders = {path.parent for path in (tmp_path / "run-x" / "tracking").rglob("events*")}
    read = [EventAccumulator(str(folder)).Reload() for folder in folders]
    seen = {tag: part.Scalars(tag)[0].value for part in read for tag in part.Tags()["scalars"]}
    assert seen["train_loss"] == 0.5
    assert seen["rate/head"] == pytest.approx(1e-4)
