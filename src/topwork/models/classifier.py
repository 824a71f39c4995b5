"""The model folder: writing a classifier, and verifying and reading it.

A :class:`Classifier` is a backbone, a head, class names and the temperature that is already part of the head. Its
folder holds ``model.safetensors``, ``topwork.json`` (preprocessing, classes, thresholds, provenance, and the digest of
every other file), ``openvino.xml``/``.bin`` (the compiled network, so that predicting needs no torch), and for a plain
head timm's ``config.json``: such a folder is a timm model. Nothing in it is ever unpickled or run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from topwork.data.remote import local_folder
from topwork.data.samples import one_label_only
from topwork.data.transforms import MIRRORS, InputSpec
from topwork.errors import ModelError, UsageError
from topwork.files import atomic_folder, file_digest
from topwork.models.backbone import Backbone, Layout
from topwork.models.head import POOLINGS, Changes, FeatureTransform, LinearHead, last_features_head, parse_head
from topwork.text import Described, escape, first_names

FORMAT = 2  # 2: a network that differs from timm's or has a layout of its own, or several labels per image; else 1
FACTS = "topwork.json"
WEIGHTS = "model.safetensors"
TIMM_CONFIG = "config.json"
COMPILED = ("openvino.xml", "openvino.bin")
CARD = "README.md"
DECISION = "decision.safetensors"  # arrays of the decision rule; a separate file, because timm refuses unknown tensors
KNOWN_FILES = (WEIGHTS, DECISION, TIMM_CONFIG, *COMPILED, CARD)
HEAD_PREFIX = "topwork_head."  # tensors of an extended head, which is not part of the timm network
MAX_JSON_BYTES = 64 << 20


@dataclass(frozen=True, repr=False)
class Classifier(Described):
    """A classifier: everything that its predictions depend on.

    Attributes:
        backbone: network and preprocessing; its folder holds the weights.
        head: logits at temperature 1; the fitted temperature is folded in.
        classes: class names; the position is the label.
        temperature: what the head was divided by (for the record).
        precision: ``bf16`` or ``f32``: how the features that the head was fitted on were computed, for the record;
            answers are always computed in f32.
        thresholds: numbers of the decision rule (see ``evaluation/calibration.py``).
        arrays: further arrays the decision rule needs, stored next to the weights.
        provenance: where the model comes from: data digest, settings, versions, figures.
        multi_label: an image may have any number of labels: probabilities are sigmoids of the logits, and
            ``thresholds["labels"]`` says from which one on each label is given.
    """

    backbone: Backbone
    head: LinearHead
    classes: tuple[str, ...]
    temperature: float
    precision: str
    thresholds: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    multi_label: bool = False

    def facts(self) -> dict[str, object]:
        """Shown in notebooks."""
        spec = self.backbone.spec
        return {
            "Backbone": self.backbone.name,
            "Input": f"{spec.width} x {spec.height} pixels",
            "Head": f"{self.head.kind}, {self.head.weight.shape[1]:,} features",
            "Classes": first_names(self.classes, 6),
            "Temperature": f"{self.temperature:.2f}",
        }

    @property
    def is_timm(self) -> bool:
        """Whether timm's network can hold all of it, so that the folder is also a timm model."""
        is_most_probable = "positive" not in self.thresholds
        return (
            self.head.kind == "plain"
            and self.backbone.is_timm
            and self.backbone.spec.mirror == "none"
            and not self.backbone.spec.bands
            and is_most_probable
        )


def save_classifier(classifier: Classifier, folder: Path, compiled: Path | None, card: str) -> None:
    """Writes the model folder atomically; an existing one is replaced only once the new one is complete.

    Args:
        compiled: the ``.xml`` of the OpenVINO form, with its ``.bin`` next to it; None leaves it out.
        card: text of the model card.
    """
    from safetensors.numpy import save_file

    with atomic_folder(folder) as partial:
        _write_weights(classifier, partial / WEIGHTS)
        if classifier.arrays:
            save_file(
                {key: np.ascontiguousarray(value) for key, value in classifier.arrays.items()}, partial / DECISION
            )
        if compiled is not None:
            for name in COMPILED:
                shutil.copyfile(compiled.with_suffix(Path(name).suffix), partial / name)
        if classifier.is_timm:
            (partial / TIMM_CONFIG).write_text(json.dumps(timm_config(classifier), indent=2))
        (partial / CARD).write_text(card, encoding="utf-8", errors="surrogateescape")
        facts = _facts(classifier)
        facts["files"] = {name: file_digest(partial / name) for name in KNOWN_FILES if (partial / name).exists()}
        facts["digest"] = facts_digest(facts)
        (partial / FACTS).write_text(json.dumps(facts, indent=1))


