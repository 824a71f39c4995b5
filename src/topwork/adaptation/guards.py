"""Selects adapted predictions without target labels; if unsure, the model stays unchanged.

In: two domains and the source model's probabilities on the target. Out: a :class:`Choice`: adapted, unchanged or
refused, with the reason and the numbers behind it. The rules, in order:

1. Too few images: unchanged. Ten images do not determine class means.
2. No clear shift (permutation test of the energy distance): unchanged.
3. Classes that the source does not have: refused. After centering each domain separately, the target's images should
still be near one class of the source and far from the others.
4. Similar images should get the same class (soft neighborhood density, Saito et al. 2021, arXiv 2108.10860, on hard
   predictions): adapted predictions must agree with their neighbors clearly more often than those of the source model,
   and far more often if the source model predicts few of its classes, since centering assumes a similar class mix. The
   hypotheses are: both domains have a similar class mix; the same, with restyled copies of the source's images; the
   target's class mix is as the source model predicts. The hypothesis with the highest neighbor agreement comes first.
5. Classes that the source does not have, checked again on the adapted predictions: refused if the target's classes are
far from the source's; or if they are hardly near, the methods disagree on many images, and the two sets still look
alike overall. (If they look very different, disagreement is expected, and the predictions are kept.)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from topwork.adaptation.align import (
    AlignedHead,
    Domains,
    Ints,
    Rows,
    Shares,
    averaged,
    clamped,
    class_confusion,
    class_means,
    class_mix_matched,
    entropy,
    information_maximization,
    nearest,
    neighbor_agreement,
    self_training,
    soft_prototypes,
    standardized,
)
from topwork.evaluation.domains import Distance, energy_distance
from topwork.evaluation.similarity import k_means, unit_rows
from topwork.paired import paired
from topwork.text import percent

MIN_IMAGES = 20
MIN_PER_CLASS = 3.0
SIGNIFICANCE = 0.01
# In a shifted domain, the nearest class keeps at least a tenth of its lead over the second (0.11 to 1.04 in
# docs/lab-log.md); for images of other classes it is 0.08 to 0.41. So a small lead gets a warning, and only a tiny one
# is refused.
LEAST_LEAD, DOUBTFUL_LEAD = 0.10, 0.25
LEAST_GAIN, GAIN_ERRORS = 0.03, 2.0  # in neighbor agreement, and in its standard errors
LEAST_OF_ROOM = 0.25  # share of the possible gain, if the model is already good
CROWDED, CLEAR_GAIN = 0.7, 0.10  # below this share of the maximum class-mix entropy, this gain is required
# Rule 5: mean vote, cosine of class means, energy distance. Shifts had votes of 0.85 or more and cosines above 0.32, or a
# distance above 0.12 and cosines above 0.21 (heavy blur); other classes votes below 0.82, cosines below 0.31 and distances
# below 0.12, or cosines below 0.16 (docs/lab-log.md, 2026-11-26).
LEAST_VOTES, LEAST_MATCH, FAR, NO_MATCH = 0.82, 0.33, 0.12, 0.18
SAME_MIX, OTHER_MIX = "same class mix", "other class mix"
HANDICAP = 0.02  # for the estimated class mix, which inherits the source model's errors
Outcome = Literal["unchanged", "adapted", "refused"]


@dataclass(frozen=True, eq=False)
class Choice:
    """The decision.

    Attributes:
        probabilities: (M, C); those of the source model unless adapted.
        votes: (M, C) share of the methods that predict each class; the source model's probabilities if no method was
            tried.
        checks: the numbers behind the decision.
        tried: for each method: name, neighbor agreement, agreement with the source model, and mean confidence.
    """

    outcome: Outcome
    method: str
    reason: str
    probabilities: Shares
    votes: Shares
    distance: Distance
    checks: dict[str, float] = field(default_factory=dict)
    tried: tuple[dict[str, Any], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, without the predictions."""
        return {
            "outcome": self.outcome,
            "method": self.method,
            "reason": self.reason,
            "distance": asdict(self.distance),
            "checks": {key: round(value, 4) for key, value in self.checks.items()},
            "tried": list(self.tried),
        }


