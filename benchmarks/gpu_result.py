"""What ``memplus bench gpu`` finds: a line of its table each, an object of its JSON file."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GpuResult:
    """How long lookups of one memory layer take.

    Attributes:
        op: ``topk`` of scores, or ``gather``, whose rows and weights are there.
        tier: ``device``; ``host``, read where it is; ``cached``, the host tier.
        us: of one layer, for all tokens.
        gb_per_s: of the rows that the tokens read, repeats included; of a topk, of the scores.
        limit_gb_per_s: of a copy: what the device reads and writes, or what the host sends it.
        device: the GPU's name.
        replays: of which ``us`` is the median.
        cache_bytes: of the cache, what is known of its rows and rows beside it included.
        hit_rate: of the cache, of distinct rows of each part of a lookup.
    """

    op: str
    tier: str
    backend: str
    skew: str
    tokens: int
    rows: int
    width: int
    dtype: str
    us: float
    gb_per_s: float
    limit_gb_per_s: float
    device: str
    replays: int
    cache_bytes: int | None = None
    hit_rate: float | None = None
