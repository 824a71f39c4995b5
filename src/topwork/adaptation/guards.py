"""Which adapted answers may be believed, decided without labels of the target; when unsure, the model stays as it is.

In: two domains and the source model's logits on the target. Out: a :class:`Choice`: unchanged, refused, or adapted with
the method's name, the reason and everything that was looked at. The rules, in order:

1. Too few images: unchanged. Ten images fix no class means.
2. No clear shift (permutation test of the energy distance): unchanged.
3. Classes that the source does not have: refused. After each domain was centered by itself, the target's images should
   still lie near one class of the source and far from the others.
4. Two hypotheses: the target has the source's class mix, or (the source model's answers crowd into few classes) it
   has not. The one whose answers the target's own neighborhoods support more is taken.
5. Images that look alike should get one class (soft neighborhood density, Saito et al. 2021, arXiv 2108.10860, on hard
   answers): adapted answers must agree with their neighbors clearly more than the source model's do. A target whose
   classes were torn apart or mixed up agrees less.
6. Classes that the source does not have, once more, on the adapted answers: refused where the target's classes lie nowhere
   near the source's; or where they hardly do, the methods contradict each other on many images, and yet the two sets
   look alike as a whole, so that it is not the look that changed. Where the look is far away, contradiction is what one
   expects, and the answers stand.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from topwork.adaptation.align import (
    Domains,
    Ints,
    Shares,
    answers,
    clamped,
    class_confusion,
    class_means,
    combined,
    fit_head,
    information_maximization,
    nearest,
    neighbor_agreement,
    same_mix,
    self_training,
    soft_prototypes,
    standardized,
)
from topwork.evaluation.domains import Distance, energy_distance
from topwork.paired import paired

MIN_IMAGES = 20
MIN_PER_CLASS = 3.0
SIGNIFICANCE = 0.01
# Images of a shifted domain keep a tenth or more of the source's lead of the nearest class over the second (0.11 to 1.04 in
# docs/lab-log.md); images of other classes 0.08 to 0.41, so a small lead is named, and only a tiny one refused.
LEAST_LEAD, DOUBTFUL_LEAD = 0.10, 0.25
LEAST_GAIN, GAIN_ERRORS = 0.03, 2.0  # of neighbor agreement, and standard errors of that gain
LEAST_OF_ROOM = 0.25  # of what is left to gain, where the model is nearly right already
# Rule 6: mean vote, cosine of class means, energy distance. Shifts had votes of 0.85 or more and cosines above 0.32, or a
# distance above 0.12 and cosines above 0.21 (heavy blur); other classes votes below 0.82, cosines below 0.31 and distances
# below 0.12, or cosines below 0.16 (docs/lab-log.md, 2026-11-26).
LEAST_VOTES, LEAST_MATCH, FAR, NO_MATCH = 0.82, 0.33, 0.12, 0.18
CROWDED = 0.7  # share of the greatest entropy of the class mix below which the answers crowd into few classes
HANDICAP = 0.02  # of the other class mix, which starts from the source model's answers and so from their errors
CLEAR_GAIN = 0.10  # gain at which the class mix may change that much
Outcome = Literal["unchanged", "adapted", "refused"]


@dataclass(frozen=True)
class Tried:
    """One set of answers: share of neighbors agreeing, share of images answered as by the source model."""

    method: str
    neighbor_agreement: float
    agreement_with_source: float
    mean_confidence: float


@dataclass(frozen=True, eq=False)
class Choice:
    """What was decided.

    Attributes:
        probabilities: (M, C) the answers to use; those of the source model unless adapted.
        consensus: (M, C) what is believed about each image, for predicted accuracy: the mean vote of the methods under the
            hypothesis that was taken; where none was, the source model's probabilities.
        checks: the numbers behind the decision.
    """

    outcome: Outcome
    method: str
    reason: str
    probabilities: Shares
    consensus: Shares
    distance: Distance
    checks: dict[str, float] = field(default_factory=dict)
    tried: tuple[Tried, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, without the answers."""
        return {
            "outcome": self.outcome,
            "method": self.method,
            "reason": self.reason,
            "distance": self.distance.as_dict(),
            "checks": {key: round(value, 4) for key, value in self.checks.items()},
            "tried": [vars(tried) for tried in self.tried],
        }