def choose(domains: Domains, given: Shares, *, seed: int = 0, restyled: tuple[str, Rows] | None = None) -> Choice:
    """Adapts, or leaves the model unchanged.

    Args:
        domains: features for the head of the source model.
        given: (M, C) probabilities of the source model on the target.
        restyled: name of a style, and (N, D) features of the restyled source images.
    """
    given = clamped(given, domains.known)
    n, n_known = len(domains.target), int((domains.known >= 0).sum())
    distance = energy_distance(domains.source, domains.target, seed=seed)

    def kept(reason: str, outcome: Outcome = "unchanged", checks: dict[str, float] | None = None) -> Choice:
        if outcome != "refused" and n_known:
            return Choice("adapted", "labels only", reason, given, given, distance, checks or {})
        return Choice(outcome, "none", reason, given, given, distance, checks or {})

    least = max(MIN_IMAGES, int(MIN_PER_CLASS * domains.n_classes))
    if n < least and not n_known:
        return kept(f"Too few images to adapt without labels: {n}, and at least {least} are needed.")
    if distance.p_value >= SIGNIFICANCE:
        return kept("The two domains do not differ significantly.")
    if n < least:
        return kept(f"Too few images to use anything but their labels: {n}.")
    alignments = {SAME_MIX: standardized(domains)}
    if restyled is not None:
        alignments[f"source as {restyled[0]}"] = standardized(domains, restyled[1])
    checks = {
        "lead": max(lead_kept(aligned) for aligned in alignments.values()),
        "images": float(n),
        "known_labels": float(n_known),
    }
    if checks["lead"] < LEAST_LEAD and not n_known:
        reason = "The images are no closer to one of the model's classes than to the others: they show other classes, or are too different to tell."
        return kept(reason, "refused", checks)
    return _adapted(domains, alignments, given, distance, checks)


@dataclass(frozen=True, eq=False)
class _Hypothesis:
    """Probabilities on the target under one assumption, by method, and their summary."""

    name: str
    methods: dict[str, Shares]
    adapted: Shares


def _adapted(
    domains: Domains, alignments: dict[str, Domains], given: Shares, distance: Distance, checks: dict[str, float]
) -> Choice:
    """Rules 4 and 5."""
    aligned = alignments[SAME_MIX]
    has_labels = bool((domains.known >= 0).any())
    neighbors = nearest(aligned.target)
    hypotheses = [*map(_of_alignment, alignments.items()), _of_other_mix(domains, given)]
    tried = {"source model": given, **hypotheses[0].methods, **{found.name: found.adapted for found in hypotheses}}
    records = tuple(_tried(name, p, given, neighbors) for name, p in tried.items())
    checks["class_mix_entropy"] = class_mix_entropy(given)
    is_crowded = checks["class_mix_entropy"] < CROWDED
    before = neighbor_agreement(given.argmax(1), neighbors)

    def support(found: _Hypothesis) -> float:
        handicap = HANDICAP if found.name == OTHER_MIX and not is_crowded else 0.0
        return float(neighbor_agreement(found.methods["confusion"].argmax(1), neighbors).mean()) - handicap

    for found in sorted(hypotheses, key=support, reverse=True):
        after = neighbor_agreement(found.adapted.argmax(1), neighbors)
        least = CLEAR_GAIN if is_crowded and found.name != OTHER_MIX else 0.0
        gain = paired(after, before)
        needed = max(least, min(LEAST_GAIN, LEAST_OF_ROOM * (1 - float(before.mean()))), GAIN_ERRORS * gain.error)
        checks |= {f"gain ({found.name})": gain.mean, f"gain needed ({found.name})": needed}
        if gain.mean < needed:
            continue
        votes = clamped(averaged([_one_hot(p) for p in (given, *found.methods.values())]), domains.known)
        checks |= {"votes": float(votes.max(1).mean()), "match": class_match(aligned, found.adapted.argmax(1))}
        doubt = None if has_labels else _other_classes(checks, distance)
        if doubt is not None:
            return Choice("refused", "none", doubt, given, given, distance, checks, records)
        shares = [percent(float(agreement.mean()), 0) for agreement in (after, before)]
        reason = f"Similar images get the same class more often: {shares[0]} instead of {shares[1]}."
        return Choice("adapted", found.name, reason, found.adapted, votes, distance, checks, records)
    reason = "Adapted predictions agree with similar images no better than the model's own"
    if has_labels:
        words = f"{reason}; only the given labels are used."
        return Choice("adapted", "labels only", words, given, given, distance, checks, records)
    words = f"{reason}, so the model stays unchanged."
    return Choice("unchanged", "none", words, given, given, distance, checks, records)


def _of_alignment(item: tuple[str, Domains]) -> _Hypothesis:
    name, aligned = item
    head = AlignedHead(aligned)
    methods = {
        "aligned": head.probabilities(),
        "confusion": head.fit(class_confusion),
        "information": head.fit(information_maximization),
        "self-training": self_training(head),
        "prototypes": soft_prototypes(aligned, head.probabilities()),
    }
    mean = averaged([p for method, p in methods.items() if method != "aligned"])
    return _Hypothesis(name, methods, clamped(mean, aligned.known))


