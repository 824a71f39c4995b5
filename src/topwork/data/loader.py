"""Reads, hashes, decodes and resizes many images at once, in order, with bounded memory.

In: a Listing and, optionally, a visitor that wants input-sized pixels (the embedder). Out: one :class:`Loaded` for each
entry, in the order of the entries. Known content hashes are not processed again.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from topwork.data.dicom import NO_DICOM
from topwork.data.images import DECODER_VERSION, NO_HEIC, OUT_OF_MEMORY, ImageFacts, decode
from topwork.data.samples import Entry
from topwork.data.shards import append_shard, check_writable, read_shards
from topwork.data.traits import VIEW, Traits, TraitStore, traits_of
from topwork.data.transforms import InputSpec, Pixels, fit_to_input
from topwork.errors import ImageError

CHECK_SIDE = 64  # minimum side for checks, which decode to the last row anyway
_FACTS_PER_SHARD = 5000


class Visitor(Protocol):
    """Receives the pixels of images while they are decoded."""

    spec: InputSpec

    def wants(self, content_hash: str) -> bool:
        """Whether the visitor needs these contents; called from several threads."""

    def take(self, content_hash: str, pixels: Pixels) -> None:
        """Receives uint8 (height, width, 3); called from one thread, in order."""


@dataclass(frozen=True)
class Loaded:
    """One entry after reading: facts or the reason for rejecting it, pixels if the visitor wants them, traits if new."""

    entry: Entry
    content_hash: str
    n_bytes: int = 0
    facts: ImageFacts | None = None
    reason: str | None = None
    pixels: Pixels | None = None
    traits: Traits | None = None


Loader = Callable[..., Iterator[Loaded]]  # with the arguments of load_images


class FactsStore:
    """Facts about image contents, or the reason for rejection, by content hash."""

    def __init__(self, cache: Path) -> None:
        self.folder = cache / f"facts-{DECODER_VERSION}"
        self._known: dict[str, ImageFacts | str] = {}
        self._new: list[str] = []
        names = [item.name for item in fields(ImageFacts)]
        alike: dict[ImageFacts, ImageFacts] = {}  # most images share their size and format with others
        for _, table in read_shards(self.folder, ["content_hash", "reason", *names]):
            for row in table.to_pylist():
                key, reason = row.pop("content_hash"), row.pop("reason")
                if reason is None:
                    found = ImageFacts(**row)
                    self._known[key] = alike.setdefault(found, found)
                else:
                    self._known[key] = reason

    def get(self, content_hash: str) -> ImageFacts | str | None:
        """Facts, the reason for rejection, or None if the content is new."""
        return self._known.get(content_hash)

    def hashes(self) -> Iterator[str]:
        """The contents that are known."""
        return iter(self._known)

    def put(self, content_hash: str, value: ImageFacts | str) -> None:
        """Adds facts or a reason; written periodically, and by ``flush``."""
        if content_hash not in self._known:
            if not self._new:
                check_writable(self.folder)
            self._known[content_hash] = value
            self._new.append(content_hash)
            if len(self._new) >= _FACTS_PER_SHARD:
                self.flush()

    def flush(self) -> None:
        """Writes new entries as one shard."""
        if self._new:
            rows = [self._row(key) for key in self._new]
            append_shard(self.folder, pa.Table.from_pylist(rows, schema=_facts_schema()))
            self._new = []

    def _row(self, key: str) -> dict[str, Any]:
        value = self._known[key]
        if isinstance(value, str):
            return {"content_hash": key, "reason": value}
        # dataclasses.asdict copies deeply, which takes ten times as long.
        return {"content_hash": key, "reason": None} | {item.name: getattr(value, item.name) for item in fields(value)}


def load_images(
    entries: Sequence[Entry],
    read: Callable[[Entry], bytes],
    facts: FactsStore,
    visitor: Visitor | None = None,
    n_threads: int | None = None,
    traits: TraitStore | None = None,
) -> Iterator[Loaded]:
    """Yields one Loaded for each entry, in order; a bad image is a Loaded with a reason, never an exception."""
    return in_order(lambda entry: _load(entry, read, facts, visitor, traits), entries, n_threads)


def in_order(
    work: Callable[[Any], Any], items: Sequence[Any], n_threads: int | None = None, ahead: int | None = None
) -> Generator[Any]:
    """Runs ``work`` over items on threads and yields the results in order, a bounded number ahead."""
    n_threads = n_threads or default_threads()
    ahead = ahead or 16 + 8 * n_threads
    with ThreadPoolExecutor(n_threads, thread_name_prefix="decode") as pool:
        pending: deque[Future[Any]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(work, item))
                if len(pending) >= ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def default_threads() -> int:
    """One thread per usable core (a container may have fewer than the machine)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _load(
    entry: Entry,
    read: Callable[[Entry], bytes],
    facts: FactsStore,
    visitor: Visitor | None,
    traits: TraitStore | None,
) -> Loaded:
    content_hash, n_bytes = "", 0
    try:
        data = read(entry)
        content_hash, n_bytes = hashlib.sha256(data).hexdigest(), len(data)
        known = facts.get(content_hash)
        if isinstance(known, str):
            raise ImageError(known)
        spec = visitor.spec if visitor is not None and visitor.wants(content_hash) else None
        is_described = traits is None or content_hash in traits
        if known is not None and spec is None and is_described:
            return Loaded(entry, content_hash, n_bytes, known)
        # The visitor's size alone decides, so that its pixels are those that prediction would see.
        min_side = spec.min_side if spec else CHECK_SIDE if is_described else VIEW.min_side
        decoded = decode(data, min_side=min_side)
        pixels = fit_to_input(decoded.pixels, spec) if spec else None
        found = None if is_described else traits_of(data, _standard_view(decoded.pixels, pixels, spec))
    except ImageError as error:
        passing = str(error) in (OUT_OF_MEMORY, NO_HEIC, NO_DICOM)  # without a hash the reason is not remembered
        return Loaded(entry, "" if passing else content_hash, n_bytes, reason=str(error))
    except MemoryError:
        return Loaded(entry, "", n_bytes, reason=OUT_OF_MEMORY)
    return Loaded(entry, content_hash, n_bytes, decoded.facts, pixels=pixels, traits=found)


def _standard_view(decoded: Pixels, pixels: Pixels | None, spec: InputSpec | None) -> Pixels:
    """The view that traits are taken from; usually the one that was made for the network anyway."""
    names = ("height", "width", "fit", "interpolation")
    is_same = all(getattr(spec, name, None) == getattr(VIEW, name) for name in names)
    return pixels if is_same and pixels is not None else fit_to_input(decoded, VIEW)


def _facts_schema() -> pa.Schema:
    types = {"int": pa.int64(), "bool": pa.bool_(), "str": pa.string()}
    columns = [("content_hash", pa.string()), ("reason", pa.string())]
    return pa.schema(columns + [(item.name, types[str(item.type)]) for item in fields(ImageFacts)])
