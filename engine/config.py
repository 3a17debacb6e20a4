"""Settings of the engine: limits and KV memory, as validated plain data without torch."""

import math
from dataclasses import dataclass

from engine.errors import ConfigError
from engine.sampling.params import option

_MAX_KV_BYTES = 2 * 2**30
_KV_DTYPES = ("auto", "fp8", "int8")
_SPECULATE = ("none", "ngram")
# how tensor-parallel ranks share a value table: columns of every row, or whole rows
TABLE_SHARDINGS = ("columns", "rows")
# one token and its drafts fill the rows that CPU kernels compute at a time
_NUM_DRAFTS = 11
_MOST_DRAFTS = 64
_MOST_PATCH_ROWS = 2**31 - 1  # their hash index has int32 numbers


@dataclass(frozen=True)
class EngineConfig:
    """Limits and KV memory of one engine; ConfigError if a field is out of range."""

    max_num_seqs: int = option(
        64,
        "sequences that run at the same time",
        group=("engine", "--max-num-seqs 16 --kv-cache-gib 4"),
    )
    max_batched_tokens: int = option(512, "tokens per step, prompts and decodes together")
    max_model_len: int | None = option(
        None, "longest prompt plus answer (default: the model's limit)"
    )
    block_size: int = option(
        16,
        "tokens per KV block; on a CPU a multiple of 4",
    )
    kv_cache_gib: float | None = option(
        None,
        "memory for keys and values (default: enough for all sequences, at most what weights,"
        " tables and steps leave, and 2 GiB on a CPU)",
    )
    kv_dtype: str = option(
        "auto",
        "precision of the KV cache; auto: that of the weights; fp8 needs a GPU, int8 a CPU",
        choices=_KV_DTYPES,
    )
    gpu_memory_utilization: float = option(
        0.9, "fraction of the GPU's memory that the engine uses", metavar="FRACTION"
    )
    speculate: str = option(
        "none",
        "draft tokens that one step verifies, for the same text in less time; ngram: what"
        " followed the last tokens before",
        choices=_SPECULATE,
    )
    speculate_tokens: int | None = option(
        None, f"draft tokens per sequence and step, at most (default: {_NUM_DRAFTS})"
    )
    debug_checks: bool = option(False, "check all KV blocks whenever the engine idles; slow")
    max_patches: int = option(
        64,
        "row patches in memory, removed ones in use included",
        group=("row patch limits", "--max-patches 8 --patch-memory-gib 0.5"),
    )
    max_patch_rows: int = option(1_000_000, "rows of one row patch, over all tables")
    patch_memory_gib: float = option(1.0, "memory for row patches, if the model takes them")

    def __post_init__(self) -> None:
        positive = ("max_num_seqs", "max_batched_tokens", "max_model_len", "block_size")
        for name in (*positive, "max_patch_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: must be at least 1, not {value}")
        if self.kv_cache_gib is not None and not 0 < self.kv_cache_gib < math.inf:
            gib = self.kv_cache_gib
            raise ConfigError(f"kv_cache_gib: must be finite and greater than 0, not {gib}")
        if self.kv_dtype not in _KV_DTYPES:
            known = ", ".join(_KV_DTYPES)
            raise ConfigError(f"kv_dtype: {self.kv_dtype!r} is not one of {known}")
        if not 0 < self.gpu_memory_utilization <= 1:
            share = self.gpu_memory_utilization
            raise ConfigError(f"gpu_memory_utilization: {share} is outside (0, 1]")
        if self.max_patches < 0:
            raise ConfigError(f"max_patches: must be 0 or more, not {self.max_patches}")
        if self.max_patch_rows > _MOST_PATCH_ROWS:
            rows = self.max_patch_rows
            raise ConfigError(f"max_patch_rows: must be at most {_MOST_PATCH_ROWS}, not {rows}")
        if not 0 < self.patch_memory_gib < math.inf:
            gib = self.patch_memory_gib
            raise ConfigError(f"patch_memory_gib: must be finite and greater than 0, not {gib}")
        self._check_speculation()
        if self.max_batched_tokens < self.max_num_seqs:
            tokens, seqs = self.max_batched_tokens, self.max_num_seqs
            raise ConfigError(f"max_batched_tokens: {tokens} is less than max_num_seqs {seqs}")

    def _check_speculation(self) -> None:
        if self.speculate not in _SPECULATE:
            known = ", ".join(_SPECULATE)
            raise ConfigError(f"speculate: {self.speculate!r} is not one of {known}")
        if self.speculate_tokens is None:
            return
        if not 1 <= self.speculate_tokens <= _MOST_DRAFTS:
            asked = self.speculate_tokens
            raise ConfigError(f"speculate_tokens: {asked} is outside [1, {_MOST_DRAFTS}]")
        if self.speculate == "none":
            raise ConfigError("speculate_tokens: needs --speculate ngram")

    @property
    def num_drafts(self) -> int:
        """Draft tokens per sequence and step, at most."""
        return _NUM_DRAFTS if self.speculate_tokens is None else self.speculate_tokens

    @property
    def patch_bytes(self) -> int:
        """Memory for row patches, their hash indexes included; 0 if none may be loaded."""
        return int(self.patch_memory_gib * 2**30) if self.max_patches else 0

    def kv_bytes(self, kv_bytes_per_token: int, max_positions: int) -> int:
        """``kv_cache_gib`` in bytes; by default enough for all sequences, at most 2 GiB."""
        if self.kv_cache_gib is not None:
            return int(self.kv_cache_gib * 2**30)
        length = min(self.max_model_len or max_positions, max_positions)
        num_blocks = self.max_num_seqs * -(-length // self.block_size)
        return min(num_blocks * self.block_size * kv_bytes_per_token, _MAX_KV_BYTES)

    def num_kv_blocks(self, kv_bytes_per_token: int, max_positions: int) -> int:
        """The number of blocks that fit in ``kv_bytes``; ConfigError if it is 0."""
        kv_bytes = self.kv_bytes(kv_bytes_per_token, max_positions)
        num_blocks = kv_bytes // (kv_bytes_per_token * self.block_size)
        if num_blocks < 1:
            raise ConfigError(f"kv_cache_gib: {kv_bytes / 2**30:.3g} is too small for one block")
        return num_blocks
