"""A run on drawn data for ``torchrun``: ``two_processes.py FILE [fsdp]`` writes its weights and history there.

With ``fsdp`` weights are shared out, and the run is interrupted once and resumed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def main():
    import torch

    torch.set_num_threads(1)
    from safetensors.torch import save_file

    from topwork.training import loop
    from topwork.training.distributed import own_part, processes
    from topwork.training.loop import Surroundings, fit
    from training.drawn import TinyNetwork, recipe_for, streams

    # 43 and 19 divide neither by two nor by the batch size: nothing may be padded or counted twice
    is_shared = sys.argv[2:] == ["fsdp"]
    recipe = recipe_for(n_train=43, n_valid=19, augment="light", class_weights="on", ema=0.9, fsdp=is_shared)
    group = processes()
    folder = Path(sys.argv[1]).with_suffix(".folder")
    loop.JUDGE_BATCH = 9  # of 19 images the first process judges two batches and the second one

    def train(**options):
        network = TinyNetwork()
        network.dropout.p = 0.0  # each process draws its own
        done = fit(network, recipe, *streams(43, 19, recipe), Surroundings(folder, processes=group, **options))
        held = sum(own_part(value).numel() for value in network.parameters())
        assert (held < 0.6 * sum(value.numel() for value in network.parameters())) == is_shared
        return done

    if is_shared:
        steps = iter(range(9))
        assert train(stop=lambda: next(steps, None) is None).ending == "interrupted"
    tuned = train(resume=True)
    if group.is_main:
        records = torch.tensor(
            [[r["train_loss"], r["train_accuracy"], r["valid_loss"], r["valid_accuracy"]] for r in tuned.history]
        )
        save_file({"history": records, "n": torch.tensor(group.n)} | tuned.best, sys.argv[1])


if __name__ == "__main__":
    main()
