"""A run on drawn data for ``torchrun``: ``two_processes.py FILE`` writes its weights and history there."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def main():
    import torch

    torch.set_num_threads(1)
    from safetensors.torch import save_file

    from topwork.training.distributed import processes
    from topwork.training.loop import Surroundings, fit
    from training.drawn import TinyNetwork, recipe_for, streams

    # 43 and 19 divide neither by two nor by the batch size: nothing may be padded or counted twice
    recipe = recipe_for(n_train=43, n_valid=19, augment="light", class_weights="on", ema=0.9)
    network = TinyNetwork()
    network.dropout.p = 0.0  # each process draws its own
    group = processes()
    around = Surroundings(folder=Path(sys.argv[1]).with_suffix(".folder"), processes=group)
    tuned = fit(network, recipe, *streams(43, 19, recipe), around)
    if group.is_main:
        records = torch.tensor(
            [[r["train_loss"], r["train_accuracy"], r["valid_loss"], r["valid_accuracy"]] for r in tuned.history]
        )
        save_file({"history": records, "n": torch.tensor(group.n)} | tuned.best, sys.argv[1])


if __name__ == "__main__":
    main()
