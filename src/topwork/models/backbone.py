"""Pretrained networks: a folder with weights, prepared once, and the facts needed to use it.

In: a name (see ``models/sources.py``). Out: a :class:`Backbone`: plain facts plus a folder with the weights as
safetensors, kept in the cache. Reading it back needs neither torch nor timm; :meth:`Backbone.module` builds the network.
Inference is in ``features/engine.py``.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
import warnings
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from topwork.data.transforms import InputSpec
from topwork.errors import ModelError, TopworkError, UsageError, first_line
from topwork.files import atomic_folder
from topwork.models.head import UNCHANGED, Changes, parse_head
from topwork.models.sources import WEIGHTS, license_note, parse_name
from topwork.models.stages import Stage, find_stages, is_inside
from topwork.settings import cache_folder
from topwork.text import Described

if TYPE_CHECKING:
    from torch import nn

FORMAT = 3  # bump when the files written below change meaning
_PREPARED = "backbone.json"


@dataclass(frozen=True)
class Layout:
    """Facts about a timm network for reading and writing its weights without building it.

    Attributes:
        head: dotted name of the head in our network.
        layers: names of timm's last layers, each of which gets the rows of a linear head; empty if timm's network cannot
            hold a linear head on these features.
        is_convolution: whether those layers are 1x1 convolutions.
        takes_size: whether the network is built for one input size (timm's ``img_size``).
        options: further arguments it was created with.
    """

    head: str
    layers: tuple[str, ...]
    is_convolution: bool = False
    takes_size: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def from_dict(values: dict[str, Any] | None, cfg: dict[str, Any]) -> Layout:
        """Reads the JSON next to the weights; older descriptions have a single linear layer."""
        if values is None:
            name = cfg.get("classifier") or "classifier"
            return Layout(str(name), (str(name),))
        return Layout(**values | {"layers": tuple(values["layers"])})


@dataclass(frozen=True, repr=False)
class Backbone(Described):
    """A pretrained network.

    Attributes:
        name: as requested, with aliases resolved.
        architecture: timm's name of the network.
        spec: how its input is prepared.
        weights_digest: SHA-256 over names, shapes and values of all tensors.
        folder: holds ``model.safetensors`` (and the compiled forms that the engine adds).
        n_features: length D of the last pooled features.
        n_parameters: without the classifier.
        changes: how the network differs from timm's; includes hidden layers of a tuned head.
        layout: the position of its classifier, and whether it is built for one input size.
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
    layout: Layout
    changes: Changes = UNCHANGED

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, under the names that ``topwork.json`` has for them."""
        return {
            "backbone": self.name,
            "architecture": self.architecture,
            "preprocessing": self.spec.as_dict(),
            "weights_digest": self.weights_digest,
            "n_features": self.n_features,
            "n_parameters": self.n_parameters,
            "stages": [vars(stage) | {"parameters": list(stage.parameters)} for stage in self.stages],
            "pretrained_cfg": self.pretrained_cfg,
            "licence_of_weights": self.license,
            "layout": asdict(self.layout),
            "changes": asdict(self.changes),
        }

    @staticmethod
    def from_dict(values: dict[str, Any], folder: Path) -> Backbone:
        """Reads these values; older descriptions have neither layout nor changes."""
        stages = ((s["name"], s["module"], tuple(s["parameters"]), s["n_parameters"]) for s in values["stages"])
        return Backbone(
            name=values["backbone"],
            architecture=values["architecture"],
            spec=InputSpec.from_dict(values["preprocessing"]),
            weights_digest=values["weights_digest"],
            folder=folder,
            n_features=values["n_features"],
            n_parameters=values["n_parameters"],
            stages=tuple(Stage(*stage) for stage in stages),
            pretrained_cfg=values["pretrained_cfg"],
            license=values["licence_of_weights"],
            layout=Layout.from_dict(values.get("layout"), values["pretrained_cfg"]),
            changes=Changes(**values.get("changes", {})),
        )

    def facts(self) -> dict[str, object]:
        """Shown in notebooks."""
        return {
            "Name": self.name, "Architecture": self.architecture, "Input": f"{self.spec.width} x {self.spec.height} pixels",
            "Features": f"{self.n_features:,}", "Parameters": f"{self.n_parameters:,}", "License": self.license or "unknown",
        }  # fmt: skip

    def module(self, n_classes: int = 0) -> nn.Module:
        """The network with these weights and changes, in eval mode, built for the size in ``spec``.

        Args:
            n_classes: 0 ends it before its last layer: (B, 3, H, W) to (B, D). Else it has a linear head with so many
                outputs, which is taken from the weights if its size fits.

        Raises:
            UsageError: a size that this network does not take.
            ModelError: weights that do not fit.
        """
        from safetensors.torch import load_file

        network = self.skeleton(n_classes)
        state = {k: v for k, v in load_file(self.folder / WEIGHTS).items() if not k.startswith("topwork_head.")}
        ours = network.state_dict()
        wanted = [name for name in ours if not is_inside(name, [self.classifier_name])]
        if any(name in state and state[name].shape != ours[name].shape for name in wanted):
            state = _resized(state, network, self.architecture)
        wrong = [name for name in wanted if name not in state or state[name].shape != ours[name].shape]
        if wrong and self._is_resized:
            raise self._wrong_size(f"{wrong[0]} would have another shape")
        if wrong:
            raise ModelError(f"{self.folder / WEIGHTS}: does not fit {self.architecture}: {wrong[0]}")
        fitting = {name: state[name] for name in ours if name in state and state[name].shape == ours[name].shape}
        network.load_state_dict(fitting, strict=False)
        return network

    def skeleton(self, n_classes: int = 0) -> nn.Module:
        """The network of :meth:`module` with random weights.

        Raises:
            UsageError: a size that this network does not take.
        """
        import timm
        import torch

        from topwork.models.head import HeadSpec
        from topwork.models.modules import build_classifier, changed

        size = self.spec.height, self.spec.width
        options = self.layout.options | {"num_classes": 1} | ({"img_size": size} if self.layout.takes_size else {})
        try:
            network = changed(timm.create_model(self.architecture, pretrained=False, **options), self.changes)
            if self._is_resized:
                with torch.inference_mode():
                    network.eval()(torch.zeros(1, 3, *size))
        except (ValueError, RuntimeError, AssertionError, TypeError, IndexError) as error:
            if not self._is_resized:
                raise
            raise self._wrong_size(error) from None
        if n_classes:
            build_classifier(network, HeadSpec(), n_classes, n_features=self.n_features)
        return network.eval()

    @property
    def _is_resized(self) -> bool:
        return (self.spec.height, self.spec.width) != tuple(self.pretrained_cfg["input_size"][1:])

    def _wrong_size(self, error: Exception | str) -> UsageError:
        native = self.pretrained_cfg["input_size"][1]
        reason = error if isinstance(error, str) else first_line(error)
        return UsageError(
            f"--size {self.spec.height}: {self.architecture} does not take images of this size ({reason}). "
            f"Its weights were trained at {native}; try a multiple of its patch size, or leave out --size."
        )

    @property
    def classifier_name(self) -> str:
        """Dotted name of the last linear layer in the network."""
        name = self.layout.head
        return f"{name}.{parse_head(self.changes.hidden).last_index}" if self.changes.hidden else name

    @property
    def stage_names(self) -> list[str]:
        """Names of the stages in forward order, the classifier last."""
        return [stage.name for stage in self.stages]

    @property
    def is_timm(self) -> bool:
        """Whether timm's network can hold these weights with a linear head."""
        return not self.changes and bool(self.layout.layers)

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
        """The same weights with another input size or resize mode."""
        return replace(self, spec=replace(self.spec, **{k: v for k, v in changes.items() if v is not None}))


def load_backbone(
    name: str = "auto", *, cache: Path | None = None, on_note: Callable[[str], None] | None = None
) -> Backbone:
    """Finds, verifies and prepares pretrained weights.

    Args:
        name: see :func:`topwork.models.sources.parse_name`: ``lite0``, any timm name such as ``resnet18.tv_in1k``,
            ``random:ARCHITECTURE``, ``ARCHITECTURE=FILE.safetensors``, a folder, or a name of another library.
        on_note: called before any download if the license of the weights is not permissive.

    Raises:
        UsageError: unknown name or file.
        DownloadError: the weights cannot be downloaded.
        ModelError: the weights are damaged or do not fit.
    """
    source = parse_name(name, check=False)
    folder = (cache or cache_folder()) / "backbones" / f"{source.key}-v{FORMAT}"
    prepared = _read_prepared(folder)
    if prepared is None:
        source = parse_name(name)
        note = license_note(source)
        if note and on_note:
            on_note(note)
        prepared = _write_prepared(source.network(), folder)
    return replace(prepared, name=source.name)


def check_backbone(name: str) -> None:
    """Raises UsageError for a name that :func:`load_backbone` does not know; nothing is downloaded or prepared."""
    if not (cache_folder() / "backbones" / f"{parse_name(name, check=False).key}-v{FORMAT}").is_dir():
        parse_name(name)


def input_spec(cfg: dict[str, Any]) -> InputSpec:
    """The preprocessing of a network, from timm's configuration of its weights.

    Size and statistics belong to the weights; resize mode and filter are ours (docs/decisions/0001-resizer.md).

    Raises:
        ModelError: the network does not take RGB images.
    """
    try:
        n_channels, height, width = map(int, cfg["input_size"])
        red, green, blue = map(float, cfg["mean"])
        spec = InputSpec(height=height, width=width, mean=(red, green, blue))
        red, green, blue = map(float, cfg["std"])
        if n_channels != 3 or min(height, width) < 1 or min(red, green, blue) <= 0:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        found = {name: cfg.get(name) for name in ("input_size", "mean", "std")}
        raise ModelError(
            f"{cfg.get('architecture')}: backbones take RGB images: three channels, and a mean and a deviation above 0 for each; "
            f"the configuration of its weights says {found}."
        ) from None
    return replace(spec, std=(red, green, blue))


# ---- prepared folders


def _read_prepared(folder: Path) -> Backbone | None:
    try:
        facts = json.loads((folder / _PREPARED).read_text())
        if facts["format"] != FORMAT or facts["weights_crc32"] != _crc32(folder / WEIGHTS):
            return None  # damaged: it is prepared again
        return Backbone.from_dict(facts, folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _crc32(path: Path) -> int:
    with open(path, "rb") as file:
        crc = 0
        while chunk := file.read(1 << 20):
            crc = zlib.crc32(chunk, crc)
    return crc


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
        network: as :meth:`Backbone.module` builds it, on the CPU.
        changes: those that the network has; by default those of the backbone.
        name: what to call it; by default it keeps its name.
    """
    backbone = replace(backbone, changes=backbone.changes if changes is None else changes, name=name or backbone.name)
    digest = weights_digest(
        {key: value.detach().numpy() for key, value in network.state_dict().items()}, backbone.changes
    )
    folder = (cache or cache_folder()) / "backbones" / f"tuned-{digest[:16]}-v{FORMAT}"
    prepared = _read_prepared(folder) or _write_prepared(network, folder, backbone)
    return replace(prepared, name=backbone.name, spec=backbone.spec)


def _write_prepared(network: Any, folder: Path, like: Backbone | None = None) -> Backbone:
    """Writes weights and facts of a network atomically: of timm's, or of one that differs from another in its weights.

    A network of timm is without its classifier afterwards.
    """
    from safetensors.torch import save_file

    from topwork.models.modules import timm_layers

    # cloned: some networks (CoaT) use a tensor under two names, which safetensors refuses
    state = {key: value.detach().clone().contiguous() for key, value in network.state_dict().items()}
    if like is None:
        heads = last = list(timm_layers(network))
    else:
        heads, last = [like.layout.head, *like.layout.layers], [like.classifier_name]
    stages = find_stages(network, heads)
    like = like or _without_classifier(network, folder)
    n_features, stages = _measured(network, like.spec, stages)
    backbone = replace(
        like,
        weights_digest=weights_digest({key: value.numpy() for key, value in state.items()}, like.changes),
        n_features=n_features,
        n_parameters=sum(v.numel() for k, v in network.named_parameters() if not is_inside(k, last)),
        stages=stages,
    )
    facts = json.loads(json.dumps({"format": FORMAT} | backbone.as_dict(), default=str))
    try:
        with atomic_folder(folder) as partial:
            save_file(state, partial / WEIGHTS)
            facts["weights_crc32"] = _crc32(partial / WEIGHTS)
            (partial / _PREPARED).write_text(json.dumps(facts, indent=1))
    except TopworkError:
        if not (folder / _PREPARED).is_file():  # else another process finished first
            raise
    return Backbone.from_dict(facts, folder)


def _without_classifier(network: Any, folder: Path) -> Backbone:
    """Ends a network of timm before its classifier; a description that lacks what is measured."""
    import torch

    from topwork.models.modules import OWN_HEAD, classifier_name, headless, reads_output, timm_layers

    cfg, layers = network.pretrained_cfg, timm_layers(network)
    convolution = isinstance(dict(network.named_modules()).get(layers[0]), torch.nn.Conv2d)
    takes_size = any("img_size" in inspect.signature(kind).parameters for kind in type(network).__mro__[:-2])
    options = {k: v for k, v in getattr(network, "_model_args", {}).items() if k not in _CALLERS_OPTIONS}
    headless(network)
    head = classifier_name(network)
    kept = layers if head != OWN_HEAD or reads_output(network) else ()
    layout, name = Layout(head, tuple(kept), convolution, takes_size, options), cfg["architecture"]
    return Backbone(name, name, input_spec(cfg), "", folder, 0, 0, (), cfg, cfg.get("license"), layout)


_CALLERS_OPTIONS = ("num_classes", "img_size", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


def _measured(network: Any, spec: InputSpec, stages: tuple[Stage, ...]) -> tuple[int, tuple[Stage, ...]]:
    """Runs two images to find the length of the features and the stages that return a map."""
    import torch

    maps: set[str] = set()
    hooks = [
        network.get_submodule(stage.module).register_forward_hook(
            lambda _module, _inputs, output, name=stage.module: maps.add(name) if _is_map(output) else None
        )
        for stage in stages
        if stage.module
    ]
    try:
        with torch.inference_mode():
            n_features = int(network.eval()(torch.zeros(2, 3, spec.height, spec.width)).shape[1])
    except RuntimeError as error:
        size = f"{spec.width}x{spec.height}"
        raise ModelError(
            f"{type(network).__name__}: cannot run on RGB images of {size} pixels: {first_line(error)}"
        ) from None
    for hook in hooks:
        hook.remove()
    return n_features, tuple(replace(stage, module=stage.module if stage.module in maps else None) for stage in stages)


def _is_map(output: Any) -> bool:
    """Whether a module returns a map or tokens for each of two images; of several tensors, the first counts."""
    value = output[0] if isinstance(output, tuple | list) and output else output
    return getattr(value, "ndim", 0) in (3, 4) and int(value.shape[0]) == 2


def _resized(state: dict[str, Any], network: Any, architecture: str) -> dict[str, Any]:
    """Position embeddings resized to the network, by timm's checkpoint filter."""
    # as timm does when it loads FlexiViT weights
    options: dict[str, Any] = {"interpolation": "bilinear", "antialias": False} if "flexi" in architecture else {}
    for kind in type(network).__mro__:
        module = sys.modules[kind.__module__]
        if kind.__module__.startswith("timm.models.") and hasattr(module, "checkpoint_filter_fn"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                filtered: dict[str, Any] = module.checkpoint_filter_fn(dict(state), network, **options)
            return filtered
    return state


def weights_digest(state: dict[str, np.ndarray[Any, Any]], changes: Changes = UNCHANGED) -> str:
    """SHA-256 over names, shapes, types and values in the order of names, and over changes to the network."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = np.ascontiguousarray(state[name])
        digest.update(f"{name} {value.dtype} {value.shape}\n".encode())
        digest.update(value.tobytes())
    found = digest.hexdigest()
    return hashlib.sha256(f"{found} {changes}".encode()).hexdigest() if changes else found
