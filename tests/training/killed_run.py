"""Runs on drawn data that are killed and resumed: ``killed_run.py FOLDER --kills N``. Needs fork.

A run is made once without interruption, then again in processes that SIGKILL ends at random moments, each continuing
where the last one was saved. Prints both digests of all final weights and histories as JSON.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    expected = complete(options.folder / "whole", options.epochs)
    n_killed, result, rng = 0, None, random.Random(options.seed)
    while result is None:
        n_left = options.kills - n_killed
        kill_at = (rng.randint(1, 3), rng.uniform(0, 0.05)) if n_left else None
        result = complete(options.folder / "killed", options.epochs, kill_at)
        n_killed += result is None
    sys.stdout.write(json.dumps({"n_killed": n_killed, "uninterrupted": expected, "killed_and_resumed": result}))


def complete(folder, n_epochs, kill_at=None):
    """Runs in a forked child; its digest, or None when it was killed before the end.

    Args:
        kill_at: (step of this process, seconds after it began).
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.write(writing, train(folder, n_epochs, writing).encode())
        os._exit(0)
    os.close(writing)
    if kill_at is not None:
        os.read(reading, 1)
        for _ in range(kill_at[0]):
            os.read(reading, 1)
        time.sleep(kill_at[1])
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    with os.fdopen(reading) as pipe:
        text = pipe.read().lstrip("!")
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return None
    assert status == 0, status
    return text


def train(folder, n_epochs, steps):
    import torch

    from topwork.models.backbone import weights_digest
    from topwork.training.loop import TrainerContext, fit
    from training.drawn import TinyNetwork, recipe_for, streams

    torch.set_num_threads(1)
    recipe = recipe_for(
        n_train=32,
        epochs=n_epochs,
        strategy="gradual",
        mixup=0.2,
        augment="standard",
        ema=0.9,
        average_best=2,
        batch_norm="train",
    )

    def stop():
        os.write(steps, b"!")
        return False

    network, data = TinyNetwork(), streams(32, 12, recipe)
    context = TrainerContext(folder=folder, resume=True, stop=stop, checkpoint_seconds=0.0)
    tuned = fit(network, recipe, *data, context)
    states = {
        f"{kind}.{name}": value.numpy()
        for kind in ("best", "last", "start")
        for name, value in getattr(tuned, kind).items()
    }
    losses = [(record["train_loss"], record["valid_loss"]) for record in tuned.history]
    return f"{weights_digest(states)} {losses}"


if __name__ == "__main__":
    import torch._dynamo  # noqa: F401

    import topwork.training.loop  # noqa: F401 - imported before the forks, once; torch imports the next one in any case
    import training.drawn  # noqa: F401

    main()
