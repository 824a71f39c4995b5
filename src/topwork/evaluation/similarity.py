"""Nearest neighbors by cosine similarity, and typical images."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from topwork.data.shards import room_for
from topwork.evaluation.predictions import Ints

_BLOCK_ROWS = 1024


def unit_rows(features: ArrayLike) -> NDArray[np.float32]:
    """(N, D) float32 rows of length 1; rows of zeros stay zeros."""
    given = np.asarray(features)
    unit = room_for(given.shape, np.float32)
    for start in range(0, len(given), _BLOCK_ROWS):
        rows = np.asarray(given[start : start + _BLOCK_ROWS], np.float32)
        with np.errstate(invalid="ignore", over="ignore"):  # infinite features become NaN rows, which callers check
            lengths = np.sqrt(np.einsum("nd,nd->n", rows, rows))[:, None]
            unit[start : start + _BLOCK_ROWS] = rows / np.where(lengths == 0, 1, lengths)
    return unit


def nearest(rows: NDArray[np.float32], chosen: Ints, reference: Ints, k: int) -> tuple[Ints, NDArray[np.float32]]:
    """For each chosen row, its k nearest other reference rows, nearest first, and their cosine similarity.

    Args:
        rows: (N, D) of :func:`unit_rows`.
        chosen: (M,) rows to find neighbors of.
        reference: rows to find them among.

    Returns:
        (M, k) each; fewer columns if there are fewer rows.
    """
    k = max(0, min(k, len(reference) - bool(np.isin(chosen, reference).any())))
    near, similarity = np.empty((len(chosen), k), np.int64), np.empty((len(chosen), k), np.float32)
    for start in range(0, len(chosen) if k else 0, _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        with np.errstate(invalid="ignore"):
            found = np.nan_to_num(rows[chosen[block]] @ rows[reference].T, nan=-2.0)
        found[chosen[block][:, None] == reference] = -np.inf
        best = np.argpartition(-found, k - 1, axis=1)[:, :k]
        order = np.argsort(-np.take_along_axis(found, best, axis=1), axis=1, kind="stable")
        best = np.take_along_axis(best, order, axis=1)
        near[block], similarity[block] = reference[best], np.take_along_axis(found, best, axis=1)
    return near, similarity


def nearest_images(features: ArrayLike, reference: ArrayLike, k: int) -> tuple[Ints, NDArray[np.float32]]:
    """(N, k) rows of the (M, D) reference nearest to each of the (N, D) features, and their cosine similarity."""
    rows = unit_rows(np.concatenate([np.asarray(features, np.float32), np.asarray(reference, np.float32)]))
    n = len(np.asarray(features))
    near, cosine = nearest(rows, np.arange(n), np.arange(n, len(rows)), k)
    return near - n, cosine


def k_means(rows: NDArray[np.float32], n: int, rng: np.random.Generator, n_steps: int = 5) -> NDArray[np.float32]:
    """(n, D) unit-length centers of spherical k-means on :func:`unit_rows`, from random rows; n at most N."""
    if n == 1:
        return unit_rows(rows.mean(axis=0, keepdims=True))
    centers = rows[rng.choice(len(rows), n, replace=False)]
    for _ in range(n_steps):
        belongs = (rows @ centers.T).argmax(axis=1) == np.arange(n)[:, None]
        centers = np.where(belongs.any(axis=1)[:, None], unit_rows(belongs.astype(np.float32) @ rows), centers)
    return np.asarray(centers)