def choose(domains: Domains, source_answers: Shares, *, seed: int = 0) -> Choice:
    """Adapts, or leaves the model as it is.

    Args:
        source_answers: (M, C) probabilities of the source model on the target.
    """
    n, n_known = len(domains.target), int((domains.known >= 0).sum())
    distance = energy_distance(domains.source, domains.target, seed=seed)
    given = clamped(source_answers, domains.known)

    def unchanged(reason: str, outcome: Outcome = "unchanged", checks: dict[str, float] | None = None) -> Choice:
        method = "none" if outcome == "refused" or not n_known else "labels only"
        return Choice(outcome, method, reason, given, given, distance, checks or {})

    least = max(MIN_IMAGES, int(MIN_PER_CLASS * domains.n_classes))
    if n < least and not n_known:
        return unchanged(f"{n} images are too few to adapt to without labels (at least {least}).")
    if distance.p_value >= SIGNIFICANCE:
        return unchanged("there is no clear difference between the two domains.")
    if n < least:
        return unchanged(f"{n} images are too few for more than their own labels.", "adapted")
    aligned = standardized(domains)
    checks = {"lead": lead_kept(aligned), "images": float(n), "known_labels": float(n_known)}
    if checks["lead"] < LEAST_LEAD and not n_known:
        return unchanged(
            "the images resemble none of the model's classes more than the others: they look like other classes, or are "
            "too far away to tell.",
            "refused",
            checks,
        )
    return _decided(domains, aligned, given, distance, checks)


def lead_kept(aligned: Domains) -> float:
    """How much of its lead the nearest class keeps on the target: mean of (first - second) cosine, target over source.

    The source's own lead is taken on images whose class mean was computed without them.
    """
    half = np.arange(len(aligned.source)) % 2 == 0
    source = np.concatenate([_leads(aligned, half, ~half), _leads(aligned, ~half, half)])
    target = _lead(aligned.target, class_means(aligned.source, aligned.labels, aligned.n_classes))
    return float(target.mean() / max(float(source.mean()), 1e-6))


def _leads(aligned: Domains, fitted: np.ndarray[Any, Any], judged: np.ndarray[Any, Any]) -> Shares:
    means = class_means(aligned.source[fitted], aligned.labels[fitted], aligned.n_classes)
    return _lead(aligned.source[judged], means)


def _lead(rows: np.ndarray[Any, Any], means: Shares) -> Shares:
    directions = means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-6)
    cosines = np.sort(rows @ directions.T / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6), axis=1)
    return np.asarray(cosines[:, -1] - cosines[:, -2])


def _decided(domains: Domains, aligned: Domains, given: Shares, distance: Distance, checks: dict[str, float]) -> Choice:
    """Rules 4 to 6."""
    is_blind = not (domains.known >= 0).any()
    neighbors = nearest(aligned.target)
    moved, checks["shift_believed"] = same_mix(domains, given)
    moved, checks["shift_believed"] = same_mix(domains, clamped(answers(fit_head(moved), moved.target), moved.known))
    same = _methods(aligned)
    other = _methods(moved, brief=True)
    candidates = {
        "same class mix": combined(
            [same[name] for name in ("confusion", "information", "self-training", "prototypes")]
        ),
        "other class mix": combined([given, other["confusion"], other["information"]]),
    }
    candidates = {name: clamped(found, domains.known) for name, found in candidates.items()}
    agreement = {name: neighbor_agreement(found.argmax(1), neighbors) for name, found in candidates.items()}
    before = neighbor_agreement(given.argmax(1), neighbors)
    supported = {
        key: float(neighbor_agreement(found["confusion"].argmax(1), neighbors).mean())
        for key, found in (("same class mix", same), ("other class mix", other))
    }
    checks["class_mix_entropy"] = class_mix_entropy(given)
    is_crowded = checks["class_mix_entropy"] < CROWDED
    handicap = {"same class mix": 0.0, "other class mix": 0.0 if is_crowded else HANDICAP}
    order = sorted(candidates, key=lambda name: supported[name] - handicap[name])[::-1]
    tried = tuple(
        Tried(
            name,
            float(neighbor_agreement(found.argmax(1), neighbors).mean()),
            float((found.argmax(1) == given.argmax(1)).mean()),
            float(found.max(1).mean()),
        )
        for name, found in {"source model": given, **same, **candidates}.items()
    )
    reason = ""
    for name in order:
        gain = paired(agreement[name], before)
        least_gain = min(LEAST_GAIN, LEAST_OF_ROOM * (1 - float(before.mean())))
        asked = max(least_gain, GAIN_ERRORS * gain.error)
        if name == "same class mix" and is_crowded:
            asked = max(asked, CLEAR_GAIN)
        checks[f"gain ({name})"], checks[f"asked ({name})"] = gain.mean, asked
        if gain.mean >= asked:
            reason = (
                f"neighboring images are given one class more often: {100 * (before.mean() + gain.mean):.0f} % instead "
                f"of {100 * before.mean():.0f} %."
            )
            votes = [given, *(same if name == "same class mix" else other).values()]
            consensus = clamped(combined([_one_hot(vote) for vote in votes]), domains.known)
            checks["votes"] = float(consensus.max(1).mean())
            checks["match"] = class_match(aligned, candidates[name].argmax(1))
            reason_against = _other_classes(checks, distance) if is_blind else None
            if reason_against is not None:
                return Choice("refused", "none", reason_against, given, given, distance, checks, tried)
            return Choice("adapted", name, reason, candidates[name], consensus, distance, checks, tried)
    reason = "adapted answers fit the neighborhoods of the images no better than the model's own; it stays as it is."
    if not is_blind:
        reason = (
            "adapted answers fit the neighborhoods no better than the model's own; only the given labels are learned."
        )
        return Choice("adapted", "labels only", reason, given, given, distance, checks, tried)
    return Choice("unchanged", "none", reason, given, given, distance, checks, tried)


