"""What the server counts, for Prometheus."""

from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class Metrics:
    """Names begin with `mixora_`; a registry of its own, so that several servers of a process do not mix."""

    def __init__(self, num_running: Callable[[], int], num_waiting: Callable[[], int], slots: int) -> None:
        self._registry = CollectorRegistry()
        kept = self._registry
        self.requests = Counter(
            "mixora_requests", "Requests, by path and HTTP status", ["path", "status"], registry=kept
        )
        self.vanished = Counter("mixora_vanished", "Clients that left before the end of their answer", registry=kept)
        self.tokens = Counter(
            "mixora_tokens", "Tokens read (prompt) and written (answer)", ["model", "kind"], registry=kept
        )
        self.seconds = Histogram("mixora_request_seconds", "Time of an answer", buckets=SECONDS, registry=kept)
        self.first_token = Histogram(
            "mixora_first_token_seconds", "Time to its first token", buckets=SECONDS, registry=kept
        )
        for name, text, read in (
            ("mixora_slots", "Answers that can be computed at once", lambda: slots),
            ("mixora_running", "Answers that are computed now", num_running),
            ("mixora_waiting", "Requests that wait for a slot", num_waiting),
        ):
            Gauge(name, text, registry=kept).set_function(read)

    def to_text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self._registry)
