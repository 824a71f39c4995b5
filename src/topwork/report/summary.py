"""The run in about five plain sentences, each of which follows from the numbers.

A class is called weak and a pair confused only where chance alone would hardly do it; otherwise the sentence says that
there is no evidence. Not here: how the sentences look.
"""

from __future__ import annotations

import math

import numpy as np

from topwork.data.manifest import FEW_IMAGES
from topwork.evaluation.advice import Advice, times
from topwork.evaluation.analysis import advice_of
from topwork.evaluation.intervals import wilson
from topwork.report.run_data import Record
from topwork.text import count, escape, percent, quoted

SIGNIFICANCE = 0.05  # a weak class or a confused pair is named when chance gives one as extreme less often than this
CONFIDENT = 0.9  # a mistake stated with at least this probability is "confidently wrong"
WORTHWHILE = 0.005  # expected gain in accuracy from which advice becomes the next step
WIDE_INTERVAL = 0.06  # an accuracy known to less than plus or minus three points asks for more test images


def sentences(record: Record) -> list[str]:
    """What was trained, how good it is, where it is weak, what the parts were used for, what to do next."""
    part = record.main_part
    if part is None:
        unmeasured = "There is no test and no valid part, so nothing can be said about how good it is."
        aside = "Next: fit again with --test-fraction 0.2, so that some images are kept aside."
        return [_trained(record), unmeasured, aside]
    return [
        _trained(record),
        _accuracy(record, part),
        " ".join(filter(None, [_weakest_class(record, part), _confused_pair(record, part)])),
        _used_for(record),
        "Next: " + next_step(record, part),
    ]


def _trained(record: Record) -> str:
    recipe, classes = record.recipe, record.manifest.classes
    n_train = int((record.part_of == "train").sum())
    names = f" ({', '.join(quoted(name, 24) for name in classes)})" if len(classes) <= 4 else ""
    adapted = recipe.get("adapted", {})
    is_probe = recipe.get("mode", "probe") == "probe" and not adapted.get("network_moved")
    what = "a linear head on the frozen features of" if is_probe else "a network started from"
    backbone = escape(str(recipe.get("architecture") or recipe.get("backbone", "a backbone")))
    images = f"{count(n_train, 'image')} of {count(len(classes), 'class', 'classes')}"
    then = ""
    if adapted.get("outcome") == "adapted":
        then = f" It was then adapted to another set of images ({adapted['method']}): see Domains."
    return f"This run trained {what} {backbone} with {images}{names}.{then}"


def _accuracy(record: Record, part: str) -> str:
    judged = record.evaluation[part]
    accuracy, n = judged["accuracy"], judged["n"]
    interval = f"{percent(accuracy['low'])} to {percent(accuracy['high'])}"
    right = f"On the {count(n, 'image')} of the {part} part it gives the right answer for {percent(accuracy['value'])}."
    if accuracy["value"] == 1:
        most = percent(1 - accuracy["low"])
        return (
            f"{right} That is no promise: a model that is wrong on up to {most} may well do the same on so many images."
        )
    return (
        f"{right} The 95 % interval is {interval}: were the test repeated with other images of the same kind, "
        "intervals made this way would hold the true accuracy 95 times in 100."
    )


def _weakest_class(record: Record, part: str) -> str:
    found = weakest_class(record, part)
    if found is None:
        return "Every image of this part was answered right, so no class stands out."
    name, n_right, n, chance = found
    figures = f"{quoted(name)} with {n_right:,} of {n:,} right ({percent(n_right / n)})"
    if chance < SIGNIFICANCE:
        return f"The weakest class is {figures}, and chance alone would hardly make it so."
    return f"No class is clearly weaker than the others; the lowest is {figures}, which may be chance."


def weakest_class(record: Record, part: str) -> tuple[str, int, int, float] | None:
    """The class with the least likely number of right answers, if all classes were as good as the others together.

    Returns:
        name, images right, images, and the chance that any of the classes comes out this low; None without a mistake.
    """
    judged = record.evaluation[part]
    classes, cells = judged["classes"], record.confusion(part)
    n, n_right = np.zeros(len(classes), np.int64), np.zeros(len(classes), np.int64)
    for (true, predicted), k in cells.items():
        n[true] += k
        n_right[true] += k if true == predicted else 0
    all_n, all_right = int(n.sum()), int(n_right.sum())
    if all_n == all_right:
        return None
    rows = []
    for label in np.flatnonzero(n).tolist():
        n_others = all_n - int(n[label])
        # Laplace's rule: others without a mistake are not perfect.
        share = (all_right - int(n_right[label]) + 1) / (n_others + 2)
        rows.append((_at_most(int(n_right[label]), int(n[label]), share), int(n_right[label]) / int(n[label]), label))
    chance, _, label = min(rows)
    return classes[label], int(n_right[label]), int(n[label]), min(1.0, chance * len(rows))


