"""Whether two thumbnails show the same picture: the correlation of their fine structure, over flips and crops.

In: the 32-pixel grayscale thumbnails of a scan, and pairs of rows. Out: one correlation per pair, 1 for the same
picture. Three steps, each on the pairs left by the previous one: blurred thumbnails, 81 coarse crops, and a finer
search around the best of those.

A crop is ``R S C'``: S is the structure, R and C are (24, 32) matrices that crop and resample its rows and columns. So
nine row crops and nine column crops make 81 crops, whose products with another picture, means and norms are computed
from the matrices of single crops, which makes the search cheap.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topwork.data.loader import default_threads, in_order
from topwork.data.shards import room_for
from topwork.data.traits import THUMB_SIDE

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Thumbs = NDArray[np.uint8]

HIGHEST_SIMILARITY = 0.96  # upper limit of the calibrated threshold
_SIDE = 24  # pixels of the grid on which structures are compared
_ROUGH = 8192  # thumbnails or pairs at a time
_PAIRS = 128  # compared at a time by each thread; each pair takes about 200 kB of matrices
_COARSE_MARGIN = 0.22  # a finer search raises the correlation by no more than this (in 480 copies)
_CUTS = (0, 4, 8)  # percent cut off at each side, coarse search
_STEPS = (2, 1)
_DEEPEST_CUT = 12
_START_MARGIN = 0.1  # ways that start worse than the best by more than this do not catch up
_COARSE = np.array([(t, b, le, r) for t in _CUTS for b in _CUTS for le in _CUTS for r in _CUTS])
_WAYS = 4  # crop the second; crop it, the first mirrored; crop the first; crop it, the second mirrored


def rough_similarity(thumbs: Thumbs, pairs: Ints) -> Floats:
    """(M,) correlation of blurred thumbnails or their mirror images: fast, but only robust to small crops."""
    if not len(pairs):
        return np.empty(0, np.float32)
    rows, places = np.unique(pairs, return_inverse=True)
    halve = np.repeat(np.eye(THUMB_SIDE // 2, dtype=np.float32), 2, axis=1) / 2
    fine, broad = (halve @ _blur_matrix(partial(_bell, sigma)) for sigma in (1.5, 5.0))
    views = [room_for((len(rows), (THUMB_SIDE // 2) ** 2), np.float32) for _ in range(2)]
    for start in range(0, len(rows), _ROUGH):
        gray = np.asarray(thumbs[rows[start : start + _ROUGH]], np.float32)
        small = fine @ gray @ fine.T - broad @ gray @ broad.T
        for view, values in zip(views, (small, small[:, :, ::-1]), strict=True):
            view[start : start + _ROUGH] = _unit(np.asarray(values.reshape(len(values), -1), np.float32))
    (plain, mirrored), found = views, []
    for start in range(0, len(pairs), _ROUGH):
        a, b = places.reshape(-1, 2)[start : start + _ROUGH].T
        found.append(np.maximum((plain[a] * plain[b]).sum(1), (plain[a] * mirrored[b]).sum(1)))
    return np.concatenate(found)


def fine_structure(thumbs: Thumbs) -> Floats:
    """(N, 32, 32) high-pass filtered thumbnails: each pixel minus its surroundings.

    Otherwise any two dark objects on white would correlate.
    """
    if not len(thumbs):
        return np.empty((0, THUMB_SIDE, THUMB_SIDE), np.float32)
    gray = np.asarray(thumbs, np.float32)
    blur = _blur_matrix(lambda distance: abs(distance) <= 3)
    fine = gray - blur @ gray @ blur.T
    # A few strong edges (one shape on a plain background) must not dominate the weak texture in which pictures differ.
    usual = np.median(abs(fine), axis=(1, 2), keepdims=True) + 1
    return np.asarray(fine / np.sqrt(fine**2 + (2 * usual) ** 2), np.float32)


def structure_similarity(structure: Floats, pairs: Ints, least: float = 1.0) -> Floats:
    """(M,) best correlation of each pair of rows of (N, 32, 32), over flips and crops of either.

    Args:
        pairs: sorted by their first row, so that its crops are computed once per block.
        least: the threshold of interest. The finer search stops there and skips pairs that cannot reach it.
    """
    scores, starts = coarse_similarity(structure, pairs)
    return finer_similarity(structure, pairs, scores, starts, least)


def coarse_similarity(structure: Floats, pairs: Ints) -> tuple[Floats, Ints]:
    """Best correlations over 81 crops, in each of four ways.

    Returns:
        (M, 4) correlation of the best crop of each way, highest first, and way * 81 + crop, the start of a finer
        search.
    """
    found = _in_blocks(partial(_coarse, structure, pairs), np.arange(len(pairs)))
    scores, starts = zip(*found, strict=True) if found else ((), ())
    return (
        np.concatenate([np.empty((0, _WAYS), np.float32), *scores]),
        np.concatenate([np.empty((0, _WAYS), np.int64), *starts]),
    )


def finer_similarity(structure: Floats, pairs: Ints, scores: Floats, starts: Ints, least: float = 1.0) -> Floats:
    """(M,) best correlations after searching around the best coarse crops, if ``least`` requires it."""
    best = scores[:, 0].copy()
    hopeful = best >= min(least, HIGHEST_SIMILARITY) - _COARSE_MARGIN
    for place in range(_WAYS):
        rows = np.flatnonzero(hopeful & (best < least) & (scores[:, place] >= scores[:, 0] - _START_MARGIN))
        found = _in_blocks(partial(_finer, structure, pairs, starts[:, place]), rows)
        best[rows] = np.maximum(best[rows], np.concatenate([np.empty(0, np.float32), *found]))
    return np.asarray(np.minimum(best, 1.0), np.float32)


def _in_blocks(work: Callable[[Ints], Any], rows: Ints) -> list[Any]:
    blocks = [rows[start : start + _PAIRS] for start in range(0, len(rows), _PAIRS)]
    return list(in_order(work, blocks, min(4, default_threads()))) if blocks else []


def _coarse(structure: Floats, pairs: Ints, chosen: Ints) -> tuple[Floats, Ints]:
    pairs = pairs[chosen]
    rows, places = np.unique(pairs, return_inverse=True)
    first, second = places.reshape(pairs.shape).T
    some = structure[rows]
    ends = np.array([(low, high) for low in _CUTS for high in _CUTS])[None]
    tall, lengths = _tall(some, ends), _lengths(some, ends, ends)
    wide = [_wide(view, ends) for view in _whole_views(some)]
    ways = [(second, first, wide[0]), (second, first, wide[1]), (first, second, wide[0]), (first, second, wide[1])]
    by_way = np.stack(
        [
            (tall[cropped] @ sideways[whole].transpose(0, 2, 1) / lengths[cropped]).reshape(len(pairs), -1)
            for cropped, whole, sideways in ways
        ],
        axis=1,
    )
    crop = by_way.argmax(2)
    best = np.take_along_axis(by_way, crop[:, :, None], 2)[:, :, 0]
    order = np.argsort(-best, axis=1, kind="stable")
    starts = crop + len(_COARSE) * np.arange(_WAYS)
    return np.take_along_axis(best, order, 1), np.take_along_axis(starts, order, 1)


def _finer(structure: Floats, pairs: Ints, starts: Ints, chosen: Ints) -> Floats:
    """(M,) correlation with the best crop around the given one, in steps of 2 and then of 1 percent."""
    pairs = pairs[chosen]
    way, crop = np.divmod(starts[chosen], len(_COARSE))
    n, cuts = np.arange(len(pairs)), _COARSE[crop]  # (M, 4): top, bottom, left, right
    whole, cropped = structure[pairs[n, way // 2]], structure[pairs[n, 1 - way // 2]]
    plain, mirrored = _whole_views(whole)
    reference = np.where((way % 2 == 1)[:, None, None], mirrored, plain)
    best = np.full(len(pairs), -1, np.float32)
    for step in _STEPS:
        sides = np.clip(cuts[:, :, None] + step * np.array([-1, 0, 1]), 0, _DEEPEST_CUT)  # (M, 4, 3)
        rows, columns = _ends(sides[:, 0], sides[:, 1]), _ends(sides[:, 2], sides[:, 3])
        product = _tall(cropped, rows) @ _wide(reference, columns).transpose(0, 2, 1)
        scores = (product / _lengths(cropped, rows, columns)).reshape(len(pairs), -1)
        row, column = np.divmod(scores.argmax(1), columns.shape[1])
        cuts = np.concatenate([rows[n, row], columns[n, column]], 1)
        best = np.maximum(best, scores.max(1))
    return best


def _ends(low: Ints, high: Ints) -> Ints:
    """(M, 9, 2) all combinations of (M, 3) and (M, 3) cuts."""
    pair = np.broadcast_arrays(low[:, :, None], high[:, None, :])
    return np.stack(pair, -1).reshape(len(low), -1, 2)


# ---- implicit crops: K row crops and K column crops, (M or 1, K, 2) percent cut off at both ends


def _tall(structure: Floats, ends: Ints) -> Floats:
    """(M, K, 24 * 32) R S of (M, 32, 32) structures."""
    cut = _taken(_cut_tables()[0], ends)
    return np.asarray((cut.reshape(len(ends), -1, THUMB_SIDE) @ structure).reshape(len(structure), ends.shape[1], -1))


def _wide(reference: Floats, ends: Ints) -> Floats:
    """(M, K, 24 * 32) W C of (M, 24, 24) references: its product with R S is that of W with the crop R S C'."""
    m, k = len(reference), ends.shape[1]
    cut = _taken(_cut_tables()[0], ends)
    wide = reference @ cut.transpose(0, 2, 1, 3).reshape(len(ends), _SIDE, -1)
    return np.asarray(wide.reshape(m, _SIDE, k, THUMB_SIDE).transpose(0, 2, 1, 3).reshape(m, k, -1))


