"""What a server counts for Prometheus."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from tda_export.runtime import Metrics

Outcome = Literal["answered", "cancelled", "failed", "refused"]
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
RATES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


class ServerMetrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            "tda_export_requests",
            "Requests by how they ended; not bodies that are none",
            ["endpoint", "outcome"],
            registry=registry,
        )
        self._prompt = Counter(
            "tda_export_prompt_tokens", "Tokens of prompts that reached the model", registry=registry
        )
        self._reused = Counter(
            "tda_export_reused_prompt_tokens",
            "Tokens of prompts that were held from the prompt before",
            registry=registry,
        )
        self._generated = Counter("tda_export_generated_tokens", "Tokens generated", registry=registry)
        self._drafted = Counter("tda_export_drafted_tokens", "Tokens that lookups drafted", registry=registry)
        self._accepted = Counter(
            "tda_export_accepted_tokens", "Drafted tokens that needed no step of their own", registry=registry
        )
        self._queued = Histogram(
            "tda_export_queue_seconds", "From arrival to the start", buckets=SECONDS, registry=registry
        )
        self._first = Histogram(
            "tda_export_time_to_first_token_seconds",
            "From arrival, the queue included",
            buckets=SECONDS,
            registry=registry,
        )
        self._rate = Histogram(
            "tda_export_tokens_per_second", "Of an answer, from its second token on", buckets=RATES, registry=registry
        )
        self._read = Counter(
            "tda_export_skippable_read_bytes",
            "Weights that decode steps read of the matrices whose rows they may skip: the layers' linears with prices, "
            "the FFN with masks; what tokens skip one by one, as calibrated",
            registry=registry,
        )
        self._dense = Counter(
            "tda_export_skippable_dense_bytes",
            "Weights that they would have read of these matrices densely",
            registry=registry,
        )
        self._share = Gauge(
            "tda_export_skippable_bytes_share",
            "Share of these matrices' bytes that the last answer read",
            registry=registry,
        )

    def watch(self, waiting: Callable[[], int], running: Callable[[], int]) -> None:
        """Export how many requests are waiting and running."""
        Gauge("tda_export_queue_length", "Requests that wait", registry=self.registry).set_function(waiting)
        Gauge("tda_export_running_requests", "Requests that the model works on", registry=self.registry).set_function(
            running
        )

    def ended(self, endpoint: str, outcome: Outcome) -> None:
        """Count a request."""
        self._requests.labels(endpoint, outcome).inc()

    def started(self, queue_seconds: float) -> None:
        """Count a request's wait."""
        self._queued.observe(queue_seconds)

    def first_token(self, seconds: float) -> None:
        """Count the time from arrival to the first token."""
        self._first.observe(seconds)

    def generated(self, metrics: Metrics) -> None:
        """Count what an answer, complete or not, has cost."""
        self._prompt.inc(metrics.prompt_tokens)
        self._reused.inc(metrics.reused_tokens)
        self._generated.inc(metrics.new_tokens)
        self._drafted.inc(metrics.drafted)
        self._accepted.inc(metrics.accepted)
        decoded = metrics.decode_steps + metrics.accepted  # tokens
        self._read.inc(decoded * metrics.bytes_per_token)
        self._dense.inc(decoded * metrics.dense_bytes_per_token)
        if metrics.decode_tokens_per_second:
            self._rate.observe(metrics.decode_tokens_per_second)
            self._share.set(1.0 - metrics.sparsity)

    def page(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self.registry)
