"""Options, points and results of ``memplus bench memory``; needs no torch."""

from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import ConfigError
from weights.checkpoints.dtype_names import FLOAT_DTYPES, TABLE_DTYPES

TIERS = ("device", "disk", "mmap")
SKEWS = ("recorded", "zipf", "uniform")
_DTYPES = ("bfloat16", *(name for name in TABLE_DTYPES if name not in FLOAT_DTYPES))


@dataclass(frozen=True)
class MemoryLoad:
    """Tables, tiers and workloads of the sweep; every field becomes an option.

    Raises:
        ConfigError: a value is out of range.
    """

    rows: tuple[int, ...] = field(
        default=(2**12, 2**14, 2**16, 2**18, 2**20),
        metadata={"help": "rows of each table, squares of powers of two"},
    )
    tiers: tuple[str, ...] = field(
        default=("device", "disk"),
        metadata={
            "help": "where the rows are stored; mmap reads a mapped file by page faults",
            "choices": TIERS,
        },
    )
    row_dtypes: tuple[str, ...] = field(
        default=("bfloat16",), metadata={"help": "dtypes of the stored rows", "choices": _DTYPES}
    )
    batches: tuple[int, ...] = field(
        default=(1, 8), metadata={"help": "batch sizes of the decode points"}
    )
    prompt_lens: tuple[int, ...] = field(
        default=(), metadata={"help": "prompt lengths of additional prefill points, in tokens"}
    )
    skews: tuple[str, ...] = field(
        default=("recorded",), metadata={"help": "access patterns of the rows", "choices": SKEWS}
    )
    cache_share: float = field(
        default=0.1, metadata={"help": "row cache of the disk tier, as a fraction of the table"}
    )
    cold: bool = field(
        default=False,
        metadata={"help": "start disk tier rounds with no rows in memory; mmap always does"},
    )
    lookahead: int = field(
        default=0, metadata={"help": "layers ahead to prefetch predicted rows (0 disables it)"}
    )
    recall: float = field(
        default=0.5, metadata={"help": "fraction of the rows read that the predictions contain"}
    )
    candidates: float = field(
        default=1.0, metadata={"help": "predicted rows, as a fraction of the rows read"}
    )
    output_len: int = field(default=32, metadata={"help": "decode steps per round"})
    rounds: int = field(default=5, metadata={"help": "rounds per point; the median is reported"})

    def __post_init__(self) -> None:
        for rows in self.rows:
            bits = rows.bit_length() - 1
            if rows != 1 << bits or bits % 2 or not 10 <= bits <= 24:
                raise ConfigError(f"rows: {rows} is not an even power of two from 2^10 to 2^24")
        for name in ("batches", "prompt_lens", "output_len", "rounds"):
            value = getattr(self, name)
            if min(value if isinstance(value, tuple) else (value,), default=1) < 1:
                raise ConfigError(f"{name}: must be at least 1, not {value}")
        if not 0 < self.cache_share <= 1:
            raise ConfigError(f"cache_share: {self.cache_share} is outside (0, 1]")
        if not 0 < self.candidates <= 8:
            raise ConfigError(f"candidates: {self.candidates} is outside (0, 8]")
        if "disk" not in self.tiers and (self.cold or self.lookahead):
            name = "cold" if self.cold else "lookahead"
            raise ConfigError(f"{name}: needs the disk tier in tiers")
        if not 0 <= self.recall <= min(1, self.candidates):
            limit = min(1, self.candidates)
            raise ConfigError(f"recall: {self.recall} is outside [0, {limit}]")
        if self.lookahead < 0:
            raise ConfigError(f"lookahead: must be 0 or more, not {self.lookahead}")


@dataclass(frozen=True)
class Point:
    """One measured configuration.

    Attributes:
        rows: number of table rows.
        tier: where the rows are stored.
        dtype: dtype of the stored rows.
        batch: sequences that decode together; 1 for prefill.
        skew: access pattern of the rows.
        cache_bytes: memory of the row cache; 0 without one.
        page_cache: state of the OS page cache: ``unused`` for tables in memory, ``excluded`` by
            direct reads, ``dropped`` before each round of a mapped file.
        is_cold: whether a round starts with no rows in memory.
        lookahead: layers between a prediction and its lookup; 0 without prediction.
        candidates: predicted rows per lookup, as a fraction of the rows it reads.
        recall: fraction of the rows read that are predicted.
        prompt_len: prompt tokens of a prefill point; 0 for decode.
    """

    rows: int
    tier: str
    dtype: str
    batch: int
    skew: str
    cache_bytes: int
    page_cache: str
    is_cold: bool
    lookahead: int
    candidates: float | None
    recall: float | None
    prompt_len: int = 0


@dataclass(frozen=True)
class Round:
    """Measurements of one round of a point; None if not measured.

    Attributes:
        tokens_per_s: tokens per second of the timed steps.
        seconds: duration of the timed steps.
        hit_rate: fraction of the unique rows that were in memory.
        late_rate: fraction of the unique rows that were still in flight.
        misses_per_token: rows per token that were neither in memory nor in flight.
        reads_per_token: rows per token that were read from disk, prefetches included.
        stall_s: seconds of the timed steps spent waiting for rows.
        limit_reads_per_s: random reads of a row's size per second that the disk allows, measured
            after the round.
    """

    tokens_per_s: float
    seconds: float
    hit_rate: float | None
    late_rate: float | None = None
    misses_per_token: float | None = None
    reads_per_token: float | None = None
    stall_s: float | None = None
    limit_reads_per_s: float | None = None


def default_trace() -> Path:
    """The committed access trace of the benchmark model."""
    return Path(__file__).parent / "smollm2_memory.npz"
