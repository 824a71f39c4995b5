"""Reading, embedding and predicting on a cluster with Ray Data.

In: the settings of a cluster, and the same embedder or predictor as on one machine. Out: the same results in the same order.
Workers read and decode images and run the network; the driver (the process the user started) writes the results to its
stores. Ray handles scheduling, retries, and lost workers and nodes: if a worker dies, another one repeats its chunk of
images.

The workers receive the network from the driver but read the images themselves, so every machine must see them under the
same path: URLs, or a shared file system.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from topwork.data.loader import FactsStore, Loaded, Loader, Visitor, default_threads, load_images
from topwork.data.samples import Entry
from topwork.data.traits import TraitStore
from topwork.errors import TopworkError, UsageError
from topwork.features.embed import Embedder
from topwork.features.engine import BATCH, Batch, Engine, OpenVINOEngine, TorchEngine, load_engine
from topwork.models.backbone import Backbone
from topwork.settings import ClusterSettings, cache_folder

CHUNK = 8 * BATCH  # images per task; whole batches, so that results are the same as on one machine
TRIES = 3
_ANSWER_SECONDS = 30


def embedder_on(
    settings: ClusterSettings, backbone: Backbone, kind: str = "auto", precision: str = "auto", device: str = "auto"
) -> Embedder:
    """The embedder of a backbone; with ``--ray`` its images are read and embedded by the workers of the cluster.

    Args:
        kind, precision, device: as for :func:`topwork.features.engine.load_engine`. With GPUs for the workers, torch
            runs the network, in f32 by default; the driver needs no GPU.
    """
    load = loader_on(settings)
    if settings.num_gpus_per_worker and kind != "openvino":
        kind, precision = "torch", "f32" if precision == "auto" else precision
    return Embedder(backbone, load_engine(backbone, kind, precision, device), load=load)


def loader_on(settings: ClusterSettings) -> Loader:
    """The function that loads images: in threads of this process, or with ``--ray`` in the workers of the cluster."""
    return load_images if settings.ray is None else Cluster(settings).load_images


class Cluster:
    """A connection to Ray, for the life of the process.

    Raises:
        UsageError: Ray is not installed, or there is no cluster at the address.
    """

    def __init__(self, settings: ClusterSettings) -> None:
        self.settings = settings
        _connect(settings.ray or "local")

    def map(self, make: Callable[[], Callable[[Any], Any]], chunks: Iterable[Any]) -> Iterator[Any]:
        """The results of ``make()(chunk)`` in the order of the chunks; each worker calls ``make`` once.

        Raises:
            TopworkError: raised by a worker, or the cluster failed.
        """
        import ray

        items = list(chunks)
        n_done = 0
        for n_tries_left in reversed(range(TRIES)):  # Ray gives up if a node dies while a worker starts on it
            if n_done == len(items):
                return
            try:
                for found in _results(self.settings, make, items[n_done:], str(Path.cwd())):
                    if isinstance(found.value, TopworkError):
                        raise found.value
                    n_done += 1
                    yield found.value
            except ray.exceptions.RayError as error:
                if not n_tries_left:
                    reason = _line_of(error, -1)  # the last one is from the worker
                    raise TopworkError(
                        f"--ray: the cluster failed: {reason}. Finished images are kept; run the command again."
                    ) from None

    def load_images(
        self,
        entries: Sequence[Entry],
        read: Callable[[Entry], bytes],
        facts: FactsStore,
        visitor: Visitor | None = None,
        n_threads: int | None = None,
        traits: TraitStore | None = None,
    ) -> Iterator[Loaded]:
        """Like :func:`topwork.data.loader.load_images`, but the features go directly to the embedder."""
        embedder = cast(Embedder | None, visitor)
        found = facts.hashes() if traits is None else [key for key in facts.hashes() if key in traits]
        known = np.array(sorted(key for key in found if embedder is None or not embedder.wants(key)), dtype="S64")
        network = None if embedder is None else _Network.of(embedder)
        n_threads = self.n_threads(n_threads)
        make = partial(_Loader, shared(known), shared(network), read, traits is not None, n_threads)
        for images, hashes, batches, seconds in self.map(make, chunks(entries)):
            if embedder is not None:
                for batch in batches:
                    embedder.keep(hashes, batch, seconds)
            for loaded in images:
                value = facts.get(loaded.content_hash) if loaded.facts == _KNOWN else loaded.facts
                reason = value if isinstance(value, str) else loaded.reason
                yield replace(loaded, facts=None if reason else value, reason=reason)

    def n_threads(self, asked: int | None) -> int:
        """Threads per worker that read and decode."""
        return asked or max(1, round(self.settings.num_cpus_per_worker))


def _rows(
    settings: ClusterSettings, make: Callable[[], Callable[[Any], Any]], chunks: Sequence[Any], folder: str
) -> Iterator[_Boxed]:
    """The results of all chunks, in their order."""
    import ray.data

    n_cpus, n_gpus = settings.num_cpus_per_worker, settings.num_gpus_per_worker
    have: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    room = have.get("CPU", 1) // n_cpus
    if n_gpus:
        room = min(room, have.get("GPU", 0) // n_gpus)
    n_workers = int(max(1, min(room, len(chunks))))  # Ray adds more if the cluster grows
    data = ray.data.from_items([{"chunk": _Boxed(chunk)} for chunk in chunks], override_num_blocks=len(chunks))
    data.context.enable_progress_bars = data.context.print_on_execution_start = False
    data.context.execution_options.preserve_order = True
    workers = data.map_batches(
        _Worker,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, initial_size=n_workers),
        fn_constructor_args=(make, folder),
        num_cpus=n_cpus,
        num_gpus=n_gpus or None,
    )
    for row in workers.iter_rows():
        yield cast(_Boxed, row["found"])


class _Holder:
    """An actor in the cluster that runs Ray Data for a ``ray://`` client, which cannot run it."""

    def __init__(self, *arguments: Any) -> None:
        self._rows = _rows(*arguments)

    def next(self) -> _Boxed | None:
        return next(self._rows, None)


