"""Result: the headline metric and what it means in a few sentences. Next steps: what would help most, and its cost.

Weak classes and confused pairs are mentioned only if they are statistically significant.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from topwork.blocks import Bar, Block, Command, Figure, Figures, Fold, Heading, Share, Special, Text, as_share
from topwork.evaluation.advice import Advice, times
from topwork.evaluation.analysis import advice_of
from topwork.evaluation.compare import SIGNIFICANCE
from topwork.evaluation.intervals import binomial_cdf
from topwork.evaluation.metrics import metrics_of, zero_shot_sentence
from topwork.report.pictures import Album
from topwork.report.run_data import Record
from topwork.text import count, decimal, escape, percent, points, quoted

CONFIDENT = 0.9  # an error with at least this probability is confident
WORTHWHILE = 0.005  # expected gain in accuracy from which advice becomes the next step
MORE = ("Cross-entropy", "Average precision", "Hamming loss")  # metrics behind the fold
OUTCOMES = {
    "adapted": "The model was adapted",
    "unchanged": "The model is unchanged",
    "refused": "The model was not adapted",
}
N_OPEN = 3  # next steps that are open at first
BASIS = {
    "curve": "from this data's learning curve",
    "elsewhere": "measured on other datasets",
    "bound": "an upper bound",
}


def summary(record: Record, _album: Album) -> list[Block]:
    """Headline, sentences, further metrics."""
    headline, said = headline_of(record), sentences(record)
    if headline is None:
        return [Text(text, "lead" if number == 0 else "") for number, text in enumerate(said)]
    values = {"headline": headline, "sentences": said}
    blocks: list[Block] = [Special("hero", values, [*map(Text, said), Figures((headline,))])]
    # For an adapted run, those of the target, if it has labels.
    part = "target" if record.domains is not None else record.main_part
    figures = figures_of(record.evaluation[part])[1:] if part and record.evaluation.get(part) else []
    if figures:
        blocks.append(Figures(tuple(figure for figure in figures if figure.label not in MORE)))
    more = tuple(figure for figure in figures if figure.label in MORE)
    if more:
        blocks.append(Fold("More metrics", [Figures(more)]))
    return blocks


def headline_of(record: Record) -> Figure | None:
    """For an adapted run, the target's accuracy; else that of the main part, without leaked images."""
    domains, part = record.domains, record.main_part
    if domains is not None:
        measured = record.evaluation.get("domains", {}).get("target")
        if measured:
            hint = f"Before adaptation: {percent(measured['before']['accuracy']['value'])}"
            basis = f"measured on {count(measured['after']['n'], 'labeled target image')}"
            return _headline("Accuracy on the target", as_share(measured["after"]["accuracy"]), basis, hint)
        hint = f"Expected before adaptation: {percent(domains['predicted']['before']['value'], 0)}"
        share, basis = as_share(domains["predicted"]["after"]), "estimated without target labels"
        return _headline("Expected accuracy on the target", share, basis, hint, interval="range")
    if part is None:
        return None
    label, noun = ("Exact match", "set of labels") if record.manifest.multi_label else ("Accuracy", "class")
    whole, clean = record.evaluation[part], record.evaluation.get(f"{part}_without_leaks")
    if clean is not None:
        hint, basis = (
            f"With the leaked images: {percent(whole['accuracy']['value'])}",
            f"on {count(clean['n'], 'image')}",
        )
        return _headline(f"{label} on {part} without leaked images", as_share(clean["accuracy"]), basis, hint)
    base, basis = baseline(record, part), f"on {count(whole['n'], 'image')}"
    hint = "" if base is None else f"Always predicting the most frequent {noun}: {percent(base)}"
    return _headline(f"{label} on {part}", as_share(whole["accuracy"]), basis, hint, base=base)


def _headline(
    label: str, share: Share, basis: str, hint: str, interval: str = "95% CI", base: float | None = None
) -> Figure:
    return Figure(label, percent(share.value), share.interval(interval + " {}"), hint, Bar(share, base), basis)


def figures_of(evaluation: dict[str, Any]) -> list[Figure]:
    """The metrics of a part with intervals; accuracy first."""
    rows = []
    for metric in metrics_of(evaluation):
        found = metric.figure(evaluation)
        value, low, high = found["value"], found["low"], found["high"]
        ends = "" if low is None else f"95% CI {metric.text(low).rstrip('%')}–{metric.text(high).rstrip('%')}"
        bar = None if metric.unit == "nats" else Bar(Share(value, low, high))
        rows.append(Figure(metric.title, metric.text(value), ends, _hint(metric.key, metric.hint, evaluation), bar))
    return rows


def _hint(key: str, hint: str, evaluation: dict[str, Any]) -> str:
    if key != "average_precision":
        return hint
    name = (evaluation.get("positive") or {}).get("class") or evaluation["classes"][1]
    chance = decimal(evaluation["per_class"][name]["n"] / evaluation["n"], 2)
    return f"{hint} of {quoted(name, 24)}; chance: {chance}"


