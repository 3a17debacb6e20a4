"""What ``memplus bench memory`` sweeps: plain data that needs no torch."""

from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import ConfigError
from weights.checkpoints.dtype_names import FLOAT_DTYPES, TABLE_DTYPES

TIERS = ("device", "disk", "mmap")
SKEWS = ("recorded", "zipf", "uniform")
_DTYPES = ("bfloat16", *(name for name in TABLE_DTYPES if name not in FLOAT_DTYPES))


@dataclass(frozen=True)
class MemoryLoad:
    """Tables and their readers; every field becomes an option.

    Raises:
        ConfigError: a value is out of its range.
    """

    rows: tuple[int, ...] = field(
        default=(2**12, 2**14, 2**16, 2**18, 2**20),
        metadata={"help": "of a table, each the square of a power of two"},
    )
    tiers: tuple[str, ...] = field(
        default=("device", "disk"),
        metadata={"help": "where the rows lie; mmap reads them by page faults", "choices": TIERS},
    )
    row_dtypes: tuple[str, ...] = field(
        default=("bfloat16",), metadata={"help": "what the rows are stored in", "choices": _DTYPES}
    )
    batches: tuple[int, ...] = field(
        default=(1, 8), metadata={"help": "sequences that decode together"}
    )
    prompt_lens: tuple[int, ...] = field(
        default=(), metadata={"help": "tokens of prompts that are computed, one at a time, as well"}
    )
    skews: tuple[str, ...] = field(
        default=("recorded",), metadata={"help": "which rows are read", "choices": SKEWS}
    )
    cache_share: float = field(
        default=0.1, metadata={"help": "memory for rows of the disk tier, as a share of the table"}
    )
    cold: bool = field(
        default=False,
        metadata={"help": "begin rounds of the disk tier with no rows in memory; mmap always does"},
    )
    lookahead: int = field(
        default=0, metadata={"help": "layers early that rows are guessed; 0: never"}
    )
    recall: float = field(
        default=0.5, metadata={"help": "share of the rows that such guesses hold, as measured"}
    )
    candidates: float = field(
        default=1.0, metadata={"help": "rows that are guessed, as a share of those that are read"}
    )
    output_len: int = field(default=32, metadata={"help": "decode steps of a round"})
    rounds: int = field(default=5, metadata={"help": "rounds of which medians are taken"})

    def __post_init__(self) -> None:
        for rows in self.rows:
            bits = rows.bit_length() - 1
            if rows != 1 << bits or bits % 2 or not 10 <= bits <= 24:
                raise ConfigError(f"rows: {rows} is no even power of two from 2^10 to 2^24")
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
            raise ConfigError(f"{name}: is for the disk tier, and would be ignored")
        if not 0 <= self.recall <= min(1, self.candidates):
            most = min(1, self.candidates)
            raise ConfigError(f"recall: {self.recall} is outside [0, {most}]")
        if self.lookahead < 0:
            raise ConfigError(f"lookahead: must be 0 or more, not {self.lookahead}")


@dataclass(frozen=True)
class Point:
    """One thing that is measured.

    Attributes:
        rows: of the table.
        tier: where they lie.
        dtype: of the rows.
        batch: sequences that decode together; 1 where a prompt is computed.
        skew: which rows are read.
        cache_bytes: memory for rows; 0 where all are in memory.
        page_cache: ``unused`` in memory, ``excluded`` by direct reads, ``dropped`` before each
            round of a mapped file.
        is_cold: whether a round begins with no rows in memory.
        lookahead: layers early that rows are guessed; 0 for never.
        candidates: rows that are guessed, as a share of those that are read.
        recall: share of the rows read that these hold.
        prompt_len: tokens of a prompt that is computed; 0 where tokens are decoded.
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
    """One turn of a point; None is what was not measured.

    Attributes:
        tokens_per_s: of the timed steps.
        seconds: that these took.
        hit_rate: unique rows that were in memory.
        late_rate: unique rows that were being fetched already.
        misses_per_token: rows that had to be fetched when they were wanted.
        reads_per_token: rows fetched, guesses included.
        stall_s: waited for rows in the timed steps.
        limit_reads_per_s: what the disk gives to reads of this size at random places, measured
            beside it.
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
    """The committed record of what the benchmark model reads."""
    return Path(__file__).parent / "smollm2_memory.npz"
