"""Metrics and memory of a running server."""

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from prometheus_client.parser import text_string_to_metric_families

from tests.server.running import Running
from tests.server.test_serve import engine_of

PAGE_BYTES = 4096
# seconds for all requests to end
_IDLE_S = 120.0


class ServerState:
    """Reads a server's metrics, and the resident memory of its two processes."""

    def __init__(self, server: Running) -> None:
        self._server = server
        self._pids = {"http": server.process.pid, "engine": engine_of(server)}
        self._resident: dict[str, list[int]] = {name: [] for name in self._pids}

    def total(self, name: str) -> float:
        """The sum of a metric's samples over all labels."""
        return sum(value for _, value in self._samples(name))

    def by(self, name: str, label: str) -> dict[str, float]:
        """A metric's samples by one label."""
        return {labels[label]: value for labels, value in self._samples(name)}

    def wait_until_idle(self) -> None:
        """Wait until no request runs or waits, and the gauges were reported after that."""
        gauges = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        deadline = time.monotonic() + _IDLE_S
        while any(map(self.total, gauges)):
            assert time.monotonic() < deadline, [*map(self.total, gauges)]

    def note_memory(self) -> None:
        """Record the resident memory of both processes."""
        for name, pid in self._pids.items():
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            self._resident[name].append(pages * PAGE_BYTES)

    def memory_growth(self) -> dict[str, tuple[float, float]]:
        """Mean MiB in the first quarter of the records, and in the last one, by process."""
        return {name: _quarters(records) for name, records in self._resident.items()}

    def _samples(self, name: str) -> list[tuple[dict[str, str], float]]:
        text = self._server.http.get("/metrics").text
        return [
            (sample.labels, sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == f"memplus:{name}"
        ]


def _quarters(records: Sequence[int]) -> tuple[float, float]:
    quarter = len(records) // 4
    return fmean(records[:quarter]) / 2**20, fmean(records[-quarter:]) / 2**20