def load_classifier(path: str | os.PathLike[str], *, multi_label: bool = False) -> Classifier:
    """Reads a model folder (or a run that contains one) and verifies every byte.

    Args:
        multi_label: whether the caller supports multi-label models.

    Raises:
        UsageError: there is no model at that path, or it is multi-label and the caller does not support that.
        ModelError: damaged, altered, or written by a newer topwork.
    """
    folder = find_model(path)
    facts = _read_json(folder / FACTS)
    try:
        check_description(facts, folder / FACTS)
        if facts["digest"] != facts_digest(facts):
            raise ModelError(f"{folder / FACTS}: damaged or modified (its digest does not match).")
        _check_files(folder, facts["files"])
        classifier = _from_facts(folder, facts)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ModelError(
            f"{folder / FACTS}: not a topwork model description ({type(error).__name__}: {error})."
        ) from None
    _check_head(classifier, folder)
    _check_config(classifier, folder, facts["files"])
    if classifier.multi_label and not multi_label:
        raise one_label_only(escape(str(folder)))
    return classifier


def is_compiled(backbone: Backbone) -> bool:
    """Whether the model folder has the compiled network for this preprocessing, which may be changed in memory."""
    if not (backbone.folder / COMPILED[0]).is_file():
        return False
    saved = InputSpec.from_dict(_read_json(backbone.folder / FACTS)["preprocessing"])
    return all(
        getattr(saved, name) == getattr(backbone.spec, name) for name in ("height", "width", "mean", "std", "mirror")
    )


