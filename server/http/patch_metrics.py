"""Prometheus metrics of row patches, by name."""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge

from engine.request import PatchStatistics, PatchSummary

_LABELS = ("patch",)


class PatchMetrics:
    """Rows, loads, reads and hits of each loaded patch.

    The engine counts by content. Names of equal patches have the same counts.
    """

    def __init__(self, registry: CollectorRegistry, prefix: str) -> None:
        def counter(name: str, text: str) -> Counter:
            return Counter(f"{prefix}patch_{name}", text, _LABELS, registry=registry)

        self._rows = Gauge(
            f"{prefix}patch_rows", "rows that it changes", _LABELS, registry=registry
        )
        self._loads = counter("loads", "times it was loaded")
        self._reads = counter("reads", "row reads by tokens that use it")
        self._hits = counter("hits", "those of rows that it changes")
        self._hashes: dict[str, str] = {}
        self._seen: dict[str, PatchStatistics] = {}

    def add(self, name: str, summary: PatchSummary) -> None:
        """Begin to count a patch that was loaded under a name."""
        self._hashes[name] = summary.content_hash
        self._rows.labels(name).set(summary.num_rows)
        self._loads.labels(name).inc()
        self._reads.labels(name)
        self._hits.labels(name)

    def remove(self, name: str) -> None:
        """Drop the metrics of a name."""
        del self._hashes[name]
        for metric in (self._rows, self._loads, self._reads, self._hits):
            metric.remove(name)

    def observe(self, patches: Sequence[PatchStatistics] | None) -> None:
        """Add what was counted since the last call; the totals of a restarted engine begin at 0.

        An empty sequence, sent when an engine has died, resets all totals; None says nothing.
        """
        if patches is None:
            return
        before, self._seen = self._seen, {one.content_hash: one for one in patches}
        for content_hash, now in self._seen.items():
            last = before.get(content_hash)
            if last is None or now.reads < last.reads or now.hits < last.hits:
                last = PatchStatistics(content_hash, 0, 0)
            for name in [n for n, one in self._hashes.items() if one == content_hash]:
                self._reads.labels(name).inc(now.reads - last.reads)
                self._hits.labels(name).inc(now.hits - last.hits)
