"""One result of ``memplus bench gpu``: a line of its table, an object of its JSON file."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GpuResult:
    """Time of one operation of one memory layer.

    Attributes:
        op: ``topk`` of the scores, or ``gather`` with given rows and weights.
        tier: ``device``; ``host``: the GPU reads host memory in place; ``cached``: the host tier.
        backend: the implementation, ``triton`` or ``torch``.
        skew: the access pattern of the rows.
        us: microseconds of one layer for all tokens.
        gb_per_s: rate at which the gather reads rows (repeats count), or the topk reads scores.
        limit_gb_per_s: rate of a copy: reads plus writes on the device, or host to device.
        device: the GPU's name.
        replays: number of timed replays; ``us`` is their median.
        cache_bytes: device memory of the row cache, including its metadata and staging rows.
        hit_rate: hits per distinct row that a part of a lookup reads.
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
