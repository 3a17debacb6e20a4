"""Settings of the command line and the server; the only file that reads the environment."""

import math
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from engine.config import EngineConfig
from engine.errors import ConfigError
from server.thread_count import default_threads
from weights.checkpoints.dtype_names import TABLE_DTYPES, WEIGHT_DTYPES
from weights.models.named_models import DEFAULT_MODEL

_CACHE = "2GiB"
_LOOKAHEAD_SHARE = 0.5
_TIERS = ("auto", "device", "host", "disk")
_DTYPES = ("auto", "bfloat16", "float16", "float32")
_MOST_THREADS = 1024
# Polls of torch's waiting OpenMP threads before they sleep; they take about as long as a wake-up.
# By default libgomp polls for milliseconds, which our kernels and other processes need.
_SPIN_COUNT = 1000


@dataclass(frozen=True)
class ModelOptions:
    """The model, its device and precision, and the placement of its value tables.

    Raises:
        ConfigError: a field is out of range.
    """

    model: str = field(
        default=DEFAULT_MODEL,
        metadata={
            "group": ("model", "--model ./my-model --device cuda:1"),
            "metavar": "NAME|DIR",
            "help": "name of a known model, or a checkpoint folder",
        },
    )
    device: str = field(
        default="auto",
        metadata={
            "metavar": "auto|cpu|cuda[:N]",
            "help": "device that computes; auto: a GPU if one is usable, else the CPU",
        },
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "precision of weights and KV cache; auto: float32 for float32 weights,"
            " else bfloat16; float16 needs a GPU",
            "choices": _DTYPES,
        },
    )
    weight_dtype: str = field(
        default="auto",
        metadata={
            "help": "round the weights of products to this dtype, with a scale per 32 weights;"
            " auto: as --dtype; int8 and int4 need a CPU",
            "choices": WEIGHT_DTYPES,
        },
    )
    table_tier: str = field(
        default="auto",
        metadata={
            "group": ("value tables", "--table-tier disk --table-cache 8GiB"),
            "help": "place of the value tables: memory of the device, host memory read by a GPU, or"
            " the model's files on disk; auto: device if they fit, else host (GPU) or disk (CPU)",
            "choices": _TIERS,
        },
    )
    table_cache: str | None = field(
        default=None,
        metadata={
            "metavar": "SIZE",
            "help": "row cache of the host and disk tiers, as a number with KiB, MiB or GiB; the"
            f" host tier has a minimum (default: {_CACHE}, less if auto finds less free memory)",
        },
    )
    table_dtype: str = field(
        default="auto",
        metadata={
            "help": "convert value tables in memory to this dtype; auto: as stored",
            "choices": ("auto", *TABLE_DTYPES),
        },
    )
    table_lookahead: int = field(
        default=0,
        metadata={
            "metavar": "LAYERS",
            "help": "prefetch predicted rows this many layers ahead (0 disables it)",
        },
    )
    table_lookahead_share: float | None = field(
        default=None,
        metadata={
            "help": "predicted rows per lookup, as a fraction of the rows it reads"
            f" (default: {_LOOKAHEAD_SHARE})"
        },
    )
    verify_tables: bool = field(
        default=False,
        metadata={"help": "compare value tables with the checksums in their files before use"},
    )

    def __post_init__(self) -> None:
        if self.table_tier not in _TIERS:
            raise ConfigError(f"table_tier: {self.table_tier!r} is not one of {', '.join(_TIERS)}")
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", self.device):
            raise ConfigError(f"device: must be auto, cpu, cuda or cuda:N, not {self.device!r}")
        if self.dtype not in _DTYPES:
            raise ConfigError(f"dtype: {self.dtype!r} is not one of {', '.join(_DTYPES)}")
        if self.weight_dtype not in WEIGHT_DTYPES:
            known = ", ".join(WEIGHT_DTYPES)
            raise ConfigError(f"weight_dtype: {self.weight_dtype!r} is not one of {known}")
        if self.table_lookahead < 0:
            raise ConfigError(f"table_lookahead: must be 0 or more, not {self.table_lookahead}")
        if self.table_lookahead and self.table_tier == "device":
            raise ConfigError("table_lookahead: needs --table-tier host, disk or auto, not device")
        if self.table_lookahead_share is not None:
            if not 0 < self.table_lookahead_share <= 8:
                share = self.table_lookahead_share
                raise ConfigError(f"table_lookahead_share: {share} is outside (0, 8]")
            if not self.table_lookahead:
                raise ConfigError("table_lookahead_share: needs --table-lookahead above 0")
        self._check_cache()

    def _check_cache(self) -> None:
        if self.table_cache is None:
            return
        if self.table_tier == "device":
            raise ConfigError("table_cache: needs --table-tier host, disk or auto, not device")
        if not re.fullmatch(r"[0-9]{1,9}(KiB|MiB|GiB)", self.table_cache):
            raise ConfigError(
                f"table_cache: must be a number with KiB, MiB or GiB, not {self.table_cache!r}"
            )
        if not self.table_cache_bytes:
            raise ConfigError(f"table_cache: must be more than 0, not {self.table_cache}")

    @property
    def lookahead_share(self) -> float:
        """Predicted rows per lookup, as a fraction of the rows that it reads."""
        share = self.table_lookahead_share
        return _LOOKAHEAD_SHARE if share is None else share

    @property
    def table_cache_bytes(self) -> int:
        """Size of the row cache of the host and disk tiers, in bytes."""
        size = self.table_cache or _CACHE
        number, unit = int(size[:-3]), size[-3:]
        return number << {"KiB": 10, "MiB": 20, "GiB": 30}[unit]