def _confused_pair(record: Record, part: str) -> str:
    wrong = {pair: k for pair, k in record.confusion(part).items() if pair[0] != pair[1]}
    classes, n_wrong = record.evaluation[part]["classes"], sum(wrong.values())
    if not wrong:
        return ""
    (true, predicted), k = max(wrong.items(), key=lambda item: (item[1], item[0]))
    if len(classes) == 2:
        back = wrong.get((predicted, true), 0)
        return (
            f"{quoted(classes[true])} is taken for {quoted(classes[predicted])} {_times(k)}, "
            f"the other way round {_times(back) if back else 'never'}."
        )
    n_pairs = len(classes) * (len(classes) - 1)
    if k > 1 and n_pairs * _at_least(k, n_wrong, 1 / n_pairs) < SIGNIFICANCE:
        names = f"{quoted(classes[true])} for {quoted(classes[predicted])}"
        return f"The most frequent mistake is to take {names} ({_times(k)})."
    return f"Its {count(n_wrong, 'mistake')} single out no pair of classes." if n_wrong > 1 else ""


def _used_for(record: Record) -> str:
    use = record.recipe.get("valid_used_for", "")
    chosen = "The head and its penalty were chosen by cross-validation inside the train part"
    if record.recipe.get("mode", "probe") != "probe":
        chosen = "The model was trained on the train part"
    if "test" not in record.predictions:
        return f"{chosen}. There is no test part; the valid part was used for {_lower(use) or 'these figures'}."
    valid = f"; the valid part was used for {_lower(use)}" if "valid" in record.predictions and use else ""
    return f"{chosen}{valid}. The test part was touched once, for the figures in this report."


def next_step(record: Record, part: str) -> str:
    """What would help most: files that could not be used, then the best advice, then simple rules."""
    judged, n_rejected = record.evaluation[part], len(record.manifest.rejects)
    accuracy, predictions = judged["accuracy"], record.predictions[part]
    weak = weakest_class(record, part)
    n_confident = int((~predictions.correct & (predictions.confidence >= CONFIDENT)).sum())
    width = f"{100 * (accuracy['high'] - accuracy['low']):.0f}"
    is_wide = accuracy["high"] - accuracy["low"] > WIDE_INTERVAL
    if n_rejected > 0.1 * (n_rejected + len(record.manifest.samples)):
        return f"see why {count(n_rejected, 'file')} could not be used; the reasons are listed under Data."
    best = next((item for item in advice_of(record.insights) if item.gain and item.gain[0] >= WORTHWHILE), None)
    if best is not None:
        look = _confident_mistakes(n_confident)
        return f"{_lower(best.title)}, {_expected(best)}. {look[:1].upper() + look[1:]}".rstrip()
    if weak and weak[3] < SIGNIFICANCE:
        return f"add varied images of {quoted(weak[0])}, and look at its mistakes below for wrong labels."
    if n_confident:
        more = f" More images to judge by would narrow the interval, now {width} points wide." if is_wide else ""
        return _confident_mistakes(n_confident) + more
    if is_wide:
        return f"collect more images to judge by: with {judged['n']:,} of them the interval is {width} points wide."
    smallest = min(record.manifest.counts.items(), key=lambda item: item[1])
    if smallest[1] < FEW_IMAGES:
        return f"add images of the smallest class, {quoted(smallest[0])} ({smallest[1]} so far)."
    return "try it on images from where it will be used; new cameras, places or seasons are not in these figures."


def _confident_mistakes(n: int) -> str:
    if not n:
        return ""
    seen = "the mistake" if n == 1 else f"the {n:,} mistakes"
    return (
        f"look at {seen} it made with a probability of {percent(CONFIDENT, 0)} or more; sometimes it is the label that is "
        "wrong."
    )


def _expected(advice: Advice) -> str:
    """What a piece of advice should bring, and its price; the advice has a gain."""
    assert advice.gain is not None
    value, low, high = (f"{100 * share:+.1f}".replace("-", "−") for share in advice.gain)
    if advice.basis == "bound":
        return f"which may bring up to {high} points ({times(advice)})"
    basis = "judging by other data sets" if advice.basis == "elsewhere" else "judging by its learning curve"
    return f"which should bring about {value} points ({low} to {high}, {basis}; {times(advice)}): see Advice"


# ---- chance


def majority_share(record: Record, part: str) -> float:
    """Accuracy of always answering the most frequent class of the part."""
    n: dict[int, int] = {}
    for (true, _), k in record.confusion(part).items():
        n[true] = n.get(true, 0) + k
    return max(n.values()) / sum(n.values())


def recall_interval(recall: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of ``n`` images."""
    found = wilson(recall, n)
    return found.low, found.high


def _at_most(k: int, n: int, share: float) -> float:
    return sum(_binomial(i, n, share) for i in range(k + 1)) if k < n else 1.0


def _at_least(k: int, n: int, share: float) -> float:
    return min(1.0, sum(_binomial(i, n, share) for i in range(k, n + 1)))


def _binomial(k: int, n: int, share: float) -> float:
    """Probability of k successes in n trials; share strictly between 0 and 1."""
    ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return math.exp(ways + k * math.log(share) + (n - k) * math.log1p(-share))


def _times(k: int) -> str:
    return "once" if k == 1 else "twice" if k == 2 else f"{k:,} times"


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