def _other_classes(checks: dict[str, float], distance: Distance) -> str | None:
    """Rule 6: why the adapted answers look like a relabeling of other classes; None where they do not."""
    if checks["match"] < NO_MATCH:
        return (
            "what is answered with one class lies nowhere near that class of the source: these look like other classes."
        )
    if checks["votes"] < LEAST_VOTES and checks["match"] < LEAST_MATCH and distance.energy < FAR:
        return (
            f"the methods agree on only {100 * checks['votes']:.0f} % of the answers, though the two sets look alike as a "
            "whole: these look like other classes."
        )
    return None


def class_match(aligned: Domains, answered: Ints) -> float:
    """Mean cosine of the source's mean of each class and the mean of the target's images that are answered with it."""
    present = np.unique(answered)
    source = class_means(aligned.source, aligned.labels, aligned.n_classes)[present]
    target = class_means(aligned.target, answered, aligned.n_classes)[present]
    lengths = np.linalg.norm(source, axis=1) * np.linalg.norm(target, axis=1)
    return float(((source * target).sum(1) / np.maximum(lengths, 1e-12)).mean())


def class_mix_entropy(probabilities: Shares) -> float:
    """Entropy of the answered classes over its greatest value, with Miller's correction for few images; 0 to 1."""
    n, c = probabilities.shape
    shares = np.bincount(probabilities.argmax(1), minlength=c) / n
    found = float(-(shares * np.log(np.maximum(shares, 1e-12))).sum()) + ((shares > 0).sum() - 1) / (2 * n)
    return min(1.0, float(found / np.log(c)))


def _methods(aligned: Domains, brief: bool = False) -> dict[str, Shares]:
    start = fit_head(aligned)
    found = {"aligned": answers(start, aligned.target)}
    for name, loss in (("confusion", class_confusion), ("information", information_maximization)):
        found[name] = answers(fit_head(aligned, loss, start), aligned.target)
    if not brief:
        found["self-training"] = self_training(aligned, found["aligned"])
        found["prototypes"] = soft_prototypes(aligned, found["aligned"])
    return found


def _one_hot(probabilities: Shares) -> Shares:
    return np.asarray(np.eye(probabilities.shape[1])[probabilities.argmax(1)])


def expected_recall(predicted: Ints, consensus: Shares, label: int) -> float | None:
    """The same by class: share of the votes for a class whose images are answered with it; None without a vote."""
    total = float(consensus[:, label].sum())
    return float((consensus[:, label] * (predicted == label)).sum() / total) if total > 0 else None


def predicted_accuracy(predicted: Ints, consensus: Shares) -> float:
    """Accuracy of answers if the methods' votes were drawn from the truth: mean vote for each image's answer."""
    return float(consensus[np.arange(len(predicted)), predicted].mean())
