"""What glibc does with freed memory. On other systems these functions do nothing."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # parameters of mallopt, from malloc.h


@cache
def reuse_memory() -> None:
    """Keeps freed memory in the process from now on, for the next allocations.

    By default glibc maps each large tensor anew and unmaps it, so that the system clears its pages for every layer.
    Measured on two cores of a virtual machine: a training step of lite0 1.5 instead of 2.5 s, ResNet-50 on 16 images
    1.2 instead of 4.0 s, at the same peak memory.
    """
    glibc = _glibc()
    if glibc is not None:
        glibc.mallopt(_MMAP_MAX, 0)
        glibc.mallopt(_TRIM_THRESHOLD, -1)


def give_memory_back() -> None:
    """Returns freed memory to the system.

    Otherwise the arena of each decoding thread keeps the memory of its largest images: three times the required memory
    after 2,000 uploads of 10 megapixels (docs/lab-log.md).
    """
    glibc = _glibc()
    if glibc is not None:
        glibc.malloc_trim(0)


@cache
def _glibc() -> Any:
    try:
        library = ctypes.CDLL(None)
        return library if library.mallopt and library.malloc_trim else None
    except (OSError, AttributeError, TypeError):
        return None
