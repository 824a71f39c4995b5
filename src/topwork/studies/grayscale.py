"""Gray images and a color backbone: repeat the channel, fold the first convolution, or learn three channels from one.

The lecture's exercise is a convolution from one to three channels in front of frozen layers. It is trained here from two
starts: as the repeated channel, and at random.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from torch import nn

from topwork.blocks import Grid, Table
from topwork.evaluation.perturb import gray
from topwork.models.head import LinearHead
from topwork.models.small_networks import FirstChannel, LearnedColors, fold_first_convolution
from topwork.studies.bench import Bench, Bools
from topwork.studies.learning import Learned, Task, by_epoch, embed_task, learn, logits_of, pretrained, seeded, task_of
from topwork.studies.study import Findings, Measured, accuracies, accuracy_bars, compared, difference
from topwork.text import count, percent
from topwork.training.recipe import TuneSettings

SIDE, QUICK_SIDE = 96, 32
N_TRAIN, N_HELD_OUT = 240, 200
EPOCHS, QUICK_EPOCHS = 4, 1
RATE = 1e-3
COLOR, SHIFTED = "color", "gray, head trained on color"
REPEATED, FOLDED = "gray, channel repeated", "gray, first convolution folded"
FROM_COPY, FROM_RANDOM = "learned colors, from repetition", "learned colors, from random"


def run(bench: Bench) -> Findings:
    """The study."""
    side, epochs = bench.side(SIDE, QUICK_SIDE), QUICK_EPOCHS if bench.quick else EPOCHS
    backbone = bench.scaled(side)
    color, task = task_of(bench, side, N_TRAIN, N_HELD_OUT), task_of(bench, side, N_TRAIN, N_HELD_OUT, gray)
    n = len(task.train)
    features = {k: embed_task(bench, t, f"{k} {side}", backbone) for k, t in (("color", color), ("gray", task))}
    heads = {kind: bench.probe_on(found, np.arange(n), task.train_labels) for kind, found in features.items()}

    def right(head: str, images: str) -> Bools:
        held = features[images].block("last", np.arange(n, n + len(task.held_out)))
        return np.asarray(heads[head].logits({"last": held}).argmax(1) == task.held_out_labels)

    repeated = logits_of(pretrained(backbone, task.n_classes, heads["gray"]), task)
    folded = logits_of(FirstChannel(fold_first_convolution(pretrained(backbone, task.n_classes, heads["gray"]))), task)
    gap = float(abs(folded - repeated).max())
    trained = _trained(bench, side, task, heads["gray"], epochs)
    answers: dict[str, Bools] = {
        COLOR: right("color", "color"),
        SHIFTED: right("color", "gray"),
        REPEATED: right("gray", "gray"),
        FOLDED: np.asarray(folded.argmax(1) == task.held_out_labels),
        **{name: found.correct for name, found in trained.items()},
    }
    n_head = int(heads["gray"].weight.size + heads["gray"].bias.size)
    return Findings(
        sentences=(
            compared("color", answers[COLOR], "gray images with the channel repeated", answers[REPEATED], bench.seed),
            _shift_sentence(answers, bench.seed),
            _folded_sentence(gap, float(abs(repeated).max()), answers),
            *_exercise_sentences(answers, bench.seed),
        ),
        parts=(
            accuracy_bars("Ways to use gray images", answers),
            by_epoch("Learning three colors", trained.values(), "accuracy"),
            Table(
                "What is trained",
                ("way", "trainable parameters", "seconds", "accuracy"),
                (
                    (REPEATED, n_head, None, Measured.of(answers[REPEATED])),
                    *((name, f.n_trainable, f.seconds, Measured.of(f.correct)) for name, f in trained.items()),
                ),
                f"{count(epochs, 'epoch')} on {n} images at {side} px; the backbone is frozen.",
            ),
            Grid(
                "The images",
                ("in color", "in gray"),
                tuple((f"image {k + 1}", (color.train[k], task.train[k])) for k in range(min(4, n))),
            ),
        ),
        values={"accuracy": accuracies(answers), "folded_differs_by": gap},
        facts=bench.facts(side=side, epochs=epochs, n_train=n, n_held_out=len(task.held_out)),
    )


def _trained(bench: Bench, side: int, task: Task, head: LinearHead, epochs: int) -> dict[str, Learned]:
    """The exercise from both starts."""
    backbone = bench.scaled(side)
    settings = TuneSettings(
        strategy="all", epochs=epochs, lr=f"{RATE}", augment="none", batch_norm="frozen", batch_size=16
    )

    def colors(at_random: bool) -> nn.Module:
        module = LearnedColors(pretrained(backbone, task.n_classes, head), backbone.spec)
        if at_random:
            module.colors.conv.reset_parameters()
        return module

    found = {}
    for name, at_random in ((FROM_COPY, False), (FROM_RANDOM, True)):
        bench.say(f"grayscale: {name}")
        network = seeded(partial(colors, at_random), bench.seed)
        rates = {"colors": RATE, "network": 0.0, "classifier": RATE}
        found[name] = learn(name, network, settings, task, rates=rates)
    return found


def _shift_sentence(answers: dict[str, Bools], seed: int) -> str:
    change = difference(answers[COLOR], answers[SHIFTED], seed)
    facts = f"A head trained on color images has {percent(float(answers[SHIFTED].mean()))} on gray ones: {change}"
    return f"{facts}. Train on what you will see." if change.is_clear else f"{facts}, no significant difference."


def _folded_sentence(gap: float, scale: float, answers: dict[str, Bools]) -> str:
    n = int((answers[FOLDED] != answers[REPEATED]).sum())
    if n == 0 and gap < 1e-2 * max(scale, 1e-9):
        return (
            f"Folding the first convolution gives the same as repeating the channel (logits differ by {gap:.1e} at most), with a "
            "third of the multiplications of the first layer."
        )
    return (
        f"Folding the first convolution does not give exactly the same as repeating the channel (logits differ by up to {gap:.2g}, "
        f"{n} predictions): this backbone normalizes each channel differently."
    )


def _exercise_sentences(answers: dict[str, Bools], seed: int) -> list[str]:
    said = []
    for name, start in ((FROM_COPY, "as repetition"), (FROM_RANDOM, "at random")):
        gain = difference(answers[REPEATED], answers[name], seed)
        verdict = (
            "no significant difference" if not gain.is_clear else "it helps" if gain.value > 0 else "it costs accuracy"
        )
        said.append(
            f"The exercise (a learned convolution from one to three channels before frozen layers), started {start}: "
            f"{percent(float(answers[name].mean()))}, {gain} against repeating the channel: {verdict}."
        )
    return said
