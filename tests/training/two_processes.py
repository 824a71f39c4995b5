"""A run on drawn data for ``torchrun``: ``two_processes.py FILE`` writes its weights and history there."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def main():
    import torch

    torch.set_num_threads(1)
    from safetensors.torch import save_file

    from topwork.training import loop
    from topwork.training.distributed import processes
    from topwork.training.loop import TrainerContext, fit
    from training.drawn import TinyNetwork, recipe_for, streams

    # 43 and 19 divide neither by two nor by the batch size: nothing may be padded or counted twice
    recipe = recipe_for(n_train=43, n_valid=19, augment="light", balance="weights", ema=0.9)
    group = processes()
    loop.EVALUATION_BATCH = 9  # of 19 images the first process evaluates two batches and the second one
    network = TinyNetwork()
    network.dropout.p = 0.0  # each process draws its own
    context = TrainerContext(Path(sys.argv[1]).with_suffix(".folder"), processes=group)
    result = fit(network, recipe, *streams(43, 19, recipe), context)
    if group.is_main:
        records = torch.tensor(
            [[r["train_loss"], r["train_accuracy"], r["valid_loss"], r["valid_accuracy"]] for r in result.history]
        )
        save_file({"history": records, "n": torch.tensor(group.n)} | result.best, sys.argv[1])


if __name__ == "__main__":
    main()