def facts_digest(facts: dict[str, Any]) -> str:
    """SHA-256 over everything in the description but this digest itself."""
    rest = {key: value for key, value in facts.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def find_model(path: str | os.PathLike[str]) -> Path:
    """The model folder for a path that is one, or that is a run."""
    place = local_folder(path)
    for folder in (place, place / "model"):
        if (folder / FACTS).is_file():
            return folder
    raise UsageError(f"{path}: no model here. Give a run directory or its model/ folder (created by topwork fit).")


def timm_config(classifier: Classifier) -> dict[str, Any]:
    """``config.json`` in timm's hub layout, for ``timm.create_model('local-dir:FOLDER', pretrained=True)``."""
    backbone, spec = classifier.backbone, classifier.backbone.spec
    modes = {"squash": "squash", "crop": "center", "pad": "border"}
    kept = ("tag", "custom_load", "fixed_input_size", "pool_size", "first_conv", "classifier", "license")
    pretrained = {key: backbone.pretrained_cfg.get(key) for key in kept if key in backbone.pretrained_cfg}
    # transformers then takes sigmoids; timm leaves that to the caller
    problem = {"problem_type": "multi_label_classification"} if classifier.multi_label else {}
    size = [3, spec.height, spec.width]
    is_resized = list(backbone.pretrained_cfg.get("input_size") or size) != size
    sized = backbone.layout.takes_size and (is_resized or backbone.layout.options)
    options = backbone.layout.options | ({"img_size": [spec.height, spec.width]} if sized else {})
    return (
        problem
        | ({"model_args": options} if options else {})
        | {
            "architecture": backbone.architecture,
            "num_classes": len(classifier.classes),
            "num_features": backbone.n_features,
            "label_names": list(classifier.classes),
            "pretrained_cfg": pretrained
            | {
                "input_size": [3, spec.height, spec.width],
                "interpolation": spec.interpolation,
                "crop_pct": spec.crop_fraction,
                "crop_mode": modes[spec.fit],
                "mean": list(spec.mean),
                "std": list(spec.std),
                "num_classes": len(classifier.classes),
            },
        }
    )


# ---- writing


def _write_weights(classifier: Classifier, path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(classifier.backbone.folder / WEIGHTS)
    backbone, head = classifier.backbone, classifier.head
    layers = _head_layers(backbone)
    replaced = tuple(f"{name}." for name in {*layers, backbone.classifier_name, *backbone.layout.layers})
    # hidden layers of a tuned head are stored under timm's name of the last layer
    replaced = (f"{backbone.classifier_name}.",) if backbone.changes.hidden else replaced
    tensors = {k: v for k, v in tensors.items() if not k.startswith((*replaced, HEAD_PREFIX))}
    if head.kind == "plain":
        weight = head.weight[..., None, None] if backbone.layout.is_convolution and backbone.is_timm else head.weight
        for name in layers:
            tensors |= {f"{name}.weight": weight, f"{name}.bias": head.bias}
    else:
        extended = {
            "weight": head.weight,
            "bias": head.bias,
            "mean": head.transform.mean,
            "scale": head.transform.scale,
        }
        tensors |= {HEAD_PREFIX + key: value for key, value in extended.items()}
    # asarray, not ascontiguousarray: that makes a counter of shape () one of shape (1,), which transformers refuses
    save_file({key: np.asarray(value, order="C") for key, value in tensors.items()}, path, metadata={"format": "pt"})


def _head_layers(backbone: Backbone) -> tuple[str, ...]:
    """Names under which the rows of a plain head are stored: timm's, if timm's network can hold them."""
    return backbone.layout.layers if backbone.is_timm else (backbone.classifier_name,)


def _facts(classifier: Classifier) -> dict[str, Any]:
    import topwork

    backbone, transform = classifier.backbone.as_dict(), classifier.head.transform
    if not classifier.backbone.changes:
        backbone.pop("changes")
    if classifier.backbone.layout == Layout.from_dict(None, backbone["pretrained_cfg"]):  # what older versions assume
        backbone.pop("layout")
    several = {"multi_label": True} if classifier.multi_label else {}
    return {
        "format": FORMAT if several or "changes" in backbone or "layout" in backbone else 1,
        "topwork": topwork.__version__,
        "kind": classifier.head.kind,
        **backbone,
        "classes": list(classifier.classes),
        "precision": classifier.precision,
        "temperature": classifier.temperature,
        "temperature_folded": True,
        "head": {"blocks": list(transform.blocks), "power": transform.power},
        "thresholds": classifier.thresholds,
        "provenance": classifier.provenance,
        **several,
    }


# ---- reading


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(f"{path}: too large for a model description.")
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a topwork model description.")
    return value


def _check_files(folder: Path, files: dict[str, Any]) -> None:
    """Only the names that topwork writes are ever opened, and only with the digest they were written with."""
    for name, digest in files.items():
        if name not in KNOWN_FILES:
            raise ModelError(f"{folder / FACTS}: names a file that topwork does not write: {name!r:.80}")
        if not (folder / name).is_file():
            raise ModelError(f"{folder / name}: missing; the model folder is incomplete.")
        if file_digest(folder / name) != digest and name != CARD:
            raise ModelError(f"{folder / name}: damaged or modified (its SHA-256 differs from the one in {FACTS}).")
    if COMPILED[0] in files:
        with open(folder / COMPILED[0], "rb") as file:
            # OpenVINO would try its readers for other formats on a file that is not XML.
            if not file.read(64).lstrip().startswith(b"<?xml"):
                raise ModelError(f"{folder / COMPILED[0]}: not an OpenVINO network.")
    if WEIGHTS not in files:
        raise ModelError(f"{folder / FACTS}: names no {WEIGHTS}.")


def _read_tensors(path: Path, names: list[str] | None = None) -> dict[str, NDArray[Any]]:
    """Some tensors of a file, or all."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in (file.keys() if names is None else names)}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: not a complete safetensors file with the expected tensors: {error}") from None


def _from_facts(folder: Path, facts: dict[str, Any]) -> Classifier:
    facts["preprocessing"]["resizer"] = "pillow"  # used for all predictions
    backbone = Backbone.from_dict(facts, folder.absolute())
    _check_changes(backbone.changes, folder)
    return Classifier(
        backbone=backbone,
        head=_head(facts, backbone),
        classes=tuple(str(name) for name in facts["classes"]),
        temperature=float(facts["temperature"]),
        precision=str(facts["precision"]),
        thresholds=dict(facts["thresholds"]),
        arrays=_read_tensors(folder / DECISION) if DECISION in facts["files"] else {},
        provenance=dict(facts["provenance"]),
        multi_label=bool(facts.get("multi_label", False)),
    )


def _check_changes(changes: Changes, folder: Path) -> None:
    """Before any network is built from them."""
    try:
        n_hidden = len(parse_head(changes.hidden).hidden) if changes.hidden is not None else 1
    except UsageError as error:
        raise ModelError(f"{folder / FACTS}: {error}") from None
    if not n_hidden or changes.pooling not in (None, *POOLINGS) or not isinstance(changes.drop_hidden, bool):
        raise ModelError(f"{folder / FACTS}: describes unsupported changes to the network.")


def _head(facts: dict[str, Any], backbone: Backbone) -> LinearHead:
    blocks, power = tuple(facts["head"]["blocks"]), facts["head"]["power"]
    if facts["kind"] == "plain":
        names = [f"{_head_layers(backbone)[0]}.{key}" for key in ("weight", "bias")]
        tensors = _read_tensors(backbone.folder / WEIGHTS, names)
        weight, bias = (tensors[name] for name in names)
        weight = weight[:, :, 0, 0] if weight.ndim == 4 else weight
        return last_features_head(weight, bias)
    keys = ("mean", "scale", "weight", "bias")
    tensors = _read_tensors(backbone.folder / WEIGHTS, [HEAD_PREFIX + key for key in keys])
    part = {key: tensors[HEAD_PREFIX + key] for key in keys}
    return LinearHead(FeatureTransform(blocks, power, part["mean"], part["scale"]), part["weight"], part["bias"])


def _check_head(classifier: Classifier, folder: Path) -> None:
    head, n_classes = classifier.head, len(classifier.classes)
    good = (
        head.weight.ndim == 2
        and head.weight.shape == (n_classes, len(head.transform.mean))
        and head.bias.shape == (n_classes,)
        and all(np.isfinite(a).all() for a in (head.weight, head.bias, head.transform.mean, head.transform.scale))
    )
    if not good or len(set(classifier.classes)) != n_classes:
        raise ModelError(f"{folder}: the head does not match the class names.")
    if classifier.multi_label:
        limits = classifier.thresholds.get("labels")
        if not isinstance(limits, list) or len(limits) != n_classes or not all(_is_share(limit) for limit in limits):
            raise ModelError(f"{folder}: the labels do not match their thresholds.")


def _check_config(classifier: Classifier, folder: Path, files: dict[str, Any]) -> None:
    """The file that timm reads must agree, so that both give the same predictions."""
    if TIMM_CONFIG not in files:
        return
    own, found = timm_config(classifier), _read_json(folder / TIMM_CONFIG)
    keys = ("input_size", "interpolation", "crop_pct", "mean", "std")
    stated = found.get("pretrained_cfg")
    if not isinstance(stated, dict) or any(stated.get(key) != own["pretrained_cfg"][key] for key in keys):
        raise ModelError(f"{folder / TIMM_CONFIG}: its preprocessing differs from {FACTS}.")
    if found.get("label_names") != own["label_names"]:
        raise ModelError(f"{folder / TIMM_CONFIG}: its class names differ from {FACTS}.")


def _is_share(value: object) -> bool:
    return isinstance(value, float) and 0 <= value <= 1


# ---- the fields of topwork.json

MAX_SIDE = 2048  # pixels of the input; more would take gigabytes for one image
MAX_CLASSES = 1_000_000


class Rule(NamedTuple):
    """A requirement on a field, in words and as a check."""

    words: str
    holds: Callable[[Any], bool]
    is_optional: bool = False


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


def optional(**rules: Rule) -> dict[str, Rule]:
    """Fields that may be missing."""
    return {name: rule._replace(is_optional=True) for name, rule in rules.items()}


def _is_option(name: str, value: Any) -> bool:
    """Whether an option is allowed when building a network; options that read a file or URL are not."""
    is_plain = value is None or isinstance(value, (bool, int, float)) or (isinstance(value, str) and "/" not in value)
    is_list = isinstance(value, list) and all(isinstance(item, (bool, int, float)) for item in value)
    return "checkpoint" not in name and not name.startswith(("pretrained", "cache")) and (is_plain or is_list)


FLAG = Rule("true or false", lambda v: isinstance(v, bool))
SHARE = number(0, 1, none=True)
SIDE = number(8, MAX_SIDE, whole=True)
COUNT = number(0, 1e12, whole=True)
NAMES = items(text(), most=100_000)

FIELDS: dict[str, Rule] = {
    "format": number(1, FORMAT, whole=True),
    "kind": one_of("plain", "extended"),
    "architecture": text(r"[\w.\-]{1,200}", "the name of an architecture"),  # no hf-hub: and no local-dir:
    "backbone": text(),
    "classes": items(text(), 1, unique=True),
    "precision": one_of("f32", "bf16"),
    "temperature": number(1e-6, 1e6),
    "weights_digest": text(),
    "n_features": number(1, 1_000_000, whole=True),
    "n_parameters": COUNT,
    "stages": items(mapping(), most=10_000),
    "pretrained_cfg": mapping(),
    "licence_of_weights": text(none=True),
    "provenance": mapping(),
    "files": mapping(text(r"[0-9a-f]{64}", "a SHA-256 digest")),
    "preprocessing": mapping(),
    "head": mapping(),
    "thresholds": mapping(),
    **optional(temperature_folded=FLAG, multi_label=FLAG, changes=mapping(), layout=mapping()),
}
SECTIONS: dict[str, dict[str, Rule]] = {
    "preprocessing": {
        "height": SIDE,
        "width": SIDE,
        "fit": one_of("squash", "crop", "pad"),
        "crop_fraction": number(0.01, 1),
        "interpolation": one_of("bilinear", "bicubic"),
        "mean": items(number(-10, 10), 3, 3),
        "std": items(number(1e-3, 10), 3, 3),
        "background": items(number(0, 255, whole=True), 3, 3),
        **optional(
            resizer=one_of("quick", "pillow"),
            mirror=one_of(*MIRRORS),
            bands=text(r"\d{1,4},\d{1,4},\d{1,4}", "three band numbers"),
        ),
    },
    "head": {
        "blocks": items(one_of("last", "stages"), 1, 2, unique=True),
        "power": one_of("none", "sqrt", "unit"),
    },
    "thresholds": optional(
        unknown=number(-1e9, 1e9, none=True),
        unknown_false_alarm_rate=SHARE,
        confidence=SHARE,
        set_probability=SHARE,
        set_coverage=SHARE,
        target_precision=SHARE,
        labels=items(number(0, 1)),
        positive=Rule("an object or null", lambda v: v is None or isinstance(v, dict)),
        none_is_an_answer=FLAG,
    ),
    "layout": {
        "head": text(),
        "layers": NAMES,
        "is_convolution": FLAG,
        "takes_size": FLAG,
        "options": Rule(
            "plain options of a network",
            lambda v: isinstance(v, dict) and len(v) < 100 and all(map(_is_option, v, v.values())),
        ),
    },
}
STAGE: dict[str, Rule] = {"name": text(), "module": text(none=True), "parameters": NAMES, "n_parameters": COUNT}


def check_description(facts: dict[str, Any], path: Path) -> None:
    """Checks types and ranges of all fields before anything is built from them; unknown fields are ignored.

    Args:
        path: of the file, for the error.

    Raises:
        ModelError: the first field that is missing or out of range, by name; or a newer format.
    """
    form = facts.get("format")
    if type(form) is int and form > FORMAT:
        raise ModelError(
            f"{path.parent}: written by a newer version of topwork (format {form}); upgrade topwork to read it."
        )
    _check("", facts, FIELDS, path)
    for name, rules in SECTIONS.items():
        if name in facts:
            _check(f"{name}.", facts[name], rules, path)
    for row, stage in enumerate(facts["stages"]):
        _check(f"stages[{row}].", stage, STAGE, path)
    positive = facts["thresholds"].get("positive")
    if positive is not None:
        rules = {"class": one_of(*facts["classes"][:2]), "threshold": number(0, 1)}
        _check("thresholds.positive.", positive, rules, path)
        _check("", facts, {"classes": items(text(), 2, 2)}, path)


def _check(prefix: str, values: dict[str, Any], rules: dict[str, Rule], path: Path) -> None:
    for name, rule in rules.items():
        if name not in values:
            if not rule.is_optional:
                raise ModelError(f"{path}: {prefix}{name} is missing; the model description is incomplete.")
        elif not rule.holds(values[name]):
            raise ModelError(f"{path}: {prefix}{name} is {values[name]!r:.60}, not {rule.words}.")
