"""Settings of the command and of the server, and all that is read from the environment."""

import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from engine.config import EngineConfig
from engine.errors import ConfigError
from server.thread_count import default_threads
from weights.checkpoints.dtype_names import TABLE_DTYPES
from weights.models.named_models import DEFAULT_MODEL

_CACHE = "2GiB"
_LOOKAHEAD_SHARE = 0.5
_TIERS = ("auto", "device", "host", "disk")
_MOST_THREADS = 1024
# Polls of a waiting OpenMP thread before it sleeps: about as long as waking it takes. By default
# libgomp polls for milliseconds, whole time slices that another process could use.
_SPIN_COUNT = 1000


@dataclass(frozen=True)
class ModelOptions:
    """Which model, in which precision it runs, and where its value tables lie.

    Raises:
        ConfigError: a field is out of range.
    """

    model: str = field(
        default=DEFAULT_MODEL, metadata={"help": "a known name or a checkpoint folder"}
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "precision of weights and KV cache; auto is float32 for float32 weights,"
            " else bfloat16",
            "choices": ("auto", "bfloat16", "float32"),
        },
    )
    table_tier: str = field(
        default="auto",
        metadata={
            "help": "device holds value tables in memory; disk reads rows from the model's files;"
            " auto is device where they fit, else disk; host is for GPUs",
            "choices": _TIERS,
        },
    )
    table_cache: str | None = field(
        default=None,
        metadata={
            "help": "memory for rows of the disk tier: KiB, MiB, GiB"
            f" (default: {_CACHE}, less where auto finds less)"
        },
    )
    table_dtype: str = field(
        default="auto",
        metadata={
            "help": "of value tables in memory, converted as they are loaded; auto is as stored",
            "choices": ("auto", *TABLE_DTYPES),
        },
    )
    table_lookahead: int = field(
        default=0,
        metadata={
            "help": "layers early that rows on disk are guessed, and their reading begun; 0: never"
        },
    )
    table_lookahead_share: float | None = field(
        default=None,
        metadata={
            "help": "rows that are guessed, the likeliest, as a share of those to be read"
            f" (default: {_LOOKAHEAD_SHARE})"
        },
    )
    verify_tables: bool = field(
        default=False,
        metadata={"help": "compare value tables with the checksums in their files, before serving"},
    )

    def __post_init__(self) -> None:
        if self.table_tier not in _TIERS:
            raise ConfigError(f"table_tier: {self.table_tier!r} is none of {', '.join(_TIERS)}")
        if self.table_tier == "host":
            raise ConfigError("table_tier: host needs a GPU, and this engine runs on the CPU")
        if self.table_lookahead < 0:
            raise ConfigError(f"table_lookahead: must be 0 or more, not {self.table_lookahead}")
        if self.table_lookahead and self.table_tier == "device":
            raise ConfigError("table_lookahead: is for --table-tier disk, and would be ignored")
        if self.table_lookahead_share is not None:
            if not 0 < self.table_lookahead_share <= 8:
                share = self.table_lookahead_share
                raise ConfigError(f"table_lookahead_share: {share} is outside (0, 8]")
            if not self.table_lookahead:
                message = "table_lookahead_share: is for --table-lookahead, and would be ignored"
                raise ConfigError(message)
        self._check_cache()

    def _check_cache(self) -> None:
        if self.table_cache is None:
            return
        if self.table_tier == "device":
            raise ConfigError("table_cache: is for --table-tier disk, and would be ignored")
        if not re.fullmatch(r"[0-9]{1,9}(KiB|MiB|GiB)", self.table_cache):
            raise ConfigError(
                f"table_cache: expected a number of KiB, MiB or GiB, got {self.table_cache!r}"
            )
        if not self.table_cache_bytes:
            raise ConfigError(f"table_cache: must be more than nothing, not {self.table_cache}")

    @property
    def lookahead_share(self) -> float:
        """Rows that are guessed for each that is read, where rows are guessed at all."""
        share = self.table_lookahead_share
        return _LOOKAHEAD_SHARE if share is None else share

    @property
    def table_cache_bytes(self) -> int:
        """For rows, where tables lie on disk."""
        asked = self.table_cache or _CACHE
        number, unit = int(asked[:-3]), asked[-3:]
        return number << {"KiB": 10, "MiB": 20, "GiB": 30}[unit]


