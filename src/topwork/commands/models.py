"""``topwork models NAME``: a network's stages, their parameters, which would move and at which rate.

In: a name and :class:`ModelSettings`. Out: :class:`Described`. The network is built without memory for its weights, so
nothing is downloaded and even large ones are counted at once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from topwork.errors import UsageError
from topwork.models.backbone import input_spec
from topwork.models.head import HeadSpec, parse_head
from topwork.models.sources import EMBEDDED, backbone_names, parse_name
from topwork.settings import ModelSettings, TuneSettings, check

if TYPE_CHECKING:
    from torch import nn

    from topwork.training.optimizer import StageRow


@dataclass(frozen=True)
class Described:
    """A network with a head, counted.

    Attributes:
        n_features: what the last layer sees.
        n_trainable: parameters that would move.
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
    """Counts a backbone with the head and the strategy that are asked for.

    Args:
        name: any that :func:`topwork.load_backbone` takes, or ``six-blocks``, the small network of courses.

    Raises:
        UsageError: no such name, or settings that contradict each other.
    """
    import torch

    from topwork.training.finetune import SIX_BLOCKS, stage_names
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
        preprocessing=input_spec(parse_name(name), cfg).as_dict() if cfg else {},
        stages=rows,
    )


def _timm_network(name: str, settings: ModelSettings) -> nn.Module:
    from topwork.models.modules import build_classifier, n_outputs

    network: nn.Module = parse_name(name).network(weights=False)
    changed = settings.pooling or settings.drop_hidden or settings.hidden
    if not changed and settings.n_classes is None and settings.outputs == "softmax":
        return network
    head = parse_head(settings.hidden) if settings.hidden else HeadSpec()
    width = n_outputs(settings.n_classes or (2 if settings.outputs == "binary" else 1000), settings.outputs)
    return build_classifier(network, head, width, pooling=settings.pooling, drop_hidden=settings.drop_hidden)


def _six_blocks(settings: ModelSettings) -> nn.Module:
    from topwork.models.modules import SixBlockNetwork, n_outputs

    if settings.hidden or settings.pooling or settings.drop_hidden:
        raise UsageError("six-blocks is one network as it is: it takes --n-classes, --outputs and rates only.")
    return SixBlockNetwork(n_outputs(settings.n_classes or 2, settings.outputs)).eval()


def _width(network: nn.Module) -> int:
    from torch import nn

    from topwork.models.modules import classifier_name

    layers = [m for m in network.get_submodule(classifier_name(network)).modules() if isinstance(m, nn.Linear)]
    return int(layers[-1].in_features) if layers else 0


def listed(pattern: str) -> dict[str, list[str]]:
    """Names of embedded networks, and of timm's that match a shell pattern."""
    return {"embedded": list(EMBEDDED), "timm": backbone_names(pattern) if pattern else []}
