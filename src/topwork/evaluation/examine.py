"""What does a model rely on? In go a classifier and labeled images, out come effects, findings and plain sentences.

The images are changed in one way at a time (``perturb``, ``preprocessing``) and the same model answers again; each
effect is paired with the answers to the unchanged images. An effect is significant only if it stays so among all of them
(McNemar's exact test, with the false discovery rate held at 5%: Benjamini & Hochberg 1995).

Not here: what is said about the numbers (``findings``), watermarks (``fixed_regions``), pages (``report``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topwork.data.transforms import InputSpec, Pixels
from topwork.evaluation.compare import accuracy_difference_interval, mcnemar
from topwork.evaluation.explain import Randomized, border_area, border_share, find_evidence, randomization_test
from topwork.evaluation.findings import Effect, Finding, effect_sentence, find_findings
from topwork.evaluation.fixed_regions import FixedPlace, fixed_places
from topwork.evaluation.intervals import wilson
from topwork.evaluation.perturb import PERTURBATIONS, Perturbation
from topwork.evaluation.predictions import Bools, Ints, softmax
from topwork.evaluation.preprocessing import Fit, alternatives, renormalized, statistics_fit
from topwork.evaluation.shortcut import ShortcutCheck
from topwork.features.engine import Engine
from topwork.features.feature_maps import OpenNetwork, open_network
from topwork.models.classifier import Classifier

N_EXAMPLES = 4
_N_MAPS = {
    "activation": 200,
    "gradient": 100,
    "occlusion": 24,
}  # images whose evidence is looked at: occlusion costs 49 passes each
_N_CHECKED = 32  # images for the batch-norm check
_N_RANDOMIZED = 8


@dataclass(frozen=True)
class Examination:
    """Everything ``topwork examine`` found.

    Attributes:
        n: images examined.
        guess: accuracy of always predicting the most frequent class.
        unchanged: the unchanged images.
        effects: one per perturbation, preprocessing last.
        fits: how normalizations fit the weights, best first.
        border: share of the evidence in the outer tenth of each side, and the share of the area that is.
        example_rows: positions of the example images.
    """

    n: int
    guess: float
    unchanged: Effect
    effects: tuple[Effect, ...]
    fits: tuple[Fit, ...]
    places: tuple[FixedPlace, ...]
    border: tuple[float, float] | None
    method: str
    randomized: tuple[Randomized, ...]
    shortcuts: ShortcutCheck | None
    findings: tuple[Finding, ...]
    example_rows: tuple[int, ...]
    notes: tuple[str, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = asdict(self)
        values["effects"] = [asdict(e) | {"is_clear": e.is_clear} for e in self.effects]
        return values


def examine(
    classifier: Classifier,
    engine: Engine,
    load: Callable[[InputSpec], Pixels],
    labels: Ints,
    *,
    shortcuts: ShortcutCheck | None = None,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Examination:
    """Examines a classifier on images whose classes it knows.

    Args:
        engine: runs the network as in prediction.
        load: the images, uint8 (N, H, W, 3), as an input spec wants them.
        labels: (N,) true labels.
        shortcuts: what facts of the files alone tell about the labels.
        on_progress: called with (steps done, steps in all).
    """
    spec = classifier.backbone.spec
    images = load(spec)
    others = alternatives(spec)
    fits_to_try = [fit for fit in ("squash", "crop") if fit != spec.fit]
    n_steps = 1 + len(PERTURBATIONS) + len(others) + len(fits_to_try) + 3
    progress = _Progress(on_progress, n_steps)
    network = open_network(classifier.backbone)
    asker = _Asker(classifier, engine, network, labels, seed)
    asker.ask("unchanged", "", "Unchanged", images, "")
    progress.step()
    for some in PERTURBATIONS:
        asker.ask(some.name, some.group, some.title, some.make(images), "", some)
        progress.step()
    for fit in fits_to_try:
        changed = load(InputSpec.from_dict(spec.as_dict() | {"fit": fit}))
        title = "Center crop" if fit == "crop" else "Squashed"
        asker.ask(
            f"fit_{fit}", "preprocessing", title, changed, f"With {_FIT_WORDS[fit]} instead of {_FIT_WORDS[spec.fit]}"
        )
        progress.step()
    for other in others:
        values = renormalized(images, spec, other)
        asker.ask(f"norm_{_slug(other.name)}", "normalization", other.name, values, f"Normalized with {other.name}")
        progress.step()
    effects = asker.effects()
    evidence = _evidence(classifier, images, labels, network, engine)
    places = fixed_places(classifier, engine, images[: len(evidence.maps)], labels[: len(evidence.maps)], evidence.maps)
    progress.step()
    border = (float(border_share(evidence.maps).mean()), border_area()) if len(evidence.maps) else None
    fits = statistics_fit(classifier.backbone, images[:_N_CHECKED])
    progress.step()
    n = _N_RANDOMIZED
    is_exact = evidence.method == "activation"
    randomized = randomization_test(classifier, images[:n], labels[:n], evidence.maps[:n], seed) if is_exact else ()
    progress.step()
    findings = find_findings(effects, asker.guess, fits, places, border, randomized, shortcuts)
    return Examination(
        n=len(labels),
        guess=asker.guess,
        unchanged=effects["unchanged"],
        effects=tuple(effect for name, effect in effects.items() if name != "unchanged"),
        fits=fits,
        places=places,
        border=border,
        method=evidence.method,
        randomized=randomized,
        shortcuts=shortcuts,
        findings=findings,
        example_rows=tuple(int(row) for row in asker.examples),
    )


class _Progress:
    def __init__(self, tell: Callable[[int, int], None] | None, n_steps: int) -> None:
        self.tell, self.n_steps, self.n_done = tell, n_steps, 0

    def step(self) -> None:
        self.n_done += 1
        if self.tell:
            self.tell(min(self.n_done, self.n_steps), self.n_steps)


_FIT_WORDS = {"squash": "squashing", "crop": "a center crop", "pad": "padding"}


# ---- effects


@dataclass(frozen=True, eq=False)
class _Answers:
    group: str
    title: str
    done: str
    about: str
    predicted: Ints
    probability: NDArray[np.float64]
    correct: Bools


class _Asker:
    """Asks the model again and again, and compares with its first answers."""

    def __init__(self, classifier: Classifier, engine: Engine, network: OpenNetwork, labels: Ints, seed: int) -> None:
        self.classifier, self.engine, self.network, self.labels, self.seed = classifier, engine, network, labels, seed
        self.answers: dict[str, _Answers] = {}
        self.guess = float(np.bincount(labels).max() / len(labels))

    def ask(
        self, name: str, group: str, title: str, images: NDArray[Any], done: str, some: Perturbation | None = None
    ) -> None:
        is_bytes = images.dtype == np.uint8
        blocks = self.engine.run(images) if is_bytes else self.network.run(images).blocks
        probabilities = softmax(self.classifier.head.logits(dict(blocks)))
        predicted = probabilities.argmax(1).astype(np.int64)
        about = some.about if some else "the right preprocessing"
        self.answers[name] = _Answers(
            group, title, some.done if some else done, about, predicted, probabilities.max(1), predicted == self.labels
        )

    @property
    def examples(self) -> Ints:
        """Images to show: answered correctly when unchanged, of as many classes as there are."""
        first = self.answers["unchanged"]
        order = np.random.default_rng(self.seed).permutation(len(self.labels))
        order = order[np.argsort(~first.correct[order], kind="stable")]
        _, places = np.unique(self.labels[order], return_index=True)
        once = order[np.sort(places)]
        rest = order[~np.isin(order, once)]
        return np.concatenate([once, rest])[:N_EXAMPLES].astype(np.int64)

    def effects(self) -> dict[str, Effect]:
        first, shown = self.answers["unchanged"], self.examples
        raw = {name: mcnemar(first.correct, a.correct) for name, a in self.answers.items() if name != "unchanged"}
        corrected = _corrected(raw)
        found: dict[str, Effect] = {}
        for name, answers in self.answers.items():
            n, right = len(answers.correct), float(answers.correct.mean())
            around = accuracy_difference_interval(first.correct, answers.correct)
            interval = wilson(right, n)
            effect = Effect(
                name=name,
                group=answers.group,
                title=answers.title,
                n=n,
                accuracy=right,
                low=interval.low,
                high=interval.high,
                confidence=float(answers.probability.mean()),
                difference=right - float(first.correct.mean()),
                difference_low=around.low,
                difference_high=around.high,
                p_value=corrected.get(name, 1.0),
                same=float((answers.predicted == first.predicted).mean()),
                sentence="",
                examples=tuple(
                    (self.classifier.classes[answers.predicted[row]], round(float(answers.probability[row]), 4))
                    for row in shown
                ),
            )
            said = effect_sentence(effect, answers.done, answers.about, float(first.correct.mean()), self.guess)
            found[name] = Effect(**(vars(effect) | {"sentence": said}))
        return found


def _corrected(p_values: dict[str, float]) -> dict[str, float]:
    """P-values adjusted for their number, so that of those below 0.05 about 5% are chance (Benjamini & Hochberg 1995)."""
    order = sorted(p_values, key=lambda name: -p_values[name])
    corrected, lowest = {}, 1.0
    for place, name in enumerate(order):
        lowest = min(lowest, p_values[name] * len(order) / (len(order) - place))
        corrected[name] = lowest
    return corrected


# ---- evidence


def _evidence(
    classifier: Classifier, images: Pixels, labels: Ints, network: OpenNetwork, engine: Engine
) -> _TrueEvidence:
    """Maps of the true class, of as many images as are affordable, in pieces so that memory stays flat."""
    first = find_evidence(classifier, images[:1], labels[:1, None], network, engine)
    n = min(len(images), _N_MAPS[first.method])
    pieces = [
        find_evidence(classifier, images[start : start + 32], labels[start : start + 32, None], network, engine).maps[
            :, 0
        ]
        for start in range(0, n, 32)
    ]
    return _TrueEvidence(first.method, np.concatenate(pieces)[:n] if pieces else first.maps[:0, 0])


@dataclass(frozen=True, eq=False)
class _TrueEvidence:
    method: str
    maps: NDArray[np.float32]


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name.lower()).strip("_")
