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
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topwork.data.remote import local_folder
from topwork.data.samples import one_label_only
from topwork.data.transforms import InputSpec
from topwork.errors import ModelError, UsageError
from topwork.files import atomic_folder, file_digest
from topwork.models.backbone import Backbone, Layout
from topwork.models.head import POOLINGS, Changes, FeatureTransform, LinearHead, parse_head
from topwork.models.model_schema import check_description
from topwork.models.stages import Stage
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
        check_description(facts, folder / FACTS, FORMAT)
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

    backbone, transform = classifier.backbone, classifier.head.transform
    plain = Layout.from_dict(None, backbone.pretrained_cfg)  # assumed by versions without layouts
    changes = {"changes": asdict(backbone.changes)} if backbone.changes else {}
    several = {"multi_label": True} if classifier.multi_label else {}
    return {
        "format": FORMAT if changes or several or backbone.layout != plain else 1,
        **changes,
        "topwork": topwork.__version__,
        "kind": classifier.head.kind,
        "architecture": backbone.architecture,
        "backbone": backbone.name,
        "classes": list(classifier.classes),
        "preprocessing": backbone.spec.as_dict(),
        "precision": classifier.precision,
        "temperature": classifier.temperature,
        "temperature_folded": True,
        "head": {"blocks": list(transform.blocks), "power": transform.power},
        "thresholds": classifier.thresholds,
        "weights_digest": backbone.weights_digest,
        "n_features": backbone.n_features,
        "n_parameters": backbone.n_parameters,
        "stages": [vars(stage) | {"parameters": list(stage.parameters)} for stage in backbone.stages],
        "pretrained_cfg": backbone.pretrained_cfg,
        **({"layout": asdict(backbone.layout)} if backbone.layout != plain else {}),
        "licence_of_weights": backbone.license,
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
    backbone = Backbone(
        name=facts["backbone"],
        architecture=facts["architecture"],
        spec=InputSpec.from_dict(facts["preprocessing"] | {"resizer": "pillow"}),  # used for all predictions
        weights_digest=facts["weights_digest"],
        folder=folder,
        n_features=int(facts["n_features"]),
        n_parameters=int(facts["n_parameters"]),
        stages=tuple(
            Stage(s["name"], s["module"], tuple(s["parameters"]), int(s["n_parameters"])) for s in facts["stages"]
        ),
        pretrained_cfg=facts["pretrained_cfg"],
        license=facts["licence_of_weights"],
        layout=Layout.from_dict(facts.get("layout"), facts["pretrained_cfg"]),
        changes=_changes(facts.get("changes", {}), folder),
    )
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


def _changes(values: dict[str, Any], folder: Path) -> Changes:
    """Checked before any network is built from it."""
    changes = Changes(**values)
    try:
        n_hidden = len(parse_head(changes.hidden).hidden) if changes.hidden is not None else 1
    except UsageError as error:
        raise ModelError(f"{folder / FACTS}: {error}") from None
    if not n_hidden or changes.pooling not in (None, *POOLINGS) or not isinstance(changes.drop_hidden, bool):
        raise ModelError(f"{folder / FACTS}: describes unsupported changes to the network.")
    return changes


def _head(facts: dict[str, Any], backbone: Backbone) -> LinearHead:
    blocks, power = tuple(facts["head"]["blocks"]), facts["head"]["power"]
    if facts["kind"] == "plain":
        names = [f"{_head_layers(backbone)[0]}.{key}" for key in ("weight", "bias")]
        tensors = _read_tensors(backbone.folder / WEIGHTS, names)
        weight, bias = (tensors[name] for name in names)
        weight = weight[:, :, 0, 0] if weight.ndim == 4 else weight
        n = weight.shape[1]
        transform = FeatureTransform(("last",), "none", np.zeros(n, np.float32), np.ones(n, np.float32))
        return LinearHead(transform, weight, bias)
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