# ---- sentences


def sentences(record: Record) -> list[str]:
    """Sentences on what was trained, its weaknesses, the use of the parts, and the next step."""
    if record.domains is not None:
        return [_adapted(record, record.domains), _trained(record)]
    part = record.main_part
    if part is None:
        missing = "There is no test or validation part, so the accuracy is unknown."
        return [_trained(record), missing, "Run fit again with --test-fraction 0.2 to hold out some images."]
    said = [_trained(record), _leaked(record, part), _perfect(record, part), zero_shot_sentence(record.evaluation)]
    if record.manifest.multi_label:
        said.append(_weakest_label(record, part))
    else:
        said.append(" ".join(filter(None, [_weakest_class(record, part), _confused_pair(record, part)])))
        said.append(_abstentions(record, part))
    said.append(_used_for(record))
    following = next_step(record)
    return [text for text in [*said, f"Next: {following}" if following else ""] if text]


def _adapted(record: Record, found: dict[str, Any]) -> str:
    choice = found["choice"]
    method = f" ({escape(choice['method'])})" if choice["outcome"] == "adapted" else ""
    source = ""
    measured = record.evaluation.get("domains", {}).get("source") or {}
    if measured.get("after"):
        before, after = (percent(measured[key]["accuracy"]["value"]) for key in ("before", "after"))
        source = f" Source accuracy: {before} before, {after} after."
    return f"{OUTCOMES[choice['outcome']]}{method}: {escape(choice['reason'])}{source}"


def _trained(record: Record) -> str:
    if record.is_evaluation:
        model = quoted(str(record.settings.get("model", "a model")))
        return f"The model {model} on {count(len(record.manifest.samples), 'image')} of {escape(record.name)}."
    recipe, classes = record.recipe, record.manifest.classes
    n_train = int((record.part_of == "train").sum())
    names = f" ({', '.join(quoted(name, 24) for name in classes)})" if len(classes) <= 4 else ""
    is_probe = recipe.get("mode", "probe") == "probe" and not recipe.get("adapted", {}).get("network_moved")
    backbone, architecture = record.backbone or "a backbone", str(recipe.get("architecture") or "")
    backbone = escape(backbone if architecture in backbone else f"{backbone} ({architecture})")
    what = f"A linear classifier on frozen features of {backbone}" if is_probe else f"A fine-tuned {backbone}"
    kind = count(len(classes), "label") if record.manifest.multi_label else count(len(classes), "class", "classes")
    return f"{what}, trained on {count(n_train, 'image')} of {kind}{names}."


def _leaked(record: Record, part: str) -> str:
    leaks = record.evaluation.get("leaks", {}).get(part)
    if not leaks:
        return ""
    text = f"{count(leaks['n_leaked'], 'image')} of {part} {'is' if leaks['n_leaked'] == 1 else 'are'} also in train"
    if f"{part}_without_leaks" not in record.evaluation:
        return f"{text} and no other images are left, so this accuracy says little about new images."
    return f"{text}; trust the accuracy without {'it' if leaks['n_leaked'] == 1 else 'them'}."


def _perfect(record: Record, part: str) -> str:
    accuracy = record.evaluation[part]["accuracy"]
    if accuracy["value"] != 1 or accuracy["low"] is None:
        return ""
    n = count(record.evaluation[part]["n"], f"{part} image")
    return f"With {n}, an error rate of up to {percent(1 - accuracy['low'])} cannot be ruled out."


def _weakest_label(record: Record, part: str) -> str:
    scored = [
        (s["f1"], name, s["n"]) for name, s in record.evaluation[part]["per_class"].items() if s["f1"] is not None
    ]
    if len(scored) < 2:
        return ""
    f1, name, n = min(scored)
    few = " This is too few images for a reliable estimate." if n < 20 else ""
    return f"Lowest F1: {quoted(name)} with {percent(f1)}, on {count(n, 'image')}.{few}"  # fmt: skip


def _weakest_class(record: Record, part: str) -> str:
    found = weakest_class(record, part)
    if found is None:
        return "No errors."
    name, n_right, n, chance = found
    if chance < SIGNIFICANCE:
        return f"Weakest class: {quoted(name)} with {percent(n_right / n)} ({n_right:,} of {n:,})."
    return "No class is clearly weaker than the others."


