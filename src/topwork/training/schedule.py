"""Learning-rate schedules: pure functions of the position in [0, 1].

In: a name and a position. Out: a factor in [0, 1] for every stage's rate, and the momentum. There is no state, so a
resumed run only needs its position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from topwork.settings import ScheduleName

Schedule = Callable[[float], float]

HIGH_MOMENTUM, LOW_MOMENTUM = 0.95, 0.85


def cosine_between(start: float, end: float) -> Schedule:
    """Half a cosine wave from start to end."""
    return lambda position: end + (start - end) * (1 + math.cos(math.pi * position)) / 2


def line_between(start: float, end: float) -> Schedule:
    """A straight line from start to end."""
    return lambda position: start + (end - start) * position


def constant(value: float) -> Schedule:
    """Constant."""
    return lambda _: value


def combine(fractions: Sequence[float], schedules: Sequence[Schedule]) -> Schedule:
    """Schedules in sequence; ``fractions`` add up to 1 (fastai's ``combine_scheds``)."""
    assert len(fractions) == len(schedules), "one fraction a schedule"
    assert math.isclose(sum(fractions), 1), "fractions must add up to 1"
    edges = [sum(fractions[:n]) for n in range(len(fractions))] + [1.0]

    def combined(position: float) -> float:
        position = min(max(position, 0.0), 1.0)
        for (low, high), schedule in zip(pairwise(edges), schedules, strict=True):
            if position < high or high == 1.0:
                return schedule((position - low) / (high - low) if high > low else 1.0)
        raise AssertionError("the last edge is 1")

    return combined


def rate_schedule(name: ScheduleName, warmup: float = 0.25) -> Schedule:
    """The factor on all rates.

    Args:
        warmup: fraction of the phase in which the rate rises, in [0, 1); ignored by ``flat`` and ``step``.
    """
    if name == "flat":
        return constant(1.0)
    if name == "step":  # a tenth after each third
        return combine([1 / 3, 1 / 3, 1 / 3], [constant(1.0), constant(0.1), constant(0.01)])
    if name == "cosine":
        rise, fall = line_between(0.0, 1.0), cosine_between(1.0, 0.0)
    else:  # Smith 2018, arXiv 1803.09820, with the cosine shape of fastai
        rise, fall = cosine_between(1 / 25, 1.0), cosine_between(1.0, 1e-5)
    return combine([warmup, 1 - warmup], [rise, fall]) if warmup else fall


def momentum_schedule(name: ScheduleName, warmup: float = 0.25) -> Schedule:
    """Momentum (Adam's first beta); one-cycle lowers it while the rate is high."""
    if name != "one-cycle" or not warmup:
        return constant(0.9)
    fall, rise = cosine_between(HIGH_MOMENTUM, LOW_MOMENTUM), cosine_between(LOW_MOMENTUM, HIGH_MOMENTUM)
    return combine([warmup, 1 - warmup], [fall, rise])
