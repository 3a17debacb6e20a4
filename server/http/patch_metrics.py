"""Prometheus metrics of row patches, by name."""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge

from engine.request import PatchStatistics, PatchSummary

LABEL = "patch"


class PatchMetrics:
    """Rows, reads and hits of each loaded patch, and the results of loads.

    The engine counts by content. Each name of a content counts from its own load.

    Attributes:
        loads: counts loads by their result: loaded, refused or failed.
    """

    def __init__(self, registry: CollectorRegistry, prefix: str) -> None:
        def counter(name: str, text: str, label: str) -> Counter:
            return Counter(f"{prefix}patch_{name}", text, (label,), registry=registry)

        self._rows = Gauge(
            f"{prefix}patch_rows", "rows that it changes", (LABEL,), registry=registry
        )
        self._reads = counter("reads", "row reads by tokens that use it", LABEL)
        self._hits = counter("hits", "row reads that found a row of the patch", LABEL)
        self.loads = counter("loads", "patches loaded, refused and failed to load", "result")
        self._names: dict[str, set[str]] = {}  # by content hash

    def add(self, name: str, summary: PatchSummary) -> None:
        """Begin to count a patch that was loaded under a name."""
        self._names.setdefault(summary.content_hash, set()).add(name)
        self._rows.labels(name).set(summary.num_rows)
        self._reads.labels(name)
        self._hits.labels(name)

    def remove(self, name: str, content_hash: str) -> None:
        """Drop the metrics of a name."""
        names = self._names[content_hash]
        names.remove(name)
        if not names:
            del self._names[content_hash]
        for metric in (self._rows, self._reads, self._hits):
            metric.remove(name)

    def observe(self, patches: Sequence[PatchStatistics]) -> None:
        """Add reads that the engine reports; those of patches without a name do not count."""
        for content_hash, reads, hits in patches:
            for name in self._names.get(content_hash, ()):
                self._reads.labels(name).inc(reads)
                self._hits.labels(name).inc(hits)