def weakest_class(record: Record, part: str) -> tuple[str, int, int, float] | None:
    """The class whose number of correct predictions is least likely if all classes had the same accuracy.

    Returns:
        name, number correct, number of images, and the probability that any class is this low; None without errors.
    """
    own, cells = record.predictions[part], record.confusion(part)
    n_true = np.bincount(own.labels, minlength=own.n_classes).tolist()
    counts = [(n, cells[label, label]) for label, n in enumerate(n_true)]
    all_n, all_right = map(sum, zip(*counts, strict=True))
    if all_n == all_right:
        return None
    rows = []
    for label, (n, n_right) in enumerate(counts):
        if n:
            # Laplace's rule: classes without errors are not perfect.
            share = (all_right - n_right + 1) / (all_n - n + 2)
            rows.append((binomial_cdf(n_right, n, share), n_right / n, label))
    chance, _, label = min(rows)
    n, n_right = counts[label]
    return own.classes[label], n_right, n, min(1.0, chance * len(rows))


def _confused_pair(record: Record, part: str) -> str:
    wrong = {pair: k for pair, k in record.confusion(part).items() if pair[0] != pair[1]}
    classes, n_wrong = record.evaluation[part]["classes"], sum(wrong.values())
    if not wrong:
        return ""
    (true, predicted), k = max(wrong.items(), key=lambda item: (item[1], item[0]))
    first = f"{count(k, 'image')} of {quoted(classes[true])} {'was' if k == 1 else 'were'} predicted as {quoted(classes[predicted])}"
    if len(classes) == 2:
        back = wrong.get((predicted, true), 0)
        return f"{first}, {back or 'none'} the other way round."
    n_pairs = len(classes) * (len(classes) - 1)
    if k > 1 and n_pairs * (1 - binomial_cdf(k - 1, n_wrong, 1 / n_pairs)) < SIGNIFICANCE:
        return f"Most frequent error: {first}."
    return ""


def _abstentions(record: Record, part: str) -> str:
    found = (record.insights.get("decisions") or {}).get("parts", {}).get(part)
    if not found or not found["n"]:
        return ""
    ambiguous, unknown = (found[f"n_{kind}"] / found["n"] for kind in ("ambiguous", "unknown"))
    if not ambiguous + unknown:
        return ""
    text = f"With abstention, {percent(ambiguous)} of the answers are “ambiguous” and {percent(unknown)} “unknown”"
    right = found["accuracy_of_labels"]
    return f"{text}; {percent(right['value'])} of the rest are correct." if right else f"{text}."


def _used_for(record: Record) -> str:
    if record.is_evaluation:
        return ""
    chosen = "Hyperparameters were chosen by cross-validation on train"
    if record.recipe.get("mode", "probe") != "probe":
        chosen = "The model was trained on train"
    if "test" in record.predictions:
        return f"{chosen}; test was used once, for this report."
    if "valid" not in record.predictions:
        return f"{chosen}. There is no test part."
    use = str(record.recipe.get("valid_used_for", ""))
    return (
        f"{chosen}. There is no test part; valid was used for {escape(use[:1].lower() + use[1:]) or 'these figures'}."
    )


def next_step(record: Record) -> str:
    """The best advice of the run, if the gain is worthwhile; else advice for more reliable results."""
    found = advice_of(record.insights)
    best = [item for item in found if item.gain and item.gain[0] >= WORTHWHILE] + [i for i in found if not i.gain]
    if not best:
        return ""
    title = escape(best[0].title[:1].lower() + best[0].title[1:])
    return f"{title}; {expected_gain(best[0])}." if best[0].gain else f"{title}."


def expected_gain(advice: Advice) -> str:
    """``+3.0 points expected (+1.0 to +5.0)`` of advice that has a gain."""
    assert advice.gain is not None
    value, low, high = map(points, advice.gain)
    return f"up to {high} points" if advice.basis == "bound" else f"{value} points expected ({low} to {high})"


# ---- chance


def baseline(record: Record, part: str) -> float | None:
    """Accuracy of always predicting the most frequent class, or set of labels, of the part."""
    truth = record.predictions[part].labels
    if not len(truth):
        return None
    _, n = np.unique(truth, axis=0, return_counts=True)
    return float(n.max() / len(truth))


# ---- next steps


def next_steps(record: Record, _album: Album) -> list[Block]:
    """The largest expected gain first."""
    found = [_blocks(number, item) for number, item in enumerate(advice_of(record.insights), start=1)]
    blocks = [block for one in found[:N_OPEN] for block in one]
    rest = [block for one in found[N_OPEN:] for block in one]
    return [*blocks, Fold(f"{len(found) - N_OPEN} more", rest)] if rest else blocks


def _blocks(number: int, item: Advice) -> list[Block]:
    gain = f"{expected_gain(item)}, {BASIS.get(item.basis or '', '')}" if item.gain else "more reliable numbers"
    blocks: list[Block] = [
        Heading(f"{number}. {escape(item.title)}"),
        Text(escape(item.text)),
        Text(f"Gain: {gain}. Takes {times(item)}.", "small"),
    ]
    return [*blocks, *([Command(escape(item.command), f"Command: {escape(item.title)}")] if item.command else [])]