def _lengths(structure: Floats, rows: Ints, columns: Ints) -> Floats:
    """(M, K, K) norm of each crop without its mean; never 0.

    The sum of squares of R S C' is that over (R'R) * (S (C'C) S').
    """
    m, k = len(structure), rows.shape[1]
    _, grams, sums = _cut_tables()
    gram = _taken(grams, columns)
    around = structure @ gram.transpose(0, 2, 1, 3).reshape(len(gram), THUMB_SIDE, -1)
    around = around.reshape(m, -1, THUMB_SIDE) @ structure.transpose(0, 2, 1)
    around = around.reshape(m, THUMB_SIDE, k, THUMB_SIDE).transpose(0, 2, 1, 3).reshape(m, k, -1)
    squares = _taken(grams, rows).reshape(len(rows), k, -1) @ around.transpose(0, 2, 1)
    total = _taken(sums, rows) @ structure @ _taken(sums, columns).transpose(0, 2, 1)
    return np.asarray(np.sqrt(np.maximum(squares - total**2 / _SIDE**2, 1e-6)), np.float32)


def _taken(table: Floats, ends: Ints) -> Floats:
    """The entries of a table of :func:`_cut_tables` for these crops."""
    return np.asarray(table[ends[..., 0], ends[..., 1]])


@lru_cache(maxsize=1)
def _cut_tables() -> tuple[Floats, Floats, Floats]:
    """Resampling C after cutting off 0 to 12 percent at each end, C'C, and the column sums of C, by those percents."""
    percents = range(_DEEPEST_CUT + 1)
    cut = np.stack([[_cut_matrix(low, high) for high in percents] for low in percents]).astype(np.float32)
    return cut, np.swapaxes(cut, -1, -2) @ cut, cut.sum(-2)


