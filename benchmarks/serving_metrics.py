"""Metrics of one load point, under the names that vLLM's benchmark client uses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median

import numpy as np

from benchmarks.completion_client import Completion
from benchmarks.serving_load import LoadPoint

_TITLES = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}
_MAX_REASONS = 10


@dataclass(frozen=True)
class Latency:
    """Summary of a non-empty distribution, in milliseconds."""

    mean: float
    median: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Latency | None":
        """Mean, median and interpolated 99th percentile; None without samples."""
        if not seconds:
            return None
        p99 = float(np.percentile(seconds, 99))
        return cls(fmean(seconds) * 1e3, median(seconds) * 1e3, p99 * 1e3)


@dataclass(frozen=True)
class ServingMetrics:
    """Measurements of one point of a sweep.

    Attributes:
        point: the load.
        duration_s: seconds from the first request to the end of the last.
        completions: results of the successful requests.
        failures: counts of the failed requests, by reason.
        client_cpu_s: CPU seconds of the client, which the server could not use.
    """

    point: LoadPoint
    duration_s: float
    completions: Sequence[Completion]
    failures: Mapping[str, int]
    client_cpu_s: float

    @property
    def failed(self) -> int:
        return sum(self.failures.values())

    @property
    def input_tokens(self) -> int:
        return sum(completion.usage.prompt_tokens for completion in self.completions)

    @property
    def output_tokens(self) -> int:
        return sum(completion.usage.generated_tokens for completion in self.completions)

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that the server reports as prefix cache hits."""
        return sum(completion.usage.cached_tokens for completion in self.completions)

    @property
    def output_throughput(self) -> float:
        """Generated tokens per second."""
        return self.output_tokens / self.duration_s

    def latencies(self) -> dict[str, Latency | None]:
        """Latencies by vLLM's abbreviations; None without samples.

        Inter-token latency is the time between events. Tokens of the same event add no sample.
        """
        samples: dict[str, list[float]] = {name: [] for name in _TITLES}
        for completion in self.completions:
            first, last = completion.token_times[0], completion.token_times[-1]
            samples["ttft"].append(first - completion.sent)
            samples["e2el"].append(last - completion.sent)
            samples["itl"] += [after - before for before, after in pairwise(completion.token_times)]
            if completion.usage.generated_tokens > 1:
                samples["tpot"].append((last - first) / (completion.usage.generated_tokens - 1))
        return {name: Latency.of(seconds) for name, seconds in samples.items()}

    def as_json(self) -> dict[str, object]:
        """A flat object with vLLM's keys and a few of our own."""
        flat: dict[str, object] = {
            "max_concurrency": self.point.concurrency,
            "request_rate": self.point.request_rate,
            "duration": self.duration_s,
            "completed": len(self.completions),
            "failed": self.failed,
            "total_input_tokens": self.input_tokens,
            "total_output_tokens": self.output_tokens,
            "request_throughput": len(self.completions) / self.duration_s,
            "output_throughput": self.output_throughput,
            "total_token_throughput": (self.input_tokens + self.output_tokens) / self.duration_s,
        }
        for name, latency in self.latencies().items():
            for part in ("mean", "median", "p99"):
                flat[f"{part}_{name}_ms"] = None if latency is None else getattr(latency, part)
        return flat | {
            "cached_prompt_tokens": self.cached_tokens,
            "client_cpu_s": self.client_cpu_s,
            "failures": dict(self.failures),
        }

    def describe(self) -> str:
        """The report in the format of vLLM's client, plus failures by reason."""
        flat = self.as_json()
        lines = [
            f"{f' Serving benchmark: {self.point.name} ':=^50}",
            _line("Successful requests:", flat["completed"]),
            _line("Failed requests:", flat["failed"]),
            _line("Benchmark duration (s):", flat["duration"]),
            _line("Total input tokens:", flat["total_input_tokens"]),
            _line("Total generated tokens:", flat["total_output_tokens"]),
            _line("Request throughput (req/s):", flat["request_throughput"]),
            _line("Output token throughput (tok/s):", flat["output_throughput"]),
            _line("Total token throughput (tok/s):", flat["total_token_throughput"]),
            _line("CPU of this client (cores):", self.client_cpu_s / self.duration_s),
        ]
        if self.cached_tokens:
            lines.append(_line("Input tokens not computed (cached):", self.cached_tokens))
        for name, title in _TITLES.items():
            lines.append(f"{title:-^50}")
            for part in ("Mean", "Median", "P99"):
                value = flat[f"{part.lower()}_{name}_ms"]
                lines.append(_line(f"{part} {name.upper()} (ms):", value))
        lines.append("=" * 50)
        reasons = sorted(self.failures.items(), key=lambda item: -item[1])
        lines += [f"failed {count} times: {reason}" for reason, count in reasons[:_MAX_REASONS]]
        return "\n".join(lines)


def _line(label: str, value: object) -> str:
    shown = f"{value:.2f}" if isinstance(value, float) else "-" if value is None else str(value)
    return f"{label:<40} {shown:<10}".rstrip()
