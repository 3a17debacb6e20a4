"""Prometheus metrics, with vLLM's names and labels if the meaning is the same."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from engine.request import EngineStatistics, FinishReason
from server.http.patch_metrics import LABEL, PatchMetrics
from server.http.table_gains import TABLE_COUNTS, TABLE_LABELS, TableGains

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


class Metrics:
    """The metrics of one server, in their own registry.

    All have the label ``model_name``, by which dashboards for vLLM choose a model.
    """

    def __init__(self, model_name: str, prefix: str = "memplus:") -> None:
        self._prefix = prefix
        self._registry = CollectorRegistry()
        self._labels = {"model_name": model_name}
        self.running = self._gauge("num_requests_running", "requests in the batch")
        self.waiting = self._gauge("num_requests_waiting", "requests that wait to run")
        self.kv_usage = self._gauge("kv_cache_usage_perc", "fraction of KV blocks in use, 0 to 1")
        self.prompt_tokens = self._counter("prompt_tokens", "prompt tokens received")
        self.generation_tokens = self._counter("generation_tokens", "tokens generated")
        self.success = self._counter(
            "request_success", "ended requests, also those with errors or aborts", "finished_reason"
        )
        self.rejections = self._counter("admission_rejections", "rejected requests", "reason")
        self.first_token = self._histogram("time_to_first_token_seconds", _SECONDS)
        self.inter_token = self._histogram("inter_token_latency_seconds", _SECONDS)
        self.end_to_end = self._histogram("e2e_request_latency_seconds", _SECONDS)
        self.queue_time = self._histogram("request_queue_time_seconds", _SECONDS)
        self.prefill_time = self._histogram("request_prefill_time_seconds", _SECONDS)
        self.decode_time = self._histogram("request_decode_time_seconds", _SECONDS)
        self.request_prompt = self._histogram("request_prompt_tokens", _TOKENS)
        self.request_generation = self._histogram("request_generation_tokens", _TOKENS)
        self.prefix_queries = self._counter(
            "prefix_cache_queries", "prompt tokens looked up in the prefix cache"
        )
        self.prefix_hits = self._counter(
            "prefix_cache_hits", "prompt tokens found in the prefix cache"
        )
        self.preemptions = self._counter("num_preemptions", "requests preempted")
        self.drafts = self._counter("spec_decode_num_drafts", "steps of requests with drafts")
        self.draft_tokens = self._counter("spec_decode_num_draft_tokens", "draft tokens verified")
        self.accepted_tokens = self._counter(
            "spec_decode_num_accepted_tokens", "draft tokens accepted"
        )
        self._seen = EngineStatistics()
        self._table_gains = TableGains()
        self.tables = {
            name: self._counter(f"table_{name}", text, *TABLE_LABELS)
            for name, text in TABLE_COUNTS.items()
        }
        self.patches = PatchMetrics(self._registry, prefix)
        self.step_tokens = self._histogram("iteration_tokens_total", _TOKENS)

    def observe_step(self, statistics: EngineStatistics) -> None:
        """Update the metrics from the engine's statistics after a step."""
        self.running.set(statistics.num_running)
        self.waiting.set(statistics.num_waiting)
        total = statistics.kv_blocks_total
        self.kv_usage.set(statistics.kv_blocks_used / total if total else 0.0)
        for counter, name in (
            (self.prefix_queries, "prefix_queries"),
            (self.prefix_hits, "prefix_hits"),
            (self.preemptions, "preemptions"),
            (self.drafts, "drafts"),
            (self.draft_tokens, "draft_tokens"),
            (self.accepted_tokens, "accepted_tokens"),
        ):
            # a restarted engine counts from zero
            counter.inc(max(0, getattr(statistics, name) - getattr(self._seen, name)))
        self._seen = statistics
        for labels, gained in self._table_gains.since(statistics.tables):
            for name, counter in self.tables.items():
                counter.labels(*labels).inc(getattr(gained, name))
        self.patches.observe(statistics.patches)
        if statistics.step_tokens:
            self.step_tokens.observe(statistics.step_tokens)

    def render(self, may_see: Callable[[str], bool] = lambda patch: True) -> bytes:
        """All metrics in Prometheus' text format, except those of patches that a client may not
        see."""
        return generate_latest(_Shown(self._registry, self._labels, may_see))

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(self._prefix + name, text, registry=self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(self._prefix + name, text, labels, registry=self._registry)

    def _histogram(self, name: str, buckets: tuple[float, ...]) -> Histogram:
        text = name.replace("_", " ")
        return Histogram(self._prefix + name, text, buckets=buckets, registry=self._registry)


@dataclass(frozen=True)
class _Shown(Collector):
    """The metrics of a registry with further labels, which cost nothing while they are counted,
    and without those of patches that a client may not see."""

    registry: CollectorRegistry
    labels: dict[str, str]
    may_see: Callable[[str], bool]

    def collect(self) -> Iterator[Metric]:
        for metric in self.registry.collect():
            metric.samples = [
                sample._replace(labels=self.labels | sample.labels)
                for sample in metric.samples
                if LABEL not in sample.labels or self.may_see(sample.labels[LABEL])
            ]
            yield metric


class RequestClock:
    """Records the token counts and latencies of one prompt's answer in the metrics."""

    def __init__(self, metrics: Metrics, num_prompt_tokens: int) -> None:
        self._metrics = metrics
        self._start = self._last = time.perf_counter()
        self._first = 0.0
        self._queued_s: float | None = None  # until it has run
        self.num_tokens = 0
        metrics.prompt_tokens.inc(num_prompt_tokens)
        metrics.request_prompt.observe(num_prompt_tokens)

    def started(self, queued_s: float) -> None:
        """Record that the first output came after the prompt had waited ``queued_s`` to run."""
        self._queued_s = queued_s
        self._first = time.perf_counter()

    def tokens(self, count: int) -> None:
        """Record that ``count`` tokens have just arrived."""
        if not count:
            return
        now = time.perf_counter()
        first = not self.num_tokens
        histogram = self._metrics.first_token if first else self._metrics.inter_token
        histogram.observe(now - self._last)
        self._last = now
        self.num_tokens += count
        self._metrics.generation_tokens.inc(count)

    def finished(self, reason: FinishReason) -> None:
        """Record the end of the answer."""
        now = time.perf_counter()
        self._metrics.end_to_end.observe(now - self._start)
        if self._queued_s is not None:
            self._metrics.queue_time.observe(self._queued_s)
            self._metrics.prefill_time.observe(max(0.0, self._first - self._start - self._queued_s))
            self._metrics.decode_time.observe(now - self._first)
        self._ended(reason)

    def aborted(self) -> None:
        """Record that the answer ended early; its times say nothing about the server."""
        self._ended("abort")

    def _ended(self, reason: str) -> None:
        self._metrics.request_generation.observe(self.num_tokens)
        self._metrics.success.labels(reason).inc()