def _cut_matrix(low: int, high: int) -> NDArray[np.float64]:
    """(24, 32) triangular filters as wide as the output pixels, to avoid aliasing."""
    kept = 1 - (low + high) / 100
    centers = (low / 100 + (np.arange(_SIDE) + 0.5) / _SIDE * kept) * THUMB_SIDE - 0.5
    width = THUMB_SIDE * kept / _SIDE
    weights = np.maximum(0, 1 - abs(np.arange(THUMB_SIDE) - centers[:, None]) / max(1.0, width))
    return np.asarray(weights / weights.sum(1, keepdims=True))


def _whole_views(structure: Floats) -> tuple[Floats, Floats]:
    """(N, 24, 24) uncropped structures with mean 0 and norm 1, and their mirror images."""
    uncut = _cut_tables()[0][0, 0]
    view = uncut @ structure @ uncut.T
    unit = _unit(view.reshape(len(view), -1)).reshape(view.shape)
    return unit, np.ascontiguousarray(unit[:, :, ::-1])


def _unit(values: Floats) -> Floats:
    centered = values - values.mean(-1, keepdims=True)
    length = np.sqrt(np.einsum("...i,...i->...", centered, centered))
    return np.asarray(centered / np.maximum(length, 1e-3)[..., None], np.float32)


def _bell(sigma: float, distance: NDArray[np.float64]) -> NDArray[Any]:
    return np.asarray(np.exp(-(distance**2) / (2 * sigma**2)))


def _blur_matrix(weight: Callable[[NDArray[np.float64]], NDArray[Any]]) -> Floats:
    """(32, 32) blur along one axis with these weights by distance; edge pixels are repeated."""
    places = np.arange(-THUMB_SIDE, 2 * THUMB_SIDE)
    weights = np.asarray(weight((places - np.arange(THUMB_SIDE)[:, None]).astype(float)), np.float64)
    matrix = np.zeros((THUMB_SIDE, THUMB_SIDE))
    np.add.at(matrix.T, np.clip(places, 0, THUMB_SIDE - 1), weights.T)
    return np.asarray(matrix / matrix.sum(1, keepdims=True), np.float32)
