"""Places, sizes and formats of the value tables that parts tables and disk measure."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from benchmarks.gpu.recordings import SKEWS, STEPS

HBM, HOST, DISK = "hbm", "host", "disk"
DENSE = "dense"
_BATCHES = tuple(STEPS)


@dataclass(frozen=True)
class TableLayout:
    """One table and the points that are measured with it.

    Attributes:
        bits: logarithm of its number of rows.
        dtype: of the rows.
        place: ``hbm``, ``host`` or ``disk``.
        cached_share: fraction of the rows that the cache in HBM holds; 0 for the smallest cache.
        host_share: fraction of the rows of a table on disk that host memory holds.
        lookahead: layers ahead for which rows are predicted; 0 for never.
        skews: access patterns.
        batches: sequences that decode together.
        is_whole: whether steps never run as micro-batches.
    """

    bits: int
    dtype: str
    place: str
    cached_share: float = 0.0
    lookahead: int = 0
    skews: tuple[str, ...] = SKEWS
    batches: tuple[int, ...] = _BATCHES
    host_share: float = 0.0
    is_whole: bool = False

    @property
    def name(self) -> str:
        """The layout in words."""
        if self.place == HBM:
            return f"2^{self.bits} {self.dtype} {HBM}"
        cache = f"cache {self.cached_share:.0%}" if self.cached_share else "smallest cache"
        place = f"{DISK} {self.host_share:.0%} in host" if self.place == DISK else HOST
        name = f"2^{self.bits} {self.dtype} {place} {cache} lookahead {self.lookahead}"
        return f"{name} whole steps" if self.is_whole else name

    @property
    def points(self) -> list[tuple[str, int]]:
        """Skew and batch of each point."""
        return list(product(self.skews, self.batches))

    def figure(self, skew: str, batch: int) -> str:
        """Name of the figure of a point."""
        return f"{self.name} {skew} decode {batch}"

    @property
    def in_hbm(self) -> "TableLayout":
        """The same table in HBM."""
        return replace(self, place=HBM, cached_share=0.0, lookahead=0)


def disk_layouts() -> Iterator[TableLayout]:
    """The layouts of part disk: the host tier, then the disk with less and less host memory."""
    # a file of 16 GiB; the same cache in HBM, so that only the place behind it differs
    yield (host := TableLayout(22, "int8", HOST, 0.02, skews=SKEWS[:1]))
    for share in (0.3, 0.1):
        yield replace(host, place=DISK, host_share=share)
    least = replace(host, place=DISK, host_share=0.1)
    # smaller steps are never split
    yield replace(least, is_whole=True, batches=(32, 64))
    yield replace(least, lookahead=1)


def dense_figure(batch: int) -> str:
    """Name of the figure of the model without memory layers."""
    return f"{DENSE} decode {batch}"


def layouts(*, is_core: bool) -> Iterator[TableLayout]:
    """The layouts in order of worth; those of the same table follow each other."""
    if is_core:
        recorded = SKEWS[:1]
        yield TableLayout(22, "bf16", HBM, skews=recorded)
        for lookahead in (0, 1):
            yield TableLayout(22, "bf16", HOST, 0.1, lookahead, recorded)
        return
    for bits in (22, 20):
        yield TableLayout(bits, "bf16", HBM)
        yield from _in_host_memory(bits, "bf16")
    for bits in (18, 20, 22):
        # the size alone: the same format as the largest table
        yield TableLayout(bits, "int8", HOST, 0.1, skews=SKEWS[:1], batches=(1, 8))
    yield from _in_host_memory(24, "int8")


def _in_host_memory(bits: int, dtype: str) -> Iterator[TableLayout]:
    for share, lookahead in product((0.1, 0.2, 0.0), (0, 1)):
        yield TableLayout(bits, dtype, HOST, share, lookahead)
