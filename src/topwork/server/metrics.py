"""Metrics of the server, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

disable_created_metrics()  # type: ignore[no-untyped-call]


class Measures:
    """Counters and gauges of one server.

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