def _of_other_mix(domains: Domains, given: Shares) -> _Hypothesis:
    head = AlignedHead(class_mix_matched(domains, given))
    head = AlignedHead(class_mix_matched(domains, clamped(head.probabilities(), domains.known)))
    methods = {"confusion": head.fit(class_confusion), "information": head.fit(information_maximization)}
    mean = averaged([given, *methods.values()])
    return _Hypothesis(OTHER_MIX, methods | {"aligned": head.probabilities()}, clamped(mean, domains.known))


def _tried(name: str, probabilities: Shares, given: Shares, neighbors: Ints) -> dict[str, Any]:
    predicted = probabilities.argmax(1)
    return {
        "method": name,
        "neighbor_agreement": float(neighbor_agreement(predicted, neighbors).mean()),
        "agreement_with_source": float((predicted == given.argmax(1)).mean()),
        "mean_confidence": float(probabilities.max(1).mean()),
    }


def _other_classes(checks: dict[str, float], distance: Distance) -> str | None:
    """Rule 5: why these seem to be other classes; None if they do not."""
    if checks["match"] < NO_MATCH:
        return "Images predicted as one class are far from that class in the source: they look like other classes."
    if checks["votes"] < LEAST_VOTES and checks["match"] < LEAST_MATCH and distance.energy < FAR:
        return (
            f"The methods agree on only {percent(checks['votes'], 0)} of the predictions although the two sets look alike as "
            "a whole: these look like other classes."
        )
    return None


def lead_kept(aligned: Domains) -> float:
    """Lead of the nearest class on the target: mean of (first - second) cosine, target over source.

    The source's lead is measured on images not used for the class means.
    """
    even = np.arange(len(aligned.source)) % 2 == 0
    source = np.concatenate(
        [_lead(aligned.source[~half], _means(aligned, half)) for half in (even, ~even)]
    )  # each half against the means of the other
    target = _lead(aligned.target, _means(aligned, np.ones_like(even)))
    return float(target.mean() / max(float(source.mean()), 1e-6))


def _means(aligned: Domains, rows: np.ndarray[Any, Any]) -> Shares:
    return class_means(aligned.source[rows], aligned.labels[rows], aligned.n_classes)


def _lead(rows: Rows, means: Shares) -> Shares:
    directions = means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-6)
    cosines = np.sort(rows @ directions.T / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6), axis=1)
    return np.asarray(cosines[:, -1] - cosines[:, -2])


def class_match(aligned: Domains, predicted: Ints) -> float:
    """Mean cosine between a class mean of the source and the mean of the target's images predicted as this class."""
    present = np.unique(predicted)
    source = class_means(aligned.source, aligned.labels, aligned.n_classes)[present]
    target = class_means(aligned.target, predicted, aligned.n_classes)[present]
    lengths = np.linalg.norm(source, axis=1) * np.linalg.norm(target, axis=1)
    return float(((source * target).sum(1) / np.maximum(lengths, 1e-12)).mean())


def class_mix_entropy(probabilities: Shares) -> float:
    """Entropy of the predicted classes relative to its maximum, with Miller's correction for few images; 0 to 1."""
    n, c = probabilities.shape
    shares = np.bincount(probabilities.argmax(1), minlength=c) / n
    found = float(-(shares * np.log(np.maximum(shares, 1e-12))).sum()) + ((shares > 0).sum() - 1) / (2 * n)
    return min(1.0, float(found / np.log(c)))


def _one_hot(probabilities: Shares) -> Shares:
    return np.asarray(np.eye(probabilities.shape[1])[probabilities.argmax(1)])


# ---- which images to label


def images_to_label(domains: Domains, choice: Choice, n: int, seed: int = 0) -> Ints:
    """(n,) rows of unlabeled target images worth labeling, largest disagreement first; fewer if there are not enough.

    With few labels, typical images help most (Hacohen et al. 2022, TypiClust, arXiv 2202.02794). The target is clustered
    into n clusters. Of the half of a cluster nearest to its center, the image on which the methods disagree most is chosen.
    """
    free = np.flatnonzero(domains.known < 0)
    n = min(n, len(free))
    if not n:
        return np.empty(0, np.int64)
    disputed = entropy(choice.votes)
    z = unit_rows(standardized(domains).target[free])
    cosine = z @ k_means(z, n, np.random.default_rng([seed, 13]), n_steps=10).T
    cluster, closeness = cosine.argmax(1), cosine.max(1)
    chosen = []
    for number in range(n):
        members = np.flatnonzero(cluster == number)
        if len(members):
            central = members[np.argsort(-closeness[members], kind="stable")[: (len(members) + 1) // 2]]
            chosen.append(int(free[central[np.argmax(disputed[free[central]])]]))
    rest = np.setdiff1d(free, chosen)
    rest = rest[np.argsort(-disputed[rest], kind="stable")][: n - len(chosen)]
    rows = np.array([*chosen, *rest], np.int64)
    return rows[np.argsort(-disputed[rows], kind="stable")]
