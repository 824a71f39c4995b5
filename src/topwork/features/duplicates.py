"""Near duplicates: resized, recompressed, slightly cropped, flipped or brightened copies of an image.

In: a manifest and its features. Out: :class:`NearDuplicates`, pairs of rows that belong on one side of any split.

Features are similar for copies, but also for two photos of similar objects, so they only propose pairs (cosine in
blocks, bounded memory). The pixels decide (features/image_similarity.py). Both thresholds are calibrated on copies made
from the user's own images.

Not found: 90-degree rotations, crops of more than 12% per side, drawings over the image. Successive video frames are
near duplicates only if the camera stood still; for those, and for the same subject photographed twice, use
``--group-by``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from topwork.data.augment import stream
from topwork.data.images import decode
from topwork.data.loader import in_order
from topwork.data.manifest import Manifest
from topwork.data.shards import room_for
from topwork.data.traits import TRAITS_VERSION, VIEW, traits_of
from topwork.data.transforms import Pixels, fit_to_input, resize
from topwork.features.embed import Embedder, Features
from topwork.features.engine import fingerprint
from topwork.features.image_similarity import (
    HIGHEST_SIMILARITY,
    coarse_similarity,
    fine_structure,
    finer_similarity,
    rough_similarity,
    structure_similarity,
)
from topwork.files import atomic_file
from topwork.settings import cache_folder

Floats = NDArray[np.float32]
Thumbs = NDArray[np.uint8]

VERSION = 9  # increase it if the results may change
N_COPIED = 24  # images to make copies of
LOWEST_SIMILARITY = 0.94  # lower limit of the threshold; different photos are below
_STRICTEST = 0.995  # only copies of the same picture are this similar
_LOST_COPIES = 0.01  # share of the copies that each threshold may miss
_MARGIN = 0.02
_N_DIMENSIONS = 256
_REDUCED_FROM = 4096  # images; below, all dimensions are fast enough
_N_NEIGHBORS = 8
_PROPOSALS = 4  # pairs per image, the closest first, whose pixels are compared
_PROPOSALS_OF_MANY = 1  # beyond _EXACT_UP_TO images: comparing takes 0.15 ms a pair on two cores
_BLOCK = 2048
_COMPARED = 1 << 14  # pairs whose pixels are in memory: 130 MB
_EXACT_UP_TO = 50_000  # images: 40 s on two cores
_N_CELLS_SEARCHED = 16
_CENTER_FROM = 50  # with fewer images, their mean is not representative
_ROUGHLY_ALIKE = 0.5  # copies cropped by 8% per side have at least 0.55, three quarters of other close pairs less


class Pair(NamedTuple):
    """Two rows, the smaller first; ``similarity`` is the correlation of their structure, 1 for the same picture."""

    a: int
    b: int
    similarity: float


@dataclass(frozen=True)
class NearDuplicates:
    """Pairs of rows that show the same picture, without identical files.

    Attributes:
        least_similarity: pairs below are different pictures.
        recall: share of the copies made for calibration that these thresholds find.
    """

    pairs: tuple[Pair, ...]
    least_cosine: float
    least_similarity: float
    recall: float | None
    n_copies: int


@dataclass(frozen=True)
class Calibration:
    """Cosine and similarity of copies with their originals, one entry per copy."""

    cosines: Floats
    similarities: Floats


def near_duplicates(manifest: Manifest, features: Features, embedder: Embedder) -> NearDuplicates:
    """Finds the pairs; results for the same images come from the cache.

    Args:
        features: of the manifest's samples.
        embedder: the engine that computed them; also embeds the copies.
    """
    path = _cache_path(manifest, embedder)
    known = _read_cache(path, manifest)
    if known is not None:
        return known
    # Sorted by content, so that another layout of the same images gives bit-identical sums.
    rows = np.array(list({s.content_hash: row for row, s in enumerate(manifest.samples)}.values()))
    rows = rows[np.argsort([manifest.samples[row].content_hash for row in rows])]
    labels = [manifest.samples[row].label for row in rows]
    thumbs = manifest.traits(rows.tolist()).thumbs
    space = FeatureSpace.of(features.block("last", rows))
    found = search(space, thumbs, labels, calibrate(manifest, rows, space, thumbs, embedder))
    result = replace(found, pairs=tuple(sorted(_pair(int(rows[a]), int(rows[b]), s) for a, b, s in found.pairs)))
    _write_cache(path, manifest, result)
    return result


# ---- features propose


@dataclass(frozen=True, eq=False)
class FeatureSpace:
    """Unit vectors of N images around their mean, in their main directions.

    Attributes:
        points: (N, d) float32 unit vectors.
        mean, axes: (D,) and (D, d): map features to points.
    """

    points: Floats
    mean: Floats
    axes: Floats

    @classmethod
    def of(cls, features: NDArray[np.float16]) -> FeatureSpace:
        """The space of (N, D) features."""
        n, width = features.shape
        some = features[:: max(1, n // 2500)].astype(np.float32)
        mean = some.mean(0) if n >= _CENTER_FROM else np.zeros(width, np.float32)
        axes = np.eye(width, dtype=np.float32)
        if width > _N_DIMENSIONS and n > _REDUCED_FROM:
            axes = _main_axes(some - mean)
        empty = cls(np.empty((0, axes.shape[1]), np.float32), mean, axes)
        points = room_for((n, axes.shape[1]), np.float32)
        for start in range(0, n, _BLOCK):
            points[start : start + _BLOCK] = empty.place(features[start : start + _BLOCK])
        return cls(points, mean, axes)

    def place(self, features: NDArray[np.float16]) -> Floats:
        """Unit vectors of other features."""
        points = (features.astype(np.float32) - self.mean) @ self.axes
        return np.asarray(points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-6), np.float32)


def _main_axes(centered: Floats) -> Floats:
    """(D, 256) orthogonal axes that hold most of the variance: one round of subspace iteration, no (D, D) eigenvalues."""
    axes = np.random.default_rng(0).standard_normal((centered.shape[1], _N_DIMENSIONS)).astype(np.float32)
    axes, _ = np.linalg.qr(centered.T @ (centered @ axes))
    return np.ascontiguousarray(axes)


def close_pairs(points: Floats, least_cosine: float) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(M, 2) rows, the smaller first, and (M,) cosines of the closest pairs.

    Each row proposes at most its ``_N_NEIGHBORS`` closest per block, so M and the memory are linear in the number of
    rows. The time is quadratic; above ``_EXACT_UP_TO`` rows faiss, if installed, searches only the cells around each
    row (docs/decisions/0101-near-duplicates-at-scale.md).
    """
    if len(points) > _EXACT_UP_TO and importlib.util.find_spec("faiss") is not None:
        return _pairs_in_cells(points, least_cosine)
    found: list[NDArray[np.int64]] = []
    cosines: list[NDArray[np.float32]] = []
    for start in range(0, len(points), _BLOCK):
        left = points[start : start + _BLOCK]
        for other in range(start, len(points), _BLOCK):
            right = points[other : other + _BLOCK]
            cosine = left @ right.T
            if other == start:
                cosine[np.tril_indices(len(left))] = -1
            rows, columns = np.nonzero(cosine >= least_cosine)
            if len(rows) > _N_NEIGHBORS * len(left):
                rows, columns = _closest(cosine, least_cosine)
            found.append(np.stack([rows + start, columns + other], 1))
            cosines.append(cosine[rows, columns])
    if not found:
        return np.empty((0, 2), np.int64), np.empty(0, np.float32)
    return np.concatenate(found), np.concatenate(cosines)


