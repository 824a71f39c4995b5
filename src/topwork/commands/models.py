"""``topwork models``: lists backbones, and describes one with its stages, trainable layers and learning rates.

In: a name and :class:`ModelSettings`. Out: :class:`Described`. The network is built on the ``meta`` device, so nothing
is downloaded and large networks are counted quickly.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from topwork.errors import TopworkError, UsageError
from topwork.models.backbone import Backbone, input_spec, load_backbone
from topwork.models.head import POOLINGS, Changes, HeadSpec, parse_head
from topwork.models.sources import EMBEDDED, backbone_names, parse_name
from topwork.progress import Reporter
from topwork.settings import ModelSettings, TuneSettings, check

if TYPE_CHECKING:
    from torch import nn

    from topwork.training.optimizer import StageRow


@dataclass(frozen=True)
class Described:
    """A network with a head, counted.

    Attributes:
        n_features: input width of the last layer.
        n_trainable: trainable parameters.
    """

    name: str
    architecture: str
    n_parameters: int
    n_trainable: int
    n_features: int
    license: str | None
    preprocessing: dict[str, Any]
    stages: tuple[StageRow, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"stages": [{"name": row.stage, **asdict(row)} for row in self.stages]}


def describe(name: str, settings: ModelSettings | None = None) -> Described:
    """Counts the parameters of a backbone with the requested head and strategy.

    Args:
        name: any that :func:`topwork.load_backbone` takes, or ``six-blocks``, the small network of courses.

    Raises:
        UsageError: no such name, or settings that contradict each other.
    """
    import torch

    from topwork.training.finetune import stage_names
    from topwork.training.optimizer import stage_table
    from topwork.training.recipe import DataFacts, plan

    settings = settings or ModelSettings()
    check(settings)
    with torch.device("meta"):
        network = _six_blocks(settings) if name == SIX_BLOCKS else _timm_network(name, settings)
    n_classes = settings.n_classes or (2 if settings.outputs == "binary" else max(2, int(network.num_classes)))  # type: ignore[arg-type]
    tune = TuneSettings(
        strategy=settings.strategy, last_stages=settings.last_stages, lr=settings.lr, lr_spread=settings.lr_spread,
        lr_decay=settings.lr_decay, outputs=settings.outputs,
    )  # fmt: skip
    recipe = plan(tune, DataFacts((100,) * n_classes, n_valid=1), stage_names(network))
    rows = tuple(stage_table(network, recipe))
    cfg: Any = getattr(network, "pretrained_cfg", None) or {}
    return Described(
        name=name,
        architecture=cfg.get("architecture") or SIX_BLOCKS,
        n_parameters=sum(row.n_parameters for row in rows),
        n_trainable=sum(row.n_trained for row in rows),
        n_features=_width(network),
        license=cfg.get("license"),
        preprocessing=input_spec(cfg).as_dict() if cfg else {},
        stages=rows,
    )


def _timm_network(name: str, settings: ModelSettings) -> nn.Module:
    from topwork.models.modules import build_classifier, n_outputs

    network: nn.Module = parse_name(name).network(weights=False)
    changed = settings.pooling or settings.drop_hidden or settings.hidden
    has_classifier = network.num_classes > 0  # type: ignore[operator]
    if has_classifier and not changed and settings.n_classes is None and settings.outputs == "softmax":
        return network
    head = parse_head(settings.hidden) if settings.hidden else HeadSpec()
    n_classes = 1000 if has_classifier and settings.outputs != "binary" else 2
    width = n_outputs(settings.n_classes or n_classes, settings.outputs)
    return build_classifier(network, head, width, pooling=settings.pooling, drop_hidden=settings.drop_hidden)


def _six_blocks(settings: ModelSettings) -> nn.Module:
    from topwork.models.modules import SixBlockNetwork, n_outputs

    if settings.hidden or settings.pooling or settings.drop_hidden:
        raise UsageError("six-blocks only takes --n-classes, --outputs and learning rates.")
    return SixBlockNetwork(n_outputs(settings.n_classes or 2, settings.outputs)).eval()


def _width(network: nn.Module) -> int:
    from torch import nn

    from topwork.models.modules import classifier_name

    layers = [m for m in network.get_submodule(classifier_name(network)).modules() if isinstance(m, nn.Linear)]
    return int(layers[-1].in_features) if layers else 0


SIX_BLOCKS = "six-blocks"
MOST_COUNTED = 40  # architectures: counting the parameters of one takes up to half a second


def listed(pattern: str) -> dict[str, Any]:
    """The embedded networks or, given a shell pattern, matching pretrained networks of timm.

    Each has ``name``, ``size`` (side of the input in pixels), ``n_parameters`` (including the pretrained classifier),
    ``top1`` (published ImageNet validation accuracy in percent) and ``license``; None if it is not known or not counted.
    """
    names = backbone_names(pattern) if pattern else []
    own = [_row(name, one.side, one.n_parameters, one.top1, "apache-2.0") for name, one in EMBEDDED.items()]
    return {"embedded": list(EMBEDDED), "timm": names, "backbones": _timm_rows(names) if pattern else own}


def _row(name: str, size: int | None, n_parameters: int | None, top1: float | None, license: str | None) -> Any:
    return {"name": name, "size": size, "n_parameters": n_parameters, "top1": top1, "license": license}


def _timm_rows(names: list[str]) -> list[dict[str, Any]]:
    import timm
    import torch

    architectures = {name.partition(".")[0] for name in names}
    sizes: dict[str, int] = {}
    for one in architectures if len(architectures) <= MOST_COUNTED else ():
        with torch.device("meta"):
            sizes[one] = sum(value.numel() for value in timm.create_model(one, pretrained=False).parameters())
    found = []
    for name in names:
        cfg = timm.get_pretrained_cfg(name)
        side = cfg.input_size[1] if cfg else None
        found.append(_row(name, side, sizes.get(name.partition(".")[0]), None, cfg.license if cfg else None))
    return found


@dataclass(frozen=True)
class Checked:
    """Properties of a backbone on this machine, or why it cannot be used.

    Attributes:
        engine: name and precision.
        size: side of the input in pixels.
        stages: names of the stages that can be frozen, without stem, neck and classifier.
        poolings: valid values of ``--pooling``.
        images_per_second: of the engine only, in batches of 16.
        is_timm: whether a classifier is also saved as a timm model.
        note: why torch runs it, if OpenVINO cannot.
        problem: why it cannot be used; None if it can.
    """

    name: str
    architecture: str = ""
    engine: str = ""
    size: int = 0
    n_parameters: int = 0
    n_features: int = 0
    stages: tuple[str, ...] = ()
    poolings: tuple[str, ...] = ()
    images_per_second: float = 0.0
    is_timm: bool = False
    license: str | None = None
    note: str | None = None
    problem: str | None = None


def check_backbones(
    names: Sequence[str], size: int | None = None, reporter: Reporter | None = None
) -> Iterator[Checked]:
    """Loads backbones and runs them on drawn images; missing weights are downloaded, and errors become a ``problem``."""
    reporter = reporter or Reporter()
    reporter.step("check")
    for number, name in enumerate(names):
        try:
            yield _checked(name, size, reporter)
        except TopworkError as error:
            yield Checked(name, problem=str(error))
        except Exception as error:  # noqa: BLE001 code of a thousand architectures, and of files that came with them
            yield Checked(name, problem=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}")
        gc.collect()  # networks have reference cycles: without this, memory grows
        reporter.progress(number + 1, len(names))


def _checked(name: str, size: int | None, reporter: Reporter) -> Checked:
    from topwork.features.engine import BATCH, drawn_images, load_engine

    backbone = load_backbone(name, on_note=reporter.note).with_spec(height=size, width=size)
    engine = load_engine(backbone)
    if engine.note:
        reporter.note(engine.note)
    images = np.concatenate([drawn_images(backbone.spec)] * 4)[: 2 * BATCH]
    engine.run(images[:BATCH])
    started = time.perf_counter()
    engine.run(images)
    seconds = time.perf_counter() - started
    return Checked(
        name=name,
        architecture=backbone.architecture,
        engine=f"{engine.kind} {engine.precision}",
        size=backbone.spec.height,
        n_parameters=backbone.n_parameters,
        n_features=backbone.n_features,
        stages=tuple(one.name for one in backbone.stages if one.name not in ("stem", "neck", "classifier")),
        poolings=_poolings(backbone),
        images_per_second=round(len(images) / seconds, 1),
        is_timm=backbone.is_timm,
        license=backbone.license,
        note=engine.note,
    )


def _poolings(backbone: Backbone) -> tuple[str, ...]:
    """The poolings that the network supports."""
    import torch

    from topwork.models.modules import changed

    found = []
    for pooling in POOLINGS:
        try:
            with torch.device("meta"):
                changed(parse_name(f"random:{backbone.architecture}").network(weights=False), Changes(pooling=pooling))
        except UsageError:
            continue
        found.append(pooling)
    return tuple(found)
