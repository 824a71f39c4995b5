"""``topwork lr-range``: a learning-rate range test on these images and this network.

In: images and the settings of a fit. Out: :class:`Ranged`. Nothing is written.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from topwork.commands.assess import check_labels
from topwork.commands.prepare import fitted_probe, prepare_data
from topwork.progress import Reporter, Steps
from topwork.settings import FitSettings, check

if TYPE_CHECKING:
    from topwork.training.lr_range import RangeTest
    from topwork.training.optimizer import StageRow


@dataclass(frozen=True)
class Ranged:
    """A range test and its setup.

    Attributes:
        stages: peak rate of each stage with the suggestion as the rate of the head.
        option: the options for ``topwork fit --mode tune``.
    """

    test: RangeTest
    stages: tuple[StageRow, ...]
    option: str
    backbone: str
    batch_size: int
    head_is_fitted: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "suggestion": self.test.suggestion,
            "reason": self.test.reason,
            "option": self.option,
            "rules": self.test.rules,
            "rates": self.test.rates.tolist(),
            "losses": self.test.losses.tolist(),
            "stages": [vars(row) for row in self.stages],
            "backbone": self.backbone,
            "batch_size": self.batch_size,
            "head_is_fitted": self.head_is_fitted,
        }


def lr_range(
    path: str | os.PathLike[str],
    settings: FitSettings | None = None,
    *,
    n_steps: int = 100,
    lowest: float = 1e-6,
    highest: float = 1.0,
    reporter: Reporter | None = None,
) -> Ranged:
    """Increases the learning rate over ``n_steps`` training steps on a copy of the network and records the losses.

    The network starts as in a fit: pretrained, with a linear head from the probe.

    Raises:
        UsageError: nothing to train on, or settings that contradict each other.
    """
    from topwork.training.finetune import plan_tuning
    from topwork.training.lr_range import range_test
    from topwork.training.optimizer import stage_table

    settings, reporter = replace(settings or FitSettings(), mode="tune", near_duplicates=False), reporter or Reporter()
    check(settings)
    check_labels(settings)
    steps = Steps(reporter)
    data = prepare_data(path, settings, steps)
    with steps("probe"):
        probe = fitted_probe(data, steps).probe
    reporter.step("prepare")
    ready = plan_tuning(data.backbone, data.manifest, data.features, data.parts, probe, settings, reporter.progress)
    reporter.step("range test")
    network = ready.network()
    test = range_test(network, ready.recipe, ready.train, n_steps, lowest, highest, reporter.progress)
    scale = test.suggestion / max(rate for _, rate in ready.recipe.phases[-1].rates)  # the phase that was tested
    rows = tuple(replace(row, rate=row.rate * scale) for row in stage_table(network, ready.recipe))
    return Ranged(
        test,
        rows,
        _option(rows),
        data.backbone.name,
        ready.recipe.batch_size,
        ready.spec.starts_from_probe and ready.recipe.head_from_probe,
    )


def _option(rows: tuple[StageRow, ...]) -> str:
    """The suggestion as options of fit; the first and last trainable stages set the spread."""
    rates = [row.rate for row in rows if row.rate]
    low, high = rates[0], rates[-1]
    return f"--lr {high:.1e}" if low == high else f"--lr {low:.1e}:{high:.1e}"
