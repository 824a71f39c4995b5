"""Types and ranges of the fields of ``topwork.json``, checked before anything is built from it.

In: the parsed JSON. Out: nothing, or a :class:`ModelError` that names the field. Unknown fields are
ignored; a description that needs a newer version has a higher format number.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topwork.data.transforms import MIRRORS
from topwork.errors import ModelError

MAX_SIDE = 2048  # pixels of the input; more would take gigabytes for one image
MAX_CLASSES = 1_000_000


@dataclass(frozen=True)
class Rule:
    """A requirement on a value, in words and as a check."""

    words: str
    holds: Callable[[Any], bool]


def number(low: float, high: float, *, whole: bool = False, none: bool = False) -> Rule:
    """A finite number in a range; not a boolean or text."""
    kinds = (int,) if whole else (int, float)
    words = f"a {'whole ' if whole else ''}number from {low:g} to {high:g}" + (" or null" if none else "")
    return Rule(words, lambda v: none if v is None else type(v) in kinds and low <= v <= high)


def text(pattern: str = r"[^\0]{0,4096}", words: str = "text", *, none: bool = False) -> Rule:
    """Text that fully matches a pattern."""
    return Rule(
        words, lambda v: none if v is None else isinstance(v, str) and bool(re.fullmatch(pattern, v, re.DOTALL))
    )


def one_of(*values: Any) -> Rule:
    """One of a few values."""
    return Rule(f"one of {', '.join(map(str, values))}", lambda v: isinstance(v, str) and v in values)


def items(rule: Rule, least: int = 0, most: int = MAX_CLASSES, *, unique: bool = False) -> Rule:
    """A list of values of one kind."""
    return Rule(
        f"a list of {least} to {most:,} {'different ' if unique else ''}values, each {rule.words}",
        lambda v: (
            isinstance(v, list)
            and least <= len(v) <= most
            and all(map(rule.holds, v))
            and not (unique and len(set(v)) < len(v))
        ),
    )


def mapping(rule: Rule | None = None) -> Rule:
    """An object, whose values are all of one kind."""
    return Rule("an object", lambda v: isinstance(v, dict) and (rule is None or all(map(rule.holds, v.values()))))


def _is_option(name: str, value: Any) -> bool:
    """Whether an option is allowed when building a network; options that read a file or URL are not."""
    is_plain = value is None or isinstance(value, (bool, int, float)) or (isinstance(value, str) and "/" not in value)
    is_list = isinstance(value, list) and all(isinstance(item, (bool, int, float)) for item in value)
    return "checkpoint" not in name and not name.startswith(("pretrained", "cache")) and (is_plain or is_list)


FLAG = Rule("true or false", lambda v: isinstance(v, bool))
SHARE = number(0, 1, none=True)
SIDE = number(8, MAX_SIDE, whole=True)
DIGEST = text(r"[0-9a-f]{64}", "a SHA-256 digest")
NAMES = items(text(), most=100_000)

FIELDS: dict[str, Rule] = {
    "kind": one_of("plain", "extended"),
    "architecture": text(r"[\w.\-]{1,200}", "the name of an architecture"),  # no hf-hub: and no local-dir:
    "backbone": text(),
    "classes": items(text(), 1, unique=True),
    "precision": one_of("f32", "bf16"),
    "temperature": number(1e-6, 1e6),
    "weights_digest": text(),
    "n_features": number(1, 1_000_000, whole=True),
    "n_parameters": number(0, 1e12, whole=True),
    "stages": items(mapping(), most=10_000),
    "pretrained_cfg": mapping(),
    "licence_of_weights": text(none=True),
    "provenance": mapping(),
    "files": mapping(DIGEST),
    "preprocessing": mapping(),
    "head": mapping(),
    "thresholds": mapping(),
}
OPTIONAL: dict[str, Rule] = {"temperature_folded": FLAG, "multi_label": FLAG, "changes": mapping(), "layout": mapping()}
PREPROCESSING: dict[str, Rule] = {
    "height": SIDE,
    "width": SIDE,
    "fit": one_of("squash", "crop", "pad"),
    "crop_fraction": number(0.01, 1),
    "interpolation": one_of("bilinear", "bicubic"),
    "mean": items(number(-10, 10), 3, 3),
    "std": items(number(1e-3, 10), 3, 3),
    "background": items(number(0, 255, whole=True), 3, 3),
}
PREPROCESSING_OPTIONAL: dict[str, Rule] = {
    "resizer": one_of("quick", "pillow"),
    "mirror": one_of(*MIRRORS),
    "bands": text(r"\d{1,4},\d{1,4},\d{1,4}", "three band numbers"),
}
HEAD: dict[str, Rule] = {
    "blocks": items(one_of("last", "stages"), 1, 2, unique=True),
    "power": one_of("none", "sqrt", "unit"),
}
THRESHOLDS: dict[str, Rule] = {
    "unknown": number(-1e9, 1e9, none=True),
    "unknown_false_alarm_rate": SHARE,
    "confidence": SHARE,
    "set_probability": SHARE,
    "set_coverage": SHARE,
    "target_precision": SHARE,
    "labels": items(number(0, 1)),
    "positive": Rule("an object or null", lambda v: v is None or isinstance(v, dict)),
    "none_is_an_answer": FLAG,
}
LAYOUT: dict[str, Rule] = {
    "head": text(),
    "layers": NAMES,
    "is_convolution": FLAG,
    "takes_size": FLAG,
    "options": Rule(
        "plain options of a network",
        lambda v: isinstance(v, dict) and len(v) < 100 and all(map(_is_option, v, v.values())),
    ),
}
STAGE: dict[str, Rule] = {
    "name": text(),
    "module": text(none=True),
    "parameters": NAMES,
    "n_parameters": number(0, 1e12, whole=True),
}


def check_description(facts: dict[str, Any], path: Path, newest_format: int) -> None:
    """Checks every field.

    Args:
        path: of the file, for the error.
        newest_format: newest format that this version can read.

    Raises:
        ModelError: the first field that is missing or out of range, by name.
    """
    form = facts.get("format")
    if type(form) is int and form > newest_format:
        raise ModelError(
            f"{path.parent}: written by a newer version of topwork (format {form}); upgrade topwork to read it."
        )
    _check("", facts, {"format": number(1, newest_format, whole=True), **FIELDS}, OPTIONAL, path)
    _check("preprocessing.", facts["preprocessing"], PREPROCESSING, PREPROCESSING_OPTIONAL, path)
    _check("head.", facts["head"], HEAD, {}, path)
    _check("thresholds.", facts["thresholds"], {}, THRESHOLDS, path)
    if facts["thresholds"].get("positive") is not None:
        positive = {"class": one_of(*facts["classes"][:2]), "threshold": number(0, 1)}
        _check("thresholds.positive.", facts["thresholds"]["positive"], positive, {}, path)
        _check("", facts, {"classes": items(text(), 2, 2)}, {}, path)
    if "layout" in facts:
        _check("layout.", facts["layout"], LAYOUT, {}, path)
    for row, stage in enumerate(facts["stages"]):
        _check(f"stages[{row}].", stage, STAGE, {}, path)


def _check(prefix: str, values: dict[str, Any], needed: dict[str, Rule], optional: dict[str, Rule], path: Path) -> None:
    for name, rule in (needed | optional).items():
        if name not in values:
            if name in needed:
                raise ModelError(f"{path}: {prefix}{name} is missing; the model description is incomplete.")
        elif not rule.holds(values[name]):
            raise ModelError(f"{path}: {prefix}{name} is {values[name]!r:.60}, not {rule.words}.")
