"""How the engine runs a model: limits and memory, as validated plain data that needs no torch."""

import math
from dataclasses import dataclass, field

from engine.errors import ConfigError

_MOST_KV_BYTES = 2 * 2**30


@dataclass(frozen=True)
class EngineConfig:
    """Limits of one engine and its memory; each field becomes a command-line option.

    Raises:
        ConfigError: a field is out of range.
    """

    max_num_seqs: int = field(
        default=64,
        metadata={
            "help": "sequences that run at the same time",
            "group": ("engine", "--max-num-seqs 16 --kv-cache-gib 4"),
        },
    )
    max_batched_tokens: int = field(
        default=512, metadata={"help": "tokens per step, prompts and decodes together"}
    )
    max_model_len: int | None = field(
        default=None, metadata={"help": "longest prompt plus answer (default: the model's limit)"}
    )
    block_size: int = field(default=16, metadata={"help": "tokens per KV block"})
    kv_cache_gib: float | None = field(
        default=None,
        metadata={
            "help": "memory for KV blocks (default: enough for all sequences, at most 2 GiB"
            " and at most the memory that weights and tables leave free)"
        },
    )
    debug_checks: bool = field(
        default=False, metadata={"help": "check all KV blocks whenever the engine is idle; slow"}
    )

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_batched_tokens", "max_model_len", "block_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: must be at least 1, not {value}")
        if self.kv_cache_gib is not None and not 0 < self.kv_cache_gib < math.inf:
            raise ConfigError(f"kv_cache_gib: must be greater than 0, not {self.kv_cache_gib}")
        if self.max_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_batched_tokens: {self.max_batched_tokens} is less than max_num_seqs"
                f" {self.max_num_seqs}, so not every sequence could decode in a step"
            )

    def kv_bytes(self, kv_bytes_per_token: int, max_positions: int) -> int:
        """``kv_cache_gib`` in bytes; by default what all sequences can use, at most 2 GiB.

        Args:
            kv_bytes_per_token: of all layers of the model.
            max_positions: the longest sequence that the model takes, in tokens.
        """
        if self.kv_cache_gib is not None:
            return int(self.kv_cache_gib * 2**30)
        length = min(self.max_model_len or max_positions, max_positions)
        num_blocks = self.max_num_seqs * -(-length // self.block_size)
        return min(num_blocks * self.block_size * kv_bytes_per_token, _MOST_KV_BYTES)

    def num_kv_blocks(self, kv_bytes_per_token: int, max_positions: int) -> int:
        """Blocks that fit in ``kv_bytes``.

        Raises:
            ConfigError: not one block fits.
        """
        kv_bytes = self.kv_bytes(kv_bytes_per_token, max_positions)
        num_blocks = kv_bytes // (kv_bytes_per_token * self.block_size)
        if num_blocks < 1:
            raise ConfigError(f"kv_cache_gib: {kv_bytes / 2**30:.3g} holds not even one block")
        return num_blocks
