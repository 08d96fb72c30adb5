"""Prometheus metrics of a gateway and of the node behind it.

Label values are bounded: endpoints come from a fixed table, models and workers beyond the first
hundreds are counted as `other`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MOST_VALUES = 256
OTHER = "other"
FIRST_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
BETWEEN_TOKENS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
QUEUE = (0.001, 0.01, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
DURATION = (0.005, 0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

Status = Callable[[], Mapping[str, Any]]
"""The node's own status, as `NodeState.status` gives it; an empty map where there is no node."""


class Bounded:
    """Passes on at most `limit` different values, then `other`."""

    def __init__(self, limit: int = MOST_VALUES) -> None:
        self._limit = limit
        self._known: set[str] = set()

    def __call__(self, value: str) -> str:
        """The value, or `other`."""
        if value in self._known:
            return value
        if len(self._known) >= self._limit:
            return OTHER
        self._known.add(value)
        return value


class Metrics:
    """All metrics of one gateway. Times in seconds."""

    def __init__(self, status: Status, waiting: Callable[[], int], open_requests: Callable[[], int]) -> None:
        self.registry = registry = CollectorRegistry()
        self._model, self._worker = Bounded(), Bounded()
        self._requests = Counter(
            "qmesh_requests",
            "HTTP requests, by endpoint, model and status.",
            ["endpoint", "model", "status"],
            registry=registry,
        )
        self._answers = Counter(
            "qmesh_answers",
            "Answers by the worker that finished them.",
            ["worker", "model"],
            registry=registry,
        )
        self._tokens = Counter(
            "qmesh_tokens",
            "Tokens read (prompt) and written (answer).",
            ["model", "worker", "kind"],
            registry=registry,
        )
        self._attempts = Counter(
            "qmesh_attempts", "Workers asked, the failed ones included.", ["model"], registry=registry
        )
        self._splices = Counter(
            "qmesh_splices", "Answers that went on from another worker.", ["model"], registry=registry
        )
        self._hedges = Counter(
            "qmesh_hedges",
            "Times that a second worker was asked and spoke first.",
            ["model"],
            registry=registry,
        )
        self._duration = Histogram(
            "qmesh_request_seconds",
            "From the request to the end of its answer.",
            ["endpoint", "model"],
            buckets=DURATION,
            registry=registry,
        )
        self._first = Histogram(
            "qmesh_first_token_seconds",
            "From the request to the first bytes of its answer.",
            ["model"],
            buckets=FIRST_TOKEN,
            registry=registry,
        )
        self._between = Histogram(
            "qmesh_inter_token_seconds",
            "Between two pieces of a streamed answer, usually one token each.",
            ["model"],
            buckets=BETWEEN_TOKENS,
            registry=registry,
        )
        self._queue = Histogram(
            "qmesh_queue_seconds",
            "In the worker's queue, before a slot was free.",
            ["model"],
            buckets=QUEUE,
            registry=registry,
        )
        ProcessCollector(registry=registry)
        registry.register(_Gauges(status, waiting, open_requests))

    def request(self, endpoint: str, model: str | None, status: int, seconds: float) -> None:
        """A request has been answered, in whatever way. `model` is one that exists, else None."""
        model = self._model(model) if model else ""
        self._requests.labels(endpoint, model, str(status)).inc()
        self._duration.labels(endpoint, model).observe(seconds)

    def answer(
        self,
        model: str,
        worker: str,
        *,
        prompt_tokens: int,
        answer_tokens: int,
        first_byte: float,
        queue: float | None,
        attempts: int,
        splices: int,
        hedges: int,
    ) -> None:
        """A worker has answered."""
        model, worker = self._model(model), self._worker(worker[:12])
        self._answers.labels(worker, model).inc()
        self._tokens.labels(model, worker, "prompt").inc(prompt_tokens)
        self._tokens.labels(model, worker, "answer").inc(answer_tokens)
        self._first.labels(model).observe(first_byte)
        if queue is not None:
            self._queue.labels(model).observe(queue)
        self._attempts.labels(model).inc(attempts)
        self._splices.labels(model).inc(splices)
        self._hedges.labels(model).inc(hedges)

    def between_pieces(self, model: str) -> Histogram:
        """Where the seconds between two pieces of a streamed answer are observed."""
        return self._between.labels(self._model(model))

    def exposition(self) -> bytes:
        """Everything in Prometheus's text format."""
        return generate_latest(self.registry)


class _Gauges(Collector):
    """What is read when Prometheus asks: the gateway's load, the node, its models and the machine."""

    def __init__(self, status: Status, waiting: Callable[[], int], open_requests: Callable[[], int]) -> None:
        self._status = status
        self._waiting = waiting
        self._open = open_requests

    def collect(self) -> Iterator[Metric]:
        """The metrics as they are now."""
        yield _gauge("qmesh_gateway_open_requests", "Requests being answered.", self._open())
        yield _gauge("qmesh_gateway_waiting_requests", "Requests that wait for a worker.", self._waiting())
        status = self._status()
        if not status:
            return
        yield _gauge("qmesh_node_health", "Health of the node's best model, 0 to 100.", status["health"])
        yield _gauge("qmesh_node_uptime_seconds", "Seconds since the node started.", status["uptime"])
        system = status["system"]
        for key, text in _SYSTEM_GAUGES.items():
            yield _gauge(f"qmesh_system_{key}_ratio", text, system[key])
        busy = GaugeMetricFamily("qmesh_gpu_busy_ratio", "Load of a GPU, 0 to 1.", labels=["gpu", "name"])
        for number, gpu in enumerate(system["gpus"]):
            busy.add_metric([str(number), gpu["name"]], gpu["busy"])
        yield busy
        models = status["models"]
        for key, text in _MODEL_GAUGES.items():
            family = GaugeMetricFamily(f"qmesh_model_{key}", text, labels=["model"])
            for model in models:
                family.add_metric([model["name"]], model[key])
            yield family
        state = GaugeMetricFamily(
            "qmesh_model_state", "1 for the state that the model's server is in.", labels=["model", "state"]
        )
        for model in models:
            state.add_metric([model["name"], model["state"]], 1)
        yield state


_SYSTEM_GAUGES = {
    "cpu": "Load of all cores, 0 to 1.",
    "foreign_cpu": "Load of all cores by other programs, 0 to 1.",
    "memory_available": "Memory that is available, 0 to 1.",
}
_MODEL_GAUGES = {
    "slots": "Requests that the model answers at the same time.",
    "busy": "Slots in use.",
    "queue": "Requests in the model's queue.",
    "health": "Health of the model, 0 to 100.",
    "context": "Tokens of context per slot.",
    "generation_speed": "Tokens written per second in one answer, measured.",
    "prompt_speed": "Prompt tokens read per second, measured.",
    "restarts": "Times that the model's server was restarted.",
}


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)