def _results(*arguments: Any) -> Iterator[_Boxed]:
    """:func:`_rows`, computed here, or fetched from an actor if the cluster is reached through ``ray://``."""
    import ray
    import ray.util.client

    if not ray.util.client.ray.is_connected():  # type: ignore[no-untyped-call]
        yield from _rows(*arguments)
        return
    holder: Any = ray.remote(num_cpus=0)(_Holder).remote(*arguments)
    found: _Boxed | None
    while (found := ray.get(holder.next.remote())) is not None:
        yield found


def shared(value: Any) -> Any:
    """A value that every machine of the cluster gets once."""
    import ray

    return ray.put(value)


def chunks(items: Sequence[Any]) -> list[Sequence[Any]]:
    """Chunks of items, one per task."""
    return [items[start : start + CHUNK] for start in range(0, len(items), CHUNK)]


# ---- the connection


def _connect(address: str) -> None:
    if importlib.util.find_spec("ray") is None:
        raise UsageError("--ray: Ray is not installed (pip install 'topwork[cluster]').")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # no telemetry
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    if address != "local" and _has_token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray sends its token only if it is told to
    import ray.data

    logging.getLogger("ray").setLevel(logging.CRITICAL)
    for name in ("ray", "ray.data"):  # Ray logs to its own files; users see one progress bar
        for handler in logging.getLogger(name).handlers:
            if type(handler) is not ray.data._internal.logging.SessionFileHandler:
                handler.setLevel(logging.CRITICAL)
    if ray.is_initialized():
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL, "configure_logging": False}
    if address == "local":
        before = signal.getsignal(signal.SIGTERM)
        with _silent_stderr():  # in this thread: its processes end with the thread that started them
            ray.init("local", num_cpus=default_threads(), include_dashboard=False, **options)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray replaces the handler
        return
    _check_answers(address)
    failed: list[Exception] = []

    def join() -> None:
        try:
            ray.init(address, **options)
        except Exception as error:  # noqa: BLE001 - Ray raises what its transports raise
            failed.append(error)

    thread = threading.Thread(target=join, daemon=True)  # there is no other timeout
    with _silent_stderr():
        thread.start()
        thread.join(_ANSWER_SECONDS)
    if thread.is_alive() or failed:
        reason = _line_of(failed[0]) if failed else f"no answer within {_ANSWER_SECONDS} seconds"
        raise UsageError(f"--ray {address}: cannot be reached: {reason} (ray status shows whether a cluster runs).")


