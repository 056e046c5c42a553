"""What Prometheus is told, under vLLM's names where vLLM has one: dashboards made for it show this server as well.

Two sources. Engines are asked when somebody scrapes: counts are theirs, labelled `engine` by replica. Requests tell as
they go: one observation an answer (a request for n answers counts n times), aborted ones included.
Series of a model begin anew at 0 when another engine takes its name, as they do when a server starts again.
Left out: series by tenant, because every key opens /metrics (the log tells tenants apart); the label `engine` on what
requests tell, because a request does not know its replica.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from deepwright_core.engine import EngineStats

from .pool import Engines

if TYPE_CHECKING:
    from .record import AnswerRecord, RequestRecord

# The one form, whatever the scraper asks for: OpenMetrics' writer turns the colon in vLLM's names into an underscore.
CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

# vLLM's bounds, so that a quantile means the same here and there.
FIRST_TOKEN_SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
)  # fmt: skip
TOKEN_SECONDS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_SECONDS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))

# Names of the threads that generate, by the model's name.
Threads = Callable[[], Iterable[tuple[str, Engines]]]

# Series -> (what it is, how it is read from an engine).
GAUGES: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "vllm:num_requests_running": ("Answers being generated.", lambda stats: stats.running),
    "vllm:num_requests_waiting": ("Answers that wait.", lambda stats: stats.waiting),
    "vllm:kv_cache_usage_perc": (
        "Share of the cache's blocks that are in use (1: all).",
        lambda stats: stats.cache_blocks_used / max(stats.cache_blocks_total, 1),
    ),
}
COUNTERS: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "vllm:prompt_tokens": ("Prompt tokens of admitted answers.", lambda stats: stats.prompt_tokens),
    "vllm:generation_tokens": ("Tokens generated.", lambda stats: stats.generation_tokens),
    "vllm:prefix_cache_queries": ("Tokens looked up in the prefix cache.", lambda stats: stats.prompt_tokens),
    "vllm:prefix_cache_hits": ("Tokens found there.", lambda stats: stats.cached_prompt_tokens),
    "vllm:num_preemptions": ("Answers that lost their place and began again.", lambda stats: stats.preemptions),
    "vllm:spec_decode_num_drafts": ("Drafts of an answer that were verified.", lambda stats: stats.draft_steps),
    "vllm:spec_decode_num_draft_tokens": ("Tokens drafted.", lambda stats: stats.draft_tokens),
    "vllm:spec_decode_num_accepted_tokens": ("Drafted tokens accepted.", lambda stats: stats.accepted_tokens),
}


@dataclass(frozen=True)
class ModelMeters:
    """What the answers of one model are measured with."""

    model: str
    gap: Histogram
    first_token: Histogram
    latency: Histogram
    queue: Histogram
    prompt_tokens: Histogram
    generation_tokens: Histogram
    success: Counter

    def began(self, answer: AnswerRecord) -> None:
        """An answer has its first token."""
        if answer.first_token_seconds is not None:
            self.first_token.observe(answer.first_token_seconds)
        if answer.queue_seconds is not None:
            self.queue.observe(answer.queue_seconds)

    def finished(self, answer: AnswerRecord) -> None:
        """An answer has ended, in whatever way."""
        self.success.labels(self.model, answer.finish_reason).inc()
        self.prompt_tokens.observe(answer.prompt_tokens)
        self.generation_tokens.observe(answer.tokens)
        if answer.ended is not None:
            self.latency.observe(answer.ended - answer.submitted)


class _Engines(Collector):
    """Asks the engines when somebody scrapes."""

    def __init__(self, threads: Threads) -> None:
        self._threads = threads

    def collect(self) -> Iterator[Metric]:
        read = [
            ([name, str(number)], replica.stats)
            for name, thread in self._threads()
            for number, replica in enumerate(thread.replicas)
        ]
        labels = ["model_name", "engine"]
        for name, (text, value) in GAUGES.items():
            gauge = GaugeMetricFamily(name, text, labels=labels)
            for values, stats in read:
                gauge.add_metric(values, value(stats))
            yield gauge
        for name, (text, value) in COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=labels)
            for values, stats in read:
                counter.add_metric(values, value(stats))
            yield counter
        accepted = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Drafted tokens accepted, by their place in the draft.",
            labels=[*labels, "position"],
        )
        for values, stats in read:
            for position, count in enumerate(stats.accepted_at):
                accepted.add_metric([*values, str(position)], count)
        yield accepted


class Metrics:
    """All series of a server, in a registry of their own."""

    def __init__(self, threads: Threads) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Engines(threads))
        self._models: dict[str, ModelMeters] = {}
        self._first_token = self._of_model(
            "vllm:time_to_first_token_seconds", "From submission to the first token.", FIRST_TOKEN_SECONDS
        )
        self._gap = self._of_model("vllm:inter_token_latency_seconds", "From one token to the next.", TOKEN_SECONDS)
        self._latency = self._of_model(
            "vllm:e2e_request_latency_seconds", "From submission to the end of an answer.", REQUEST_SECONDS
        )
        self._queue = self._of_model(
            "vllm:request_queue_time_seconds", "From submission to a place in the cache.", REQUEST_SECONDS
        )
        self._prompt = self._of_model("vllm:request_prompt_tokens", "Prompt tokens of an answer.", TOKENS)
        self._generated = self._of_model("vllm:request_generation_tokens", "Tokens of an answer.", TOKENS)
        self._success = Counter(
            "vllm:request_success",
            "Answers that ended, by how: stop, length, abort (the client, a deadline), error (the engine).",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._requests = Counter(
            "deepwright:http_requests",
            "HTTP requests answered; status 499: the client went away first.",
            ["method", "path", "status"],
            registry=self.registry,
        )
        self._errors = Counter(
            "deepwright:errors",
            "Requests that were refused or broken off, by the error's code (hung_up: by the client).",
            ["code"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "deepwright:http_request_seconds",
            "From a request's head to the end of its answer.",
            ["path"],
            buckets=(0.005, 0.025, 0.1, *REQUEST_SECONDS),
            registry=self.registry,
        )
        self.in_progress = Gauge(
            "deepwright:http_requests_in_progress", "HTTP requests being answered.", registry=self.registry
        )

    def _of_model(self, name: str, text: str, bounds: Sequence[float]) -> Histogram:
        return Histogram(name, text, ["model_name"], buckets=bounds, registry=self.registry)

    def of(self, model: str) -> ModelMeters:
        """The meters of a model that is served (never of a name that a client made up)."""
        if model not in self._models:
            self._models[model] = ModelMeters(
                model,
                gap=self._gap.labels(model),
                first_token=self._first_token.labels(model),
                latency=self._latency.labels(model),
                queue=self._queue.labels(model),
                prompt_tokens=self._prompt.labels(model),
                generation_tokens=self._generated.labels(model),
                success=self._success,
            )
        return self._models[model]

    def answered(self, record: RequestRecord) -> None:
        """A request is over."""
        self._requests.labels(record.method, record.path, str(record.status)).inc()
        self._seconds.labels(record.path).observe(record.seconds)
        if record.error:
            self._errors.labels(record.error).inc()

    def expose(self) -> bytes:
        """All series as text, in the form `CONTENT_TYPE`."""
        return generate_latest(self.registry)
