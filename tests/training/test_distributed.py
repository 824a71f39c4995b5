"""Two processes give the result of one, with exact figures."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from topwork.training.distributed import Processes

SCRIPT = Path(__file__).with_name("two_processes.py")


def run(command, file):
    source = Path(__file__).parents[2] / "src"
    environment = os.environ | {"PYTHONPATH": str(source), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [*command, str(SCRIPT), str(file)]
    ended = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return load_file(file)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes_train_as_one(tmp_path):
    one = run([sys.executable], tmp_path / "one.safetensors")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29617"]
    two = run(launcher, tmp_path / "two.safetensors")
    assert (int(one.pop("n")), int(two.pop("n"))) == (1, 2)
    # accuracies are shares of 43 and 19 images: exact
    torch.testing.assert_close(two["history"][:, [1, 3]], one["history"][:, [1, 3]], rtol=0, atol=1e-7)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)


def test_alone_every_verb_does_nothing():
    alone = Processes()
    assert alone.total([1.0, 2.0]) == [1.0, 2.0]
    assert alone.any(True)
    assert not alone.any(False)
    assert alone.is_main
