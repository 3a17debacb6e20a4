"""Options of the model: its device and precision, and the placement of its value tables."""

import re
from dataclasses import dataclass, field

from engine.config import TABLE_SHARDINGS
from engine.errors import ConfigError
from engine.model.weight_bits import HEAD_DTYPE
from weights.checkpoints.dtype_names import GROUPED_DTYPES, TABLE_DTYPES
from weights.models.named_models import DEFAULT_MODEL

_CACHE = "2GiB"
_LOOKAHEAD_SHARE = 0.5
_MOST_RANKS = 64
_TIERS = ("auto", "device", "host", "disk")
_DTYPES = ("auto", "bfloat16", "float16", "float32")
_WEIGHT_DTYPES = ("auto", *GROUPED_DTYPES)


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
            "metavar": "NAME|DIR|GGUF|HUB",
            "help": "model name, folder, GGUF file or Hub's ORG/NAME",
        },
    )
    memory_adapter: str | None = field(
        default=None,
        metadata={
            "metavar": "DIR",
            "help": "adds the memory layers of an adapter folder (default: none)",
        },
    )
    device: str = field(
        default="auto",
        metadata={
            "metavar": "auto|cpu|cuda[:N]",
            "help": "auto: a GPU if one is usable, else the CPU",
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
            "help": f"round weights (CPU only; embedding and head: {HEAD_DTYPE})",
            "choices": _WEIGHT_DTYPES,
        },
    )
    tensor_parallel: int = field(
        default=1,
        metadata={
            "metavar": "N",
            "help": "processes, or GPUs, that share the model",
        },
    )
    table_tier: str = field(
        default="auto",
        metadata={
            "group": ("value tables", "--table-tier disk --table-cache 8GiB"),
            "help": "device memory, host memory read by a GPU, or disk; auto: device if they"
            " fit, else host (GPU only), else disk",
            "choices": _TIERS,
        },
    )
    table_cache: str | None = field(
        default=None,
        metadata={
            "metavar": "SIZE",
            "help": "row cache of the host and disk tiers, with KiB, MiB or GiB"
            f" (default: {_CACHE}, less if auto finds less free memory)",
        },
    )
    table_dtype: str = field(
        default="auto",
        metadata={
            "help": "dtype of value tables in memory; auto: as stored",
            "choices": ("auto", *TABLE_DTYPES),
        },
    )
    table_lookahead: int = field(
        default=0,
        metadata={
            "metavar": "LAYERS",
            "help": "prefetch predicted rows this many layers early",
        },
    )
    table_lookahead_share: float | None = field(
        default=None,
        metadata={
            "help": f"rows to prefetch, as a fraction of those read (default: {_LOOKAHEAD_SHARE})"
        },
    )
    table_sharding: str | None = field(
        default=None,
        metadata={
            "help": f"split of tables with --tensor-parallel (default: {TABLE_SHARDINGS[0]})",
            "choices": TABLE_SHARDINGS,
        },
    )
    verify_tables: bool = field(
        default=False,
        metadata={"help": "first compare tables with the files' checksums"},
    )

    def __post_init__(self) -> None:
        if self.table_tier not in _TIERS:
            raise ConfigError(f"table_tier: {self.table_tier!r} is not one of {', '.join(_TIERS)}")
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", self.device):
            raise ConfigError(f"device: must be auto, cpu, cuda or cuda:N, not {self.device!r}")
        if self.dtype not in _DTYPES:
            raise ConfigError(f"dtype: {self.dtype!r} is not one of {', '.join(_DTYPES)}")
        if self.weight_dtype not in _WEIGHT_DTYPES:
            known = ", ".join(_WEIGHT_DTYPES)
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
        self._check_ranks()

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

    def _check_ranks(self) -> None:
        if not 1 <= self.tensor_parallel <= _MOST_RANKS:
            ranks = self.tensor_parallel
            raise ConfigError(f"tensor_parallel: {ranks} is outside [1, {_MOST_RANKS}]")
        if self.table_sharding not in (None, *TABLE_SHARDINGS):
            known = ", ".join(TABLE_SHARDINGS)
            raise ConfigError(f"table_sharding: {self.table_sharding!r} is not one of {known}")
        if self.tensor_parallel == 1:
            if self.table_sharding is not None:
                raise ConfigError("table_sharding: needs --tensor-parallel above 1")
            return
        combined = "cannot be combined with --tensor-parallel yet"
        if self.weight_dtype != "auto":
            raise ConfigError(f"weight_dtype: {self.weight_dtype} {combined}")
        if self.table_tier not in ("auto", "device"):
            raise ConfigError(f"table_tier: {self.table_tier} {combined}; use device")
        if self.table_cache is not None:
            raise ConfigError(f"table_cache: {combined}, which keeps value tables in memory")
        if self.table_lookahead:
            raise ConfigError(f"table_lookahead: {combined}, which keeps value tables in memory")

    @property
    def lookahead_share(self) -> float:
        """Predicted rows per lookup, as a fraction of the rows that it reads."""
        share = self.table_lookahead_share
        return _LOOKAHEAD_SHARE if share is None else share

    @property
    def table_cache_bytes(self) -> int:
        """Size of the row cache of the host and disk tiers, in bytes."""
        return _num_bytes(self.table_cache or _CACHE)


def _num_bytes(size: str) -> int:
    number, unit = int(size[:-3]), size[-3:]
    return number << {"KiB": 10, "MiB": 20, "GiB": 30}[unit]


# row cache of the host and disk tiers, unless the user requests another one
DEFAULT_TABLE_CACHE_BYTES = _num_bytes(_CACHE)
