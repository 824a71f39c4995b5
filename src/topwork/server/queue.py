"""A served model: images from concurrent requests are predicted in batches.

In: contents of image files. Out: predictions, the same as from ``Predictor`` for each image. Decoding runs on threads
shared by all models; each network has one thread. While it is busy, new images form the next batch; when it is idle, it
starts immediately, or after ``WAIT_SECONDS`` if more images are being decoded. ``app.py`` limits the number of waiting
images. :class:`Measures` counts for Prometheus.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from topwork.data.transforms import Pixels
from topwork.export.predictor import Heatmaps, Loaded, Prediction, Predictor
from topwork.features.engine import BATCH
from topwork.memory import give_memory_back

WAIT_SECONDS = 0.004
disable_created_metrics()  # type: ignore[no-untyped-call]


class Measures:
    """Counters and gauges of one server, for Prometheus.

    Attributes:
        n_waiting: images accepted and not answered yet.
        n_held_bytes: of requests in memory.

    Args:
        is_ready: whether the server is ready; called for each page.
    """

    def __init__(self, is_ready: Callable[[], bool]) -> None:
        self.n_waiting = self.n_held_bytes = 0
        self._registry = here = CollectorRegistry()
        self.responses = Counter("topwork_responses", "HTTP responses by status.", ["status"], registry=here)
        self.images = Counter(
            "topwork_images", "Images answered, by model and outcome.", ["model", "outcome"], registry=here
        )
        self.request_seconds = Histogram(
            "topwork_request_seconds", "Time to answer a request for predictions.", registry=here
        )
        self.batch_images = Histogram(
            "topwork_batch_images", "Images that the network saw at once.", buckets=(1, 2, 4, 8, 16), registry=here
        )
        values = {
            "topwork_images_waiting": ("Images taken in and not answered yet.", lambda: self.n_waiting),
            "topwork_held_bytes": ("Bytes of requests in memory.", lambda: self.n_held_bytes),
            "topwork_ready": ("Whether requests for predictions are welcome.", is_ready),
        }
        for name, (text, value) in values.items():
            Gauge(name, text, registry=here).set_function(value)

    def text(self) -> bytes:
        """The page at /metrics, in Prometheus' text format."""
        return generate_latest(self._registry)


@dataclass(frozen=True, eq=False)
class _Waiting:
    loaded: Loaded
    answer: asyncio.Future[Prediction]


class ServedModel:
    """A predictor behind a queue."""

    def __init__(self, name: str, predictor: Predictor, decoders: ThreadPoolExecutor, measures: Measures) -> None:
        self.name = name
        self.predictor = predictor
        self._decoders = decoders
        self._measures = measures
        self._network = ThreadPoolExecutor(1, thread_name_prefix="network")
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue()
        self._n_decoding = 0
        self._heatmaps = Heatmaps(predictor)

    async def predict(self, images: Sequence[tuple[str, bytes | Pixels]]) -> list[Prediction]:
        """Predictions in order, errors included."""
        return list(await asyncio.gather(*(self._predict_one(name, data) for name, data in images)))

    async def explain(self, data: bytes, prediction: Prediction) -> str | None:
        """A heatmap of the best class over the image, as a data URL; None after an error."""
        if prediction.label is None:
            return None
        loop = asyncio.get_running_loop()
        picture = await loop.run_in_executor(self._network, self._heatmaps.jpeg, data, prediction.top[0][0])
        return "data:image/jpeg;base64," + base64.b64encode(picture).decode()

    async def run(self) -> None:
        """Predicts queued images until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._queue.get()]
            end = loop.time() + WAIT_SECONDS
            while len(batch) < BATCH:
                try:
                    batch.append(self._queue.get_nowait())
                except asyncio.QueueEmpty:
                    if not self._n_decoding or loop.time() >= end:
                        break
                    await asyncio.sleep(WAIT_SECONDS / 4)
            await self._answer([item for item in batch if not item.answer.done()])

    def close(self) -> None:
        """Stops the network's thread."""
        self._network.shutdown(wait=False, cancel_futures=True)

    async def _predict_one(self, name: str, data: bytes | Pixels) -> Prediction:
        loop = asyncio.get_running_loop()
        self._n_decoding += 1
        try:
            loaded = await loop.run_in_executor(self._decoders, self.predictor.load, data, name)
        finally:
            self._n_decoding -= 1
            if not self._n_decoding and len(data) > 1_000_000:
                give_memory_back()
        if loaded.pixels is None:
            return Prediction(name, "error", error=loaded.error)
        waiting = _Waiting(loaded, loop.create_future())
        self._queue.put_nowait(waiting)
        return await waiting.answer

    async def _answer(self, batch: list[_Waiting]) -> None:
        if not batch:
            return
        self._measures.batch_images.observe(len(batch))
        loop = asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(
                self._network, self.predictor.answer_loaded, [item.loaded for item in batch]
            )
        except Exception as error:  # noqa: BLE001 - report any error to the waiting requests, and run the next batch
            for item in batch:
                if not item.answer.done():
                    item.answer.set_exception(error)
            return
        for item, prediction in zip(batch, found, strict=True):
            if not item.answer.done():
                item.answer.set_result(prediction)