@dataclass(frozen=True)
class HttpOptions:
    """The server's address and its limits.

    Raises:
        ConfigError: a field is out of range.
    """

    host: str = field(
        default="127.0.0.1",
        metadata={
            "group": ("HTTP", "--host 0.0.0.0 --port 8080 --max-body-mib 16"),
            "metavar": "ADDRESS",
            "help": "address to listen on",
        },
    )
    port: int = field(
        default=8000, metadata={"metavar": "PORT", "help": "port to listen on; 0 takes a free one"}
    )
    served_model_name: str | None = field(
        default=None, metadata={"help": "the model's name for clients (default: from --model)"}
    )
    chat_template: str | None = field(
        default=None,
        metadata={"metavar": "FILE", "help": "chat template (default: the model's own)"},
    )
    ui: bool = field(default=True, metadata={"help": "serve a web page at /"})
    max_queued_requests: int = field(
        default=256,
        metadata={"help": "prompts that may wait besides the running ones; more get a 503"},
    )
    max_body_mib: int = field(default=4, metadata={"help": "largest request body"})
    body_timeout_s: int = field(
        default=30, metadata={"help": "longest time for a request body to arrive"}
    )
    # Docker kills a container 10 s after SIGTERM, and the processes need 2 s to end
    drain_timeout_s: int = field(
        default=8, metadata={"help": "time to finish running requests after SIGTERM or SIGINT"}
    )

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ConfigError(f"port: {self.port} is outside [0, 65535]")
        for name in ("max_queued_requests", "drain_timeout_s"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: must be 0 or more, not {getattr(self, name)}")
        for name in ("max_body_mib", "body_timeout_s"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True)
class SupervisionOptions:
    """Supervision of the engine process.

    Raises:
        ConfigError: a field is out of range.
    """

    engine_restarts: int = field(
        default=0,
        metadata={
            "group": ("supervision", "--engine-restarts 3 --stall-timeout-s 30"),
            "help": "restart a dead engine process at most this many times",
        },
    )
    stall_timeout_s: float = field(
        default=4.0,
        metadata={"help": "kill an engine that makes no progress for this long"},
    )

    def __post_init__(self) -> None:
        if self.engine_restarts < 0:
            raise ConfigError(f"engine_restarts: must be 0 or more, not {self.engine_restarts}")
        # the engine sends a heartbeat every half second
        if not 2 <= self.stall_timeout_s < math.inf:
            raise ConfigError(f"stall_timeout_s: must be at least 2, not {self.stall_timeout_s}")


@dataclass(frozen=True)
class ThreadOptions:
    """The number of CPU threads that compute.

    Raises:
        ConfigError: a field is out of range.
    """

    threads: int | None = field(
        default=None,
        metadata={
            "group": ("threads", "--threads 4"),
            "help": "CPU threads (default: cores that affinity and cgroup quota allow)",
        },
    )

    def __post_init__(self) -> None:
        if self.threads is not None and not 1 <= self.threads <= _MOST_THREADS:
            raise ConfigError(f"threads: {self.threads} is outside [1, {_MOST_THREADS}]")


@dataclass(frozen=True)
class EngineSettings:
    """Settings with which the engine process builds its engine."""

    model: ModelOptions
    cache_folder: Path
    engine: EngineConfig
    log_format: str = "text"


def cache_folder() -> Path:
    """The folder of prepared models: MEMPLUS_CACHE, or memplus in the user's cache folder."""
    chosen = os.environ.get("MEMPLUS_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "memplus"


def environment_api_keys() -> str:
    """The API keys of MEMPLUS_API_KEYS; empty if it is not set."""
    return os.environ.get("MEMPLUS_API_KEYS", "")


def c_compiler() -> str | None:
    """The C compiler that Triton calls, which is CC, gcc or clang; None if there is none."""
    chosen = os.environ.get("CC")
    if chosen is not None:
        return shutil.which(chosen)
    return shutil.which("gcc") or shutil.which("clang")


def set_threads(options: ThreadOptions) -> str:
    """Set the number of threads and how torch's wait, for this process and its children.

    OpenMP reads the environment when torch is loaded, so call this before torch is imported. The
    user's own environment variables stay as they are, but ``--threads`` overrides the number.

    Returns:
        a log line with the number of threads and the reason for it.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(_SPIN_COUNT)
    if options.threads is not None:
        # MKL caps its threads at the number of cores, and torch uses as many threads as MKL
        number = str(options.threads)
        os.environ |= {"OMP_NUM_THREADS": number, "MKL_NUM_THREADS": number, "MKL_DYNAMIC": "FALSE"}
        return f"threads: {number} (--threads)"
    for name in ("MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        if os.environ.get(name):
            return f"threads: {os.environ[name]} ({name})"
    found = default_threads(os.sched_getaffinity(0))
    os.environ["OMP_NUM_THREADS"] = str(found.count)
    return f"threads: {found.count} ({found.reason})"