def _has_token() -> bool:
    """Whether the user has a token for a cluster, where Ray looks for one."""
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(named) or (Path.home() / ".ray" / "auth_token").is_file()


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Silences file descriptor 2: Ray's C++ part prints there at any log level."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _check_answers(address: str) -> None:
    """Checks that something listens at the address, because Ray may end the process otherwise."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_SECONDS).close()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UsageError(f"--ray {address}: cannot be reached: {reason} (is a cluster running there?)") from None


def _line_of(error: BaseException, number: int = 0) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[number].rstrip(".")


# ---- in the workers


@dataclass(frozen=True)
class _Boxed:
    """Wraps a value so that Ray Data does not change it."""

    value: Any


class _Worker:
    """Runs in each worker; returns exceptions as values, because Ray would wrap them."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]], folder: str) -> None:
        with contextlib.suppress(OSError):  # for relative paths; the folder may not exist on another machine
            os.chdir(folder)
        self._make = make
        self._work: Callable[[Any], Any] | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        found = np.empty(1, object)
        try:
            self._work = self._work or self._make()
            found[0] = _Boxed(self._work(batch["chunk"][0].value))
        except TopworkError as error:
            found[0] = _Boxed(error)
        except Exception as error:  # noqa: BLE001 - a bug becomes one line here as it does on one machine
            found[0] = _Boxed(TopworkError(f"--ray: a worker failed: {type(error).__name__}: {error}"))
        return {"found": found}


def packed(folder: Path) -> dict[str, bytes]:
    """The files directly in a folder, to send to workers."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def unpacked(files: dict[str, bytes]) -> Path:
    """Writes such a folder to the cache of this machine, where several workers may do the same."""
    digest = hashlib.sha256()
    for name, data in files.items():
        digest.update(name.encode() + hashlib.sha256(data).digest())
    folder = cache_folder() / "cluster" / digest.hexdigest()[:32]
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial_folder = Path(tempfile.mkdtemp(dir=folder.parent))
        for name, data in files.items():
            (partial_folder / name).write_bytes(data)
        try:
            partial_folder.rename(folder)
        except OSError:  # another worker was faster
            shutil.rmtree(partial_folder)
    return folder


@dataclass(frozen=True)
class _Network:
    """What a worker needs to recreate the driver's embedder."""

    backbone: Backbone
    files: dict[str, bytes]
    precision: str
    compiled: str | None

    @classmethod
    def of(cls, embedder: Embedder) -> _Network:
        engine = embedder.engine
        compiled = engine.xml.name if isinstance(engine, OpenVINOEngine) else None
        return cls(embedder.backbone, packed(embedder.backbone.folder), engine.precision, compiled)

    def load(self) -> tuple[Backbone, Engine]:
        backbone = replace(self.backbone, folder=unpacked(self.files))
        if self.compiled is not None:
            return backbone, OpenVINOEngine(backbone.folder / self.compiled, self.precision)
        return backbone, TorchEngine(backbone, self.precision)


_KNOWN = cast(Any, ("known to the driver",))  # a placeholder; compared by value, since it is serialized


class _Known:
    """Replaces the stores of a worker: what the driver already has, and new results."""

    def __init__(self, hashes: NDArray[np.bytes_]) -> None:
        self._hashes = hashes
        self.new: list[str] = []
        self.features: list[Batch] = []

    def __contains__(self, content_hash: str) -> bool:
        key = np.bytes_(content_hash)
        place = int(np.searchsorted(self._hashes, key))
        return place < len(self._hashes) and bool(self._hashes[place] == key)

    def get(self, content_hash: str) -> Any:
        return _KNOWN if content_hash in self else None

    def check_writable(self) -> None:
        """Does nothing: the driver writes."""

    def put(self, hashes: Sequence[str], features: Batch) -> None:
        self.new += hashes
        self.features.append(features)


# the results of one chunk: images, then hashes, features and seconds of the engine instead of pixels
_Part = tuple[list[Loaded], list[str], list[Batch], float]


class _Loader:
    """Reads, checks and embeds chunks of entries."""

    def __init__(
        self, known: Any, network: Any, read: Callable[[Entry], bytes], wants_traits: bool, n_threads: int
    ) -> None:
        import ray

        self._known, shipped = ray.get([known, network])
        self._network = None if shipped is None else shipped.load()
        self._read, self._wants_traits, self._n_threads = read, wants_traits, n_threads

    def __call__(self, entries: Sequence[Entry]) -> _Part:
        store: Any = _Known(self._known)
        embedder = None if self._network is None else Embedder(self._network[0], self._network[1], store)
        loaded: list[Loaded] = []
        traits = store if self._wants_traits else None
        for one in load_images(entries, self._read, store, embedder, self._n_threads, traits):
            if embedder is not None and one.pixels is not None:
                embedder.take(one.content_hash, one.pixels)
            loaded.append(replace(one, pixels=None))
        if embedder is None:
            return loaded, [], [], 0.0
        embedder.flush()
        return loaded, store.new, store.features, embedder.engine_seconds
