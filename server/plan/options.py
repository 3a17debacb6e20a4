"""Options of ``memplus plan``: the machine, the load, and the dtypes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from engine.config import TABLE_SHARDINGS
from engine.errors import ConfigError
from server.device_dtypes import cpu_dtype, gpu_dtype
from server.model_options import ModelOptions
from server.plan.machine import GPUS, DiskLimits, Link
from weights.checkpoints.dtype_names import FLOAT_DTYPES, GROUPED_DTYPES, TABLE_DTYPES

# measured on the benchmark model (docs/benchmarks.md)
_CACHE_SHARE, _HITS = 0.1, 0.70
# of the speed that bytes and products allow; docs/planning.md compares it with measurements
EFFICIENCY = 0.85
_CONTEXT, _PROMPT = 1024, 512
# reads as docs/benchmarks.md has measured them on a fast disk; the latency was not measured
_DISK = DiskLimits(100_000, 1e-4, "assumed")
# of a collective of GPUs, assumed, and of processes on a CPU, measured once on two busy cores
_GPU_LINK_US, _CPU_LINK_US = 20.0, 80.0
_MOST_REPLICAS = 1024
_UNITS = {"MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_POSITIVE = ("disk_reads", "disk_latency_us", "gb_per_s", "tflops", "link_gb_per_s", "link_us")
_SIZE = re.compile(f"([0-9]{{1,9}})({'|'.join(_UNITS)})")


class Load(NamedTuple):
    """Sequences of ``context_len`` tokens that decode in ``batches``, and the tokens of a step
    that reads a prompt."""

    context_len: int
    batches: tuple[int, ...]
    prompt_len: int


@dataclass(frozen=True)
class PlanOptions:
    """The machine, the load, and the dtypes of a plan.

    Raises:
        ConfigError: a field is out of range.
    """

    gpu: str | None = field(
        default=None,
        metadata={
            "group": ("machine", "--gpu h100 --host-memory 512GiB"),
            "choices": tuple(GPUS),
            "help": "kind of GPU (default: none; this machine's CPU, whose speed is measured)",
        },
    )
    gpu_memory: str | None = field(
        default=None,
        metadata={"metavar": "SIZE", "help": "memory of one GPU (default: that of its kind)"},
    )
    host_memory: str | None = field(
        default=None,
        metadata={
            "metavar": "SIZE",
            "help": "memory of the machine (default: what is available here; needed with --gpu and"
            " one process)",
        },
    )
    gb_per_s: float | None = field(
        default=None,
        metadata={
            "metavar": "NUMBER",
            "help": "bandwidth of the memory that weights are read from, of one GPU (default: that"
            " of its kind; without --gpu measured)",
        },
    )
    tflops: float | None = field(
        default=None,
        metadata={"help": "products of bf16, of one GPU (default: likewise)"},
    )
    disk_reads: float | None = field(
        default=None,
        metadata={
            "metavar": "N",
            "help": "random reads of a row a second that the disk allows (default: measured if the"
            f" machine is this one and MODEL has tables; else {_DISK.reads_per_s:.0f})",
        },
    )
    disk_latency_us: float | None = field(
        default=None,
        metadata={
            "metavar": "MICROSECONDS",
            "help": f"time of one read alone (default: likewise; else {1e6 * _DISK.latency_s:.0f})",
        },
    )
    tensor_parallel: int = field(
        default=1,
        metadata={
            "group": ("several processes (computed)", "--gpu h100 --tensor-parallel 8"),
            "metavar": "N",
            "help": "processes of one machine that share the model: each has a GPU, or its part of"
            " the CPU",
        },
    )
    table_sharding: str | None = field(
        default=None,
        metadata={
            "help": f"split of tables with --tensor-parallel (default: {TABLE_SHARDINGS[0]})",
            "choices": TABLE_SHARDINGS,
        },
    )
    link_gb_per_s: float | None = field(
        default=None,
        metadata={
            "metavar": "NUMBER",
            "help": "bandwidth at which a process sends to the others (default: that of its kind of"
            " GPU; on a CPU its part of the memory bandwidth)",
        },
    )
    link_us: float | None = field(
        default=None,
        metadata={
            "metavar": "MICROSECONDS",
            "help": "time of one exchange between processes, in addition to its bytes (default:"
            f" {_GPU_LINK_US:.0f} of GPUs, {_CPU_LINK_US:.0f} on a CPU)",
        },
    )
    replicas: int = field(
        default=1,
        metadata={"help": "servers behind one address, each with a whole model and its machine"},
    )
    context_len: int | None = field(
        default=None,
        metadata={
            "group": ("load", "--context-len 4096 --batches 1 32"),
            "help": f"prompt plus answer of every sequence (default: {_CONTEXT}, or the model's"
            " limit if that is less)",
        },
    )
    batches: tuple[int, ...] = field(
        default=(1, 8, 64), metadata={"help": "sequences that decode together"}
    )
    prompt_len: int | None = field(
        default=None,
        metadata={"help": f"tokens of a step that reads a prompt (default: {_PROMPT}, likewise)"},
    )
    cache_share: float = field(
        default=_CACHE_SHARE,
        metadata={"help": "row cache of the host and disk tiers, as a fraction of the table"},
    )
    hit_share: float | None = field(
        default=None,
        metadata={
            "help": "fraction of the rows read that need no fetch: the cache has them, or another"
            f" token of the step reads them (default: {_HITS}, measured for the default"
            " --cache-share)"
        },
    )
    efficiency: float = field(
        default=EFFICIENCY,
        metadata={
            "metavar": "FRACTION",
            "help": "what a step reaches of the speed that bytes and products allow",
        },
    )
    dtype: str = field(
        default="auto",
        metadata={
            "group": ("dtypes", "--dtype bfloat16 --table-dtype int8"),
            "choices": ("auto", *FLOAT_DTYPES),
            "help": "precision of weights; auto: as `memplus serve`, bfloat16 without weights",
        },
    )
    weight_dtype: str = field(
        default="auto",
        metadata={"choices": ("auto", *GROUPED_DTYPES), "help": "round weights to this dtype"},
    )
    table_dtype: str = field(
        default="auto",
        metadata={
            "choices": ("auto", *TABLE_DTYPES),
            "help": "dtype of table rows; auto: as stored, bfloat16 without weights",
        },
    )
    kv_dtype: str = field(
        default="auto",
        metadata={"choices": ("auto", "fp8", "int8"), "help": "precision of the KV cache"},
    )

    def __post_init__(self) -> None:
        if self.gpu is not None and self.gpu not in GPUS:
            raise ConfigError(f"gpu: {self.gpu!r} is not one of {', '.join(GPUS)}")
        if self.gpu is None and self.gpu_memory is not None:
            raise ConfigError("gpu_memory: needs --gpu")
        self._check_processes()
        for name in ("context_len", "prompt_len"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= 2**24:
                raise ConfigError(f"{name}: {value} is outside [1, {2**24}]")
        for batch in self.batches:
            if not 1 <= batch <= 4096:
                raise ConfigError(f"batches: {batch} is outside [1, 4096]")
        for name in ("cache_share", "hit_share"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise ConfigError(f"{name}: {share} is outside [0, 1]")
        if self.hit_share is None and self.cache_share not in (0, _CACHE_SHARE, 1):
            raise ConfigError("hit_share: must be given with this --cache-share")
        refused = gpu_dtype(self.dtype, self.kv_dtype)
        if self.gpu is not None:
            refused = cpu_dtype(self.weight_dtype, self.kv_dtype)
        if refused is not None:
            device = "CPU" if self.gpu is None else "GPU"
            setting = refused.replace(" ", ": ")
            raise ConfigError(f"{setting} is not supported on a {device} yet")
        if not 0 < self.efficiency <= 1:
            raise ConfigError(f"efficiency: {self.efficiency} is outside (0, 1]")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{name}: must be above 0, not {value}")
        if self.gpu is None and (self.gb_per_s is None) != (self.tflops is None):
            raise ConfigError("gb_per_s, tflops: give both or none without --gpu")
        for name in ("gpu_memory", "host_memory"):
            if getattr(self, name) is not None:
                size(name, getattr(self, name))

    def _check_processes(self) -> None:
        # the checks of `memplus serve`
        ranks = self.served.tensor_parallel
        if self.gpu is not None and self.host_memory is None and ranks == 1:
            raise ConfigError("host_memory: must be given with --gpu")
        for name in ("link_gb_per_s", "link_us"):
            if getattr(self, name) is not None and ranks == 1:
                raise ConfigError(f"{name}: needs --tensor-parallel above 1")
        if not 1 <= self.replicas <= _MOST_REPLICAS:
            raise ConfigError(f"replicas: {self.replicas} is outside [1, {_MOST_REPLICAS}]")

    @property
    def served(self) -> ModelOptions:
        """The options of ``memplus serve`` for this plan (ConfigError if it refuses them)."""
        return ModelOptions(
            weight_dtype=self.weight_dtype,
            tensor_parallel=self.tensor_parallel,
            table_sharding=self.table_sharding,
        )

    def link(self, gb_per_s: float) -> Link:
        """The connection of ranks, with this bandwidth unless another one is given."""
        given = self.link_gb_per_s, self.link_us
        default_us = _CPU_LINK_US if self.gpu is None else _GPU_LINK_US
        return Link(given[0] or gb_per_s, (given[1] or default_us) / 1e6, _origin(given, "assumed"))

    @property
    def is_disk_given(self) -> bool:
        """Whether neither limit of the disk is left to a measurement."""
        return self.disk_reads is not None and self.disk_latency_us is not None

    def disk(self, measured: DiskLimits | None) -> DiskLimits:
        """The disk's limits: as given, else as ``measured``, else by default."""
        found = measured or _DISK
        reads, latency_us = self.disk_reads, self.disk_latency_us
        return DiskLimits(
            found.reads_per_s if reads is None else reads,
            found.latency_s if latency_us is None else latency_us / 1e6,
            _origin((reads, latency_us), found.origin),
        )

    def load(self, max_positions: int) -> "Load":
        """The load on a model; ConfigError if a sequence exceeds its positions."""
        for name in ("context_len", "prompt_len"):
            if (getattr(self, name) or 1) > max_positions:
                raise ConfigError(f"{name}: the model has only {max_positions:,} positions")
        return Load(
            self.context_len or min(_CONTEXT, max_positions),
            self.batches,
            self.prompt_len or min(_PROMPT, max_positions),
        )

    @property
    def hits(self) -> float:
        """The fraction of the rows read that need no fetch."""
        if self.cache_share in (0, 1):
            return self.cache_share
        return _HITS if self.hit_share is None else self.hit_share


def _origin(given: Sequence[float | None], otherwise: str) -> str:
    """The source of limits: the user gave those that are not None."""
    if None not in given:
        return "given"
    return otherwise if set(given) == {None} else f"partly given, partly {otherwise}"


def size(name: str, text: str) -> int:
    """Bytes of a number with MiB, GiB or TiB (ConfigError that begins with ``name``)."""
    found = _SIZE.fullmatch(text)
    if found is None or not int(found[1]):
        raise ConfigError(f"{name}: must be a number with MiB, GiB or TiB, not {text!r}")
    return int(found[1]) * _UNITS[found[2]]
