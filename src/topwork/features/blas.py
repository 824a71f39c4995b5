"""Limits linear algebra to one thread for small problems.

Two threads that meet after each of thousands of small products gain nothing on an idle machine, and on a busy one they wait
for each other by spinning: a refit of 398 images on two cores with 32 programs waiting took 69 to 81 s and 9 s of processor
time with two threads, 25 to 27 s and 3.8 s with one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

SMALL_VALUES = 2_000_000  # of the features worked on: 1,500 images of 1,280


@contextmanager
def few_threads(n_values: int) -> Iterator[None]:
    """Keeps linear algebra to one thread while it works on at most ``SMALL_VALUES`` values; else changes nothing."""
    if n_values > SMALL_VALUES:
        yield
        return
    import threadpoolctl

    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        yield
