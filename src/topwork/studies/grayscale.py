"""Gray images and a color backbone: repeat the channel, fold the first convolution, or learn three channels from one.

The lecture's exercise is a convolution from one to three channels in front of frozen layers. It is trained here from two
starts: as the plain repetition of the channel, and at random.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from torch import nn

from topwork.blocks import Bars, Chart, Grid, Series, Table
from topwork.evaluation.perturb import gray
from topwork.models.head import LinearHead
from topwork.models.small_networks import FirstChannel, LearnedColors, fold_first_convolution
from topwork.studies.bench import Bench, Bools
from topwork.studies.learning import Learned, Task, learn, logits_of, pretrained, seeded, task_of
from topwork.studies.study import Findings, Measured
from topwork.studies.words import compared, difference
from topwork.text import count, percent, points
from topwork.training.recipe import TuneSettings

SIDE, QUICK_SIDE = 96, 32
N_TRAIN, N_HELD_OUT = 240, 200
EPOCHS, QUICK_EPOCHS = 4, 1
RATE = 1e-3
REPEATED, FOLDED = "gray, channel repeated", "gray, first convolution folded"
FROM_COPY, FROM_RANDOM = "learned colors, from repetition", "learned colors, from random"


def run(bench: Bench) -> Findings:
    """The study."""
    side, epochs = bench.side(SIDE, QUICK_SIDE), QUICK_EPOCHS if bench.quick else EPOCHS
    backbone = bench.scaled(side)
    color, task = task_of(bench, side, N_TRAIN, N_HELD_OUT), task_of(bench, side, N_TRAIN, N_HELD_OUT, gray)
    n = len(task.train)
    rows = np.concatenate([bench.train[:n], bench.held_out[: len(task.held_out)]])
    features = {
        kind: bench.embedded(rows, np.concatenate([some.train, some.held_out]), f"{kind} {side}", backbone)
        for kind, some in (("color", color), ("gray", task))
    }
    held = np.arange(n, len(rows))
    heads = {kind: bench.probe_on(found, np.arange(n), task.train_labels) for kind, found in features.items()}

    def right(head: str, images: str) -> Bools:
        logits = heads[head].logits({"last": features[images].block("last", held)})
        return np.asarray(logits.argmax(1) == task.held_out_labels)

    answers = {
        "color": right("color", "color"),
        "gray, head trained on color": right("color", "gray"),
        REPEATED: right("gray", "gray"),
    }
    network = pretrained(backbone, task.n_classes, heads["gray"])
    repeated = logits_of(network, task)
    folded = logits_of(FirstChannel(fold_first_convolution(pretrained(backbone, task.n_classes, heads["gray"]))), task)
    gap = float(abs(folded - repeated).max())
    answers[FOLDED] = np.asarray(folded.argmax(1) == task.held_out_labels)
    trained = _trained(bench, side, task, heads["gray"], epochs)
    answers |= {name: found.correct for name, found in trained.items()}
    return Findings(
        sentences=(
            compared("color images", answers["color"], "the same images in gray, channel repeated", answers[REPEATED], bench.seed),
            _shift_sentence(answers, bench.seed),
            _folded_sentence(gap, float(abs(repeated).max()), answers),
            *_exercise_sentences(answers, bench.seed),
        ),
        parts=(
            Bars(
                "Ways to use gray images", "accuracy on held-out images",
                tuple((name, Measured.of(found)) for name, found in answers.items()),
            ),
            Chart(
                "Learning three colors", "epoch", "accuracy on held-out images",
                tuple(
                    Series(name, tuple((float(e.number), float(e.correct.mean())) for e in found.epochs))
                    for name, found in trained.items()
                ),
                y_is_share=True,
            ),
            Table(
                "What is trained",
                ("way", "trainable parameters", "seconds", "accuracy"),
                (
                    (REPEATED, int(heads["gray"].weight.size + heads["gray"].bias.size), None, Measured.of(answers[REPEATED])),
                    *((name, f.n_trainable, f.seconds, Measured.of(f.correct)) for name, f in trained.items()),
                ),
                f"{count(epochs, 'epoch')} on {n} images at {side} px; the backbone rests.",
            ),
            Grid(
                "The images", ("in color", "in gray"),
                tuple((f"image {k + 1}", (color.train[k], task.train[k])) for k in range(min(4, n))),
            ),
        ),
        values={
            "accuracy": {name: float(found.mean()) for name, found in answers.items()},
            "folded_differs_by": gap,
        },
        facts=bench.facts(side=side, epochs=epochs, n_train=len(task.train), n_held_out=len(task.held_out)),
    )  # fmt: skip


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
        rates = {"colors": RATE, "network": 0.0, "classifier": RATE}
        made = seeded(partial(colors, at_random), bench.seed)
        found[name] = learn(name, made, settings, task, rates=rates)
    return found


def _shift_sentence(answers: dict[str, Bools], seed: int) -> str:
    moved = difference(answers["color"], answers["gray, head trained on color"], seed)
    facts = (
        f"A head trained on color images, asked about gray ones, is right for "
        f"{percent(float(answers['gray, head trained on color'].mean()))}: {points(moved.value)} points "
        f"({points(moved.low)} to {points(moved.high)})"
    )
    return f"{facts}; train on what you will see." if moved.is_clear else f"{facts}, no clear difference."


def _folded_sentence(gap: float, scale: float, answers: dict[str, Bools]) -> str:
    n = int((answers[FOLDED] != answers[REPEATED]).sum())
    if n == 0 and gap < 1e-2 * max(scale, 1e-9):
        return (
            f"Folding the first convolution gives what repeating the channel gives (logits differ by {gap:.1e} at most), "
            "with a third of the multiplications of the first layer."
        )
    return (
        f"Folding the first convolution does not give quite what repeating the channel gives (logits differ by up to "
        f"{gap:.2g}, {n} answers): this backbone's channels have means and deviations of their own."
    )


def _exercise_sentences(answers: dict[str, Bools], seed: int) -> list[str]:
    said = []
    for name, words in ((FROM_COPY, "started as repetition"), (FROM_RANDOM, "started at random")):
        gain = difference(answers[REPEATED], answers[name], seed)
        facts = (
            f"The exercise, a learned convolution from one to three channels in front of frozen layers, {words}: "
            f"{percent(float(answers[name].mean()))}, {points(gain.value)} points against repeating the channel "
            f"({points(gain.low)} to {points(gain.high)})"
        )
        if not gain.is_clear:
            said.append(f"{facts}: no clear difference.")
        else:
            said.append(f"{facts}: {'it works, and helps' if gain.value > 0 else 'it costs accuracy'}.")
    return said
