"""Settings of the command line and the server; the only file that reads the environment."""

import math
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from engine.config import EngineConfig
from engine.errors import ConfigError
from server.model_options import ModelOptions
from server.node_options import NodeSettings
from server.thread_count import default_threads
from weights.models.named_models import ModelFolder

PREFIX = "MEMPLUS_"
_MOST_THREADS = 1024
# Polls of torch's waiting OpenMP threads before they sleep; they take about as long as a wake-up.
# By default libgomp polls for milliseconds, which our kernels and other processes need.
_SPIN_COUNT = 1000


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
        metadata={"help": "prompts that may wait; more get a 503"},
    )
    max_body_mib: int = field(default=4, metadata={"help": "largest request body"})
    body_timeout_s: int = field(
        default=30, metadata={"help": "longest time for a request body to arrive"}
    )
    # Docker kills a container 10 s after SIGTERM, and the processes need 2 s to end
    drain_timeout_s: int = field(
        default=8, metadata={"help": "time to finish requests after SIGTERM or SIGINT"}
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
    """Settings with which the engine process builds its engine.

    ``folder`` is the one of ``model``, found once: an engine that restarts serves the same version.
    ``nodes`` is given if tensor-parallel ranks run on several machines, of which this is node 0.
    """

    model: ModelOptions
    folder: ModelFolder
    engine: EngineConfig
    log_format: str = "text"
    nodes: NodeSettings | None = None


def environment_settings() -> dict[str, str]:
    """All environment variables whose names begin with MEMPLUS_ and that are not empty."""
    return {name: text for name, text in os.environ.items() if name.startswith(PREFIX) and text}


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


def environment_node_key() -> str:
    """The secret of MEMPLUS_NODE_KEY; empty if it is not set."""
    return os.environ.get("MEMPLUS_NODE_KEY", "")


def c_compiler() -> str | None:
    """The C compiler that Triton calls, which is CC, gcc or clang; None if there is none."""
    chosen = os.environ.get("CC")
    if chosen is not None:
        return shutil.which(chosen)
    return shutil.which("gcc") or shutil.which("clang")


def keep_nccl_local() -> None:
    """Let nccl listen on the loopback interface, for this process and its children.

    By itself nccl listens on one that other machines reach. NCCL_SOCKET_IFNAME, if the user set it,
    stays as it is.
    """
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")


def set_threads(options: ThreadOptions, num_ranks: int = 1) -> str:
    """Set the number of threads and how torch's wait, for this process and its children.

    OpenMP reads the environment when torch is loaded, so call this before torch is imported. The
    user's own environment variables stay as they are, but ``--threads`` overrides the number.
    Tensor-parallel ranks divide the threads among them; each has at least one.

    Returns:
        a log line with the number of threads and the reason for it.
    """
    per_rank = " per process" if num_ranks > 1 else ""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(_SPIN_COUNT)
    if options.threads is not None:
        # MKL caps its threads at the number of cores, and torch uses as many threads as MKL
        number = str(max(1, options.threads // num_ranks))
        os.environ |= {"OMP_NUM_THREADS": number, "MKL_NUM_THREADS": number, "MKL_DYNAMIC": "FALSE"}
        return f"threads: {number}{per_rank} (--threads)"
    for name in ("MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        if os.environ.get(name):
            return f"threads: {os.environ[name]}{per_rank} ({name})"
    found = default_threads(os.sched_getaffinity(0))
    number = str(max(1, found.count // num_ranks))
    os.environ["OMP_NUM_THREADS"] = number
    return f"threads: {number}{per_rank} ({found.reason})"