@dataclass(frozen=True)
class HttpOptions:
    """Where the server listens and what it takes.

    Raises:
        ConfigError: a field is out of range.
    """

    host: str = field(default="127.0.0.1", metadata={"help": "address to listen on"})
    port: int = field(default=8000, metadata={"help": "port to listen on; 0 takes a free one"})
    served_model_name: str | None = field(
        default=None, metadata={"help": "the model's name for clients (default: from --model)"}
    )
    max_queued_requests: int = field(
        default=256, metadata={"help": "prompts that may wait beyond those that run; then 503"}
    )
    max_body_mib: int = field(default=4, metadata={"help": "largest request body, in MiB"})
    body_timeout_s: int = field(
        default=30, metadata={"help": "seconds in which a request body must have come"}
    )
    shutdown_timeout_s: int = field(
        default=10, metadata={"help": "seconds that running requests get after SIGTERM or SIGINT"}
    )
    log_interval_s: int = field(
        default=10,
        metadata={
            "help": "seconds between lines that say what is done while there is work; 0: none"
        },
    )

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ConfigError(f"port: {self.port} is outside [0, 65535]")
        for name in ("max_queued_requests", "shutdown_timeout_s", "log_interval_s"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: must be 0 or more, not {getattr(self, name)}")
        for name in ("max_body_mib", "body_timeout_s"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True)
class SupervisionOptions:
    """How the engine process is watched, and what follows when it dies.

    Raises:
        ConfigError: a field is out of range.
    """

    engine_restarts: int = field(
        default=0, metadata={"help": "how many times a dead engine process is started again"}
    )
    stall_timeout_s: float = field(
        default=4.0,
        metadata={"help": "kill the engine after this many seconds without progress"},
    )

    def __post_init__(self) -> None:
        if self.engine_restarts < 0:
            raise ConfigError(f"engine_restarts: must be 0 or more, not {self.engine_restarts}")
        # it gives a sign of life every half second
        if not 2 <= self.stall_timeout_s < math.inf:
            raise ConfigError(f"stall_timeout_s: must be at least 2, not {self.stall_timeout_s}")


@dataclass(frozen=True)
class ThreadOptions:
    """CPU threads that compute.

    Raises:
        ConfigError: a field is out of range.
    """

    threads: int | None = field(
        default=None,
        metadata={"help": "CPU threads (default: the cores that affinity and cgroup quota allow)"},
    )

    def __post_init__(self) -> None:
        if self.threads is not None and not 1 <= self.threads <= _MOST_THREADS:
            raise ConfigError(f"threads: {self.threads} is outside [1, {_MOST_THREADS}]")


@dataclass(frozen=True)
class EngineSettings:
    """What the engine process needs to build its engine."""

    model: ModelOptions
    cache_folder: Path
    engine: EngineConfig


def cache_folder() -> Path:
    """Where prepared models are kept: MEMPLUS_CACHE, or memplus in the user's cache folder."""
    chosen = os.environ.get("MEMPLUS_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "memplus"


def set_threads(options: ThreadOptions) -> str:
    """Set the number of OpenMP threads and how they wait, for this process and its children.

    OpenMP reads the environment when torch is loaded, so call this before torch is imported. The
    user's own environment variables stay as they are, but ``--threads`` overrides the number.

    Returns:
        one line for the log: how many threads, and why.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(_SPIN_COUNT)
    if options.threads is not None:
        # MKL alone would take no more threads than there are cores, and torch as many as MKL
        number = str(options.threads)
        os.environ |= {"OMP_NUM_THREADS": number, "MKL_NUM_THREADS": number, "MKL_DYNAMIC": "FALSE"}
        return f"threads: {number} (--threads)"
    for name in ("MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        if os.environ.get(name):
            return f"threads: {os.environ[name]} ({name})"
    found = default_threads(os.sched_getaffinity(0))
    os.environ["OMP_NUM_THREADS"] = str(found.count)
    return f"threads: {found.count} ({found.reason})"