def _pairs_in_cells(points: Floats, least_cosine: float) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """:func:`close_pairs` with an inverted file index of faiss: 98 to 99% of the pairs in a fraction of the time."""
    import faiss

    n_cells = int(2 * len(points) ** 0.5)
    index: Any = faiss.index_factory(points.shape[1], f"IVF{n_cells},SQfp16", faiss.METRIC_INNER_PRODUCT)
    index.train(points[:: max(1, len(points) // (40 * n_cells))])
    for start in range(0, len(points), _EXACT_UP_TO):
        index.add(points[start : start + _EXACT_UP_TO])
    index.nprobe = _N_CELLS_SEARCHED
    keys, found = [], []
    for start in range(0, len(points), _BLOCK):
        cosines, near = index.search(points[start : start + _BLOCK], _N_NEIGHBORS + 1)
        rows, places = np.nonzero(cosines >= least_cosine)
        a, b = rows + start, near[rows, places]
        keys.append(np.minimum(a, b) * len(points) + np.maximum(a, b))
        found.append(cosines[rows, places])
    pairs, first = np.unique(np.concatenate(keys), return_index=True)
    pairs, cosines = np.stack(np.divmod(pairs, len(points)), 1), np.concatenate(found)[first]
    others = pairs[:, 0] != pairs[:, 1]  # every row is its own nearest neighbor
    return pairs[others], cosines[others]


def _closest(cosine: Floats, least_cosine: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns of the closest few of each row."""
    n_kept = min(_N_NEIGHBORS, cosine.shape[1])
    near = np.argpartition(-cosine, n_kept - 1, axis=1)[:, :n_kept]
    rows, places = np.nonzero(np.take_along_axis(cosine, near, 1) >= least_cosine)
    return rows, near[rows, places]


# ---- pixels decide


def search(space: FeatureSpace, thumbs: Thumbs, labels: Sequence[str], calibration: Calibration) -> NearDuplicates:
    """Pairs of rows of a feature space and of (N, 32, 32) thumbs that show the same picture."""
    least_cosine = _low_quantile(calibration.cosines, 0.7, 0.2, 0.95)
    least = _low_quantile(calibration.similarities, 0.95, LOWEST_SIMILARITY, HIGHEST_SIMILARITY)
    pairs, cosines = close_pairs(space.points, least_cosine)
    n_each = _PROPOSALS if len(space.points) <= _EXACT_UP_TO else _PROPOSALS_OF_MANY
    pairs = pairs[np.argsort(-cosines, kind="stable")[: n_each * len(space.points)]]
    pairs = pairs[rough_similarity(thumbs, pairs) >= _ROUGHLY_ALIKE]
    pairs = pairs[np.lexsort(pairs.T[::-1])]  # pairs of one image are compared together
    scores, starts = (
        np.concatenate(found)
        for found in zip(*(coarse_similarity(*one) for one in _compared(thumbs, pairs)), strict=True)
    )
    least = _with_labels(pairs, scores[:, 0], labels, least)  # the finer search can only increase the similarity
    similarities = np.concatenate(
        [
            finer_similarity(*one, scores[start:][: len(one[1])], starts[start:][: len(one[1])], least)
            for start, one in zip(range(0, max(1, len(pairs)), _COMPARED), _compared(thumbs, pairs), strict=True)
        ]
    )
    pairs, similarities = pairs[similarities >= least], similarities[similarities >= least]
    least = _with_labels(pairs, similarities, labels, least)
    while least < _STRICTEST and _largest(pairs[similarities >= least], len(labels)) > max(10, len(labels) // 5):
        least = min(_STRICTEST, least + 0.005)  # implausibly many copies of one picture: all images look alike
    found = tuple(_pair(int(a), int(b), float(s)) for (a, b), s in zip(pairs, similarities, strict=True) if s >= least)
    hit = (calibration.cosines >= least_cosine) & (calibration.similarities >= least)
    return NearDuplicates(found, least_cosine, least, float(hit.mean()) if len(hit) else None, len(hit))


def _compared(thumbs: Thumbs, pairs: NDArray[np.int64]) -> Iterator[tuple[Floats, NDArray[np.int64]]]:
    """The structures of some pairs at a time, and the positions of the pairs among them; at least one block."""
    for start in range(0, max(1, len(pairs)), _COMPARED):
        some = pairs[start : start + _COMPARED]
        rows, places = np.unique(some, return_inverse=True)
        yield fine_structure(thumbs[rows]), places.reshape(some.shape)


def _with_labels(pairs: NDArray[np.int64], similarities: Floats, labels: Sequence[str], least: float) -> float:
    """A stricter threshold if pictures of different classes look the same (solar cells, X-rays).

    Copies rarely have different labels, so pairs across classes are mostly different pictures.
    """
    number = np.unique(np.array(labels, dtype=str), return_inverse=True)[1]
    across = np.sort(similarities[number[pairs[:, 0]] != number[pairs[:, 1]]])[::-1]
    n_allowed = max(5, len(labels) // 500)
    if len(across) <= n_allowed or across[n_allowed] < least:
        return least
    return min(float(across[n_allowed]) + 1e-4, max(least, _STRICTEST))


def _largest(pairs: NDArray[np.int64], n: int) -> int:
    """Images in the largest group of connected pairs."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(pairs), np.int8), tuple(pairs.T)), shape=(n, n))
    return int(np.bincount(connected_components(graph, directed=False)[1], minlength=1).max())


def _low_quantile(values: Floats, otherwise: float, low: float, high: float) -> float:
    if not len(values):
        return otherwise
    return float(np.clip(np.quantile(values, _LOST_COPIES) - _MARGIN, low, high))


# ---- copies


def calibrate(
    manifest: Manifest, rows: NDArray[np.int64], space: FeatureSpace, thumbs: Thumbs, embedder: Embedder
) -> Calibration:
    """Makes copies of some images and measures how close they are to their originals.

    Args:
        rows: manifest rows of the first points and thumbnails; copies are made of some of these images.
    """
    chosen = np.linspace(0, len(rows) - 1, min(N_COPIED, len(rows))).astype(int)  # hashes are in random order
    places = np.unique(chosen).tolist()
    images: list[Pixels] = []
    small: list[NDArray[np.uint8]] = []
    originals: list[int] = []
    for place, made in zip(
        places, in_order(lambda place: _copies(manifest, int(rows[place]), embedder), places), strict=True
    ):
        images += [pixels for pixels, _ in made]
        small += [thumb for _, thumb in made]
        originals += [place] * len(made)
    if not images:
        return Calibration(np.empty(0, np.float32), np.empty(0, np.float32))
    chunks = [embedder.engine.run(np.stack(images[start : start + 64]))["last"] for start in range(0, len(images), 64)]
    points = space.place(np.concatenate(chunks))
    cosines = (points * space.points[originals]).sum(1)
    both = fine_structure(np.concatenate([np.stack(small), thumbs[originals]]))
    pairs = np.stack([np.arange(len(small)), np.arange(len(small)) + len(small)], 1)
    return Calibration(cosines, structure_similarity(both, pairs, HIGHEST_SIMILARITY))


def _copies(manifest: Manifest, row: int, embedder: Embedder) -> list[tuple[Pixels, NDArray[np.uint8]]]:
    """Network input and thumb of each copy of one image.

    Raises:
        TopworkError: the image has changed since the scan.
    """
    decoded = decode(manifest.read_unchanged(row), min_side=VIEW.min_side).pixels
    copies = [
        decode(copy, min_side=embedder.spec.min_side).pixels
        for copy in copies_of(decoded, manifest.samples[row].content_hash)
    ]
    return [(fit_to_input(copy, embedder.spec), traits_of(b"", fit_to_input(copy, VIEW)).thumb) for copy in copies]


def copies_of(pixels: Pixels, name: str) -> list[bytes]:
    """JPEG files with the same picture: smaller, compressed, cropped, mirrored, and combinations."""
    rng = stream(0, 0, name)
    height, width = pixels.shape[:2]
    scale = rng.uniform(0.4, 0.8)
    small = resize(pixels, max(16, round(height * scale)), max(16, round(width * scale)))
    cropped = _cut(pixels, rng.uniform(0, 0.06, 4))
    both = _cut(pixels, rng.uniform(0, 0.04, 4))
    lighter = np.clip(both * np.float32(rng.uniform(0.9, 1.1)), 0, 255).astype(np.uint8)
    both = resize(lighter, max(16, round(0.7 * both.shape[0])), max(16, round(0.7 * both.shape[1])))
    mirrored = np.ascontiguousarray(pixels[:, ::-1])
    versions = [(small, 90), (pixels, int(rng.integers(40, 70))), (cropped, 90), (mirrored, 90), (both, 75)]
    return [_encode(version, quality) for version, quality in versions]


def _cut(pixels: Pixels, shares: NDArray[np.float64]) -> Pixels:
    height, width = pixels.shape[:2]
    top, bottom, left, right = shares * [height, height, width, width]
    return np.ascontiguousarray(pixels[int(top) : height - int(bottom), int(left) : width - int(right)])


def _encode(pixels: Pixels, quality: int) -> bytes:
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=quality))


# ---- the cache


def _pair(a: int, b: int, similarity: float) -> Pair:
    return Pair(min(a, b), max(a, b), round(similarity, 4))


def _cache_path(manifest: Manifest, embedder: Embedder) -> Path:
    facts = [VERSION, TRAITS_VERSION, fingerprint(embedder.backbone, embedder.engine), manifest.digest]
    name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    return cache_folder() / "neighbors" / f"{name}.json"


def _write_cache(path: Path, manifest: Manifest, found: NearDuplicates) -> None:
    """Stores pairs by content, since rows depend on the layout. Ignores a cache that cannot be written."""
    hashes = [sample.content_hash for sample in manifest.samples]
    record = asdict(found) | {"pairs": [[hashes[p.a], hashes[p.b], p.similarity] for p in found.pairs]}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as partial:
            partial.write_text(json.dumps(record))
    except OSError:
        return


def _read_cache(path: Path, manifest: Manifest) -> NearDuplicates | None:
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        row = {sample.content_hash: number for number, sample in reversed(list(enumerate(manifest.samples)))}
        pairs = sorted(_pair(row[a], row[b], s) for a, b, s in record["pairs"])
        return NearDuplicates(**(record | {"pairs": tuple(pairs)}))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def near_pairs(near: NearDuplicates | None) -> list[tuple[int, int]]:
    """Rows that show the same picture, for :func:`topwork.data.split.join_groups`."""
    return [(pair.a, pair.b) for pair in near.pairs] if near else []
