"""Options, points and results of ``memplus bench memory``; needs no torch."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import ConfigError
from weights.checkpoints.dtype_names import TABLE_DTYPES

TIERS = ("device", "disk", "mmap")
SKEWS = ("recorded", "zipf", "uniform")
# row numbers for a model without memory layers, which gets drawn tables
DRAWN_SIZES = (2**12, 2**14, 2**16, 2**18, 2**20)
_MOST_SUBKEYS = 2**14
_RECALL, _CANDIDATES = 0.5, 1.0
# as many sequences as the engine of the benchmark runs at a time
MOST_SEQUENCES = 64


@dataclass(frozen=True)
class MemoryLoad:
    """Tables, tiers and workloads of the sweep; every field becomes an option.

    Raises:
        ConfigError: a value is out of range.
    """

    rows: tuple[int, ...] = field(
        default=(),
        metadata={
            "group": ("tables and workloads", "--rows 65536 1048576 --cache-shares 0.1 0.3"),
            "help": "rows of each table, squares; other numbers than the model's own get drawn rows"
            " and subkeys (default: the model's own; without memory layers"
            f" {' '.join(map(str, DRAWN_SIZES))})",
        },
    )
    tiers: tuple[str, ...] = field(
        default=("device", "disk"),
        metadata={
            "help": "place of the rows: memory, direct reads from disk with a row cache, or a"
            " memory-mapped file that page faults read",
            "choices": TIERS,
        },
    )
    row_dtypes: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "dtypes of the rows (default: as the model stores them; bfloat16 without memory"
            " layers)",
            "choices": TABLE_DTYPES,
        },
    )
    batches: tuple[int, ...] = field(
        default=(1, 8),
        metadata={"help": f"numbers of sequences that decode together, at most {MOST_SEQUENCES}"},
    )
    prompt_lens: tuple[int, ...] = field(
        default=(),
        metadata={
            "metavar": "TOKENS",
            "help": "also time prompts of these lengths (default: only decode)",
        },
    )
    skews: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "which rows are read: those of a recorded trace, rows by Zipf's law, or uniform"
            " ones (default: recorded, or zipf for a model with memory layers and no --trace)",
            "choices": SKEWS,
        },
    )
    cache_shares: tuple[float, ...] = field(
        default=(0.1,),
        metadata={
            "metavar": "FRACTION",
            "help": "sizes of the disk tier's row cache, as fractions of the table's rows",
        },
    )
    cold: bool = field(
        default=False,
        metadata={
            "help": "empty the disk tier's row cache before every round (off: other rows fill it"
            " first); the mmap tier always starts without rows in memory"
        },
    )
    lookahead: int = field(
        default=0,
        metadata={
            "metavar": "LAYERS",
            "help": "in the disk tier, prefetch predicted rows this many layers before they are"
            " read; 0: never",
        },
    )
    recall: float | None = field(
        default=None,
        metadata={
            "metavar": "FRACTION",
            "help": "with --lookahead: fraction of the rows of a lookup that its simulated"
            f" prediction contains (default: {_RECALL})",
        },
    )
    candidates: float | None = field(
        default=None,
        metadata={
            "metavar": "FRACTION",
            "help": "with --lookahead: rows predicted per lookup, right and wrong ones, as a"
            f" fraction of the rows that it reads (default: {_CANDIDATES})",
        },
    )
    output_len: int = field(
        default=32, metadata={"help": "decode steps per round, one token per sequence each"}
    )
    rounds: int = field(
        default=5, metadata={"help": "rounds per measured point; the median is reported"}
    )

    def __post_init__(self) -> None:
        for rows in self.rows:
            subkeys = math.isqrt(max(rows, 0))
            if subkeys**2 != rows or not 1 <= subkeys <= _MOST_SUBKEYS:
                raise ConfigError(f"rows: {rows} is not a square from 1 to {_MOST_SUBKEYS}^2")
        for name in ("batches", "prompt_lens", "output_len", "rounds"):
            value = getattr(self, name)
            if min(value if isinstance(value, tuple) else (value,), default=1) < 1:
                raise ConfigError(f"{name}: must be at least 1, not {value}")
        if max(self.batches) > MOST_SEQUENCES:
            raise ConfigError(f"batches: {max(self.batches)} is more than {MOST_SEQUENCES}")
        for share in self.cache_shares:
            if not 0 < share <= 1:
                raise ConfigError(f"cache_shares: {share} is outside (0, 1]")
        recall, candidates = self.prediction
        if not 0 < candidates <= 8:
            raise ConfigError(f"candidates: {candidates} is outside (0, 8]")
        if "disk" not in self.tiers and (self.cold or self.lookahead):
            name = "cold" if self.cold else "lookahead"
            raise ConfigError(f"{name}: needs the disk tier in tiers")
        if not 0 <= recall <= min(1, candidates):
            raise ConfigError(f"recall: {recall} is outside [0, {min(1, candidates)}]")
        if self.lookahead < 0:
            raise ConfigError(f"lookahead: must be 0 or more, not {self.lookahead}")
        for name in ("recall", "candidates"):
            if not self.lookahead and getattr(self, name) is not None:
                raise ConfigError(f"{name}: needs a lookahead of 1 or more; nothing is predicted")

    @property
    def prediction(self) -> tuple[float, float]:
        """Recall and candidates of a simulated prediction, as given or by default."""
        return (
            _RECALL if self.recall is None else self.recall,
            _CANDIDATES if self.candidates is None else self.candidates,
        )


@dataclass(frozen=True)
class Point:
    """One measured configuration.

    Attributes:
        rows: number of rows of each table.
        tier: where the rows are stored.
        dtype: dtype of the stored rows.
        batch: sequences that decode together; 1 for prefill.
        skew: access pattern of the rows.
        cache_bytes: memory of the row caches of all tables; 0 without one.
        page_cache: state of the OS page cache: ``unused`` for tables in memory, ``excluded`` by
            direct reads, ``dropped`` before each round of a mapped file.
        is_cold: whether a round starts with no rows in memory.
        lookahead: layers between a prediction and its lookup; 0 without prediction.
        candidates: predicted rows per lookup, as a fraction of the rows it reads.
        recall: fraction of the rows read that are predicted.
        prompt_len: prompt tokens of a prefill point; 0 for decode.
        is_own: whether the rows are the model's own; else they are drawn at random.
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
    is_own: bool = False


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
            after the round; None without io_uring.
        read_latency_s: seconds of one such read alone.
        planned_tokens_per_s: the prediction of ``memplus plan`` for the timed steps and the rows
            that they read, with limits measured after the round; None without them.
    """

    tokens_per_s: float
    seconds: float
    hit_rate: float | None
    late_rate: float | None = None
    misses_per_token: float | None = None
    reads_per_token: float | None = None
    stall_s: float | None = None
    limit_reads_per_s: float | None = None
    read_latency_s: float | None = None
    planned_tokens_per_s: float | None = None


def default_trace() -> Path:
    """The committed access trace of the benchmark model."""
    return Path(__file__).parent / "smollm2_memory.npz"
