"""Limits linear algebra to one thread for small problems.

Synchronizing threads after each of thousands of small products gains nothing on an idle machine and wastes time
spinning on a busy one: with 32 other processes on two cores, a refit of 398 images took 69 to 81 s with two threads and
25 to 27 s with one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

SMALL_VALUES = 2_000_000  # for example, 1,500 images with 1,280 features


@contextmanager
def few_threads(n_values: int) -> Iterator[None]:
    """Keeps linear algebra to one thread while it works on at most ``SMALL_VALUES`` values; else changes nothing."""
    if n_values > SMALL_VALUES:
        yield
        return
    import threadpoolctl

    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        yield
