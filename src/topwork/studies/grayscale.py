"""Grayscale images and a color backbone: repeat the channel, fold the first convolution, or learn three channels.

The lecture's exercise is a convolution from one to three channels in front of frozen layers. It is initialized in two ways:
to repeat the channel, and at random.
"""

from __future__ import annotations

from topwork.blocks import Grid
from topwork.data.transforms import Pixels
from topwork.evaluation.perturb import gray
from topwork.models.small_networks import FirstChannel, LearnedColors, fold_first_convolution
from topwork.studies.bench import Bench, Bools
from topwork.studies.learning import by_epoch, fitted, learn, logits_of, pretrained, runs_table, seeded, task_of
from topwork.studies.study import Findings, accuracies, accuracy_bars, compared
from topwork.training.recipe import TuneSettings

RATE = 1e-3
SETTINGS = TuneSettings(strategy="all", lr=f"{RATE}", augment="none", batch_norm="frozen", batch_size=16)
COLOR, SHIFTED = "color", "grayscale, head trained on color"
REPEATED, FOLDED = "grayscale, channel repeated", "grayscale, first convolution folded"
FROM_COPY, FROM_RANDOM = "learned colors, initialized to repeat", "learned colors, initialized at random"


def run(bench: Bench) -> Findings:
    """Runs the study."""
    backbone, epochs = bench.scaled(96, 32), bench.pick(4, 1)
    color, task = task_of(bench, backbone), task_of(bench, backbone, gray)
    color_head, in_color = fitted(bench, color, "color", backbone, COLOR)
    head, repeated = fitted(bench, task, "gray", backbone, REPEATED)

    def network() -> LearnedColors:
        return LearnedColors(pretrained(backbone, task.n_classes, head), backbone.spec)

    def from_random() -> LearnedColors:
        module = network()
        module.colors.conv.reset_parameters()
        return module

    runs = [repeated]
    for name, make in ((FROM_COPY, network), (FROM_RANDOM, from_random)):
        bench.reporter.step(f"grayscale: {name}")
        settings = TuneSettings(**vars(SETTINGS) | {"epochs": epochs})
        rates = {"colors": RATE, "network": 0.0, "classifier": RATE}
        runs.append(learn(name, seeded(make, bench.seed), settings, task, rates))
    plain = logits_of(pretrained(backbone, task.n_classes, head), task)
    folded = logits_of(FirstChannel(fold_first_convolution(pretrained(backbone, task.n_classes, head))), task)
    shifted = logits_of(pretrained(backbone, task.n_classes, color_head), task)
    answers: dict[str, Bools] = {
        COLOR: in_color.correct,
        SHIFTED: shifted.argmax(1) == task.held_out_labels,
        FOLDED: folded.argmax(1) == task.held_out_labels,
        **{found.name: found.correct for found in runs},
    }
    gap = float(abs(folded - plain).max())
    pairs = ((COLOR, REPEATED), (COLOR, SHIFTED), (REPEATED, FROM_COPY), (REPEATED, FROM_RANDOM))
    return Findings(
        sentences=(
            *(compared(one, answers[one], two, answers[two], bench.seed) for one, two in pairs),
            _folded_sentence(gap, float(abs(plain).max())),
        ),
        parts=(
            accuracy_bars("Accuracy on grayscale images", answers),
            by_epoch("Learning three channels", runs[1:], "accuracy"),
            runs_table(runs, "In the exercise, the backbone is frozen; the color layer and the head are trained."),
            Grid("The images", ("color", "grayscale"), _pairs(color.train[:4], task.train[:4])),
        ),
        values={"accuracy": accuracies(answers), "folded_differs_by": gap},
        facts=task.facts(bench, epochs),
    )


def _folded_sentence(gap: float, scale: float) -> str:
    """Whether the folded network is equivalent to a repeated channel, from the largest difference of logits."""
    facts = f"Folding the first convolution changes logits by at most {gap:.1e}"
    if gap < 1e-2 * scale:
        return f"{facts}: equivalent to repeating the channel, with a third of the multiplications in the first layer."
    return (
        f"{facts}: not equivalent to repeating the channel, because this backbone normalizes the channels differently."
    )


def _pairs(color: Pixels, gray_images: Pixels) -> tuple[tuple[str, tuple[Pixels, ...]], ...]:
    return tuple((f"image {n}", pair) for n, pair in enumerate(zip(color, gray_images, strict=True), start=1))
