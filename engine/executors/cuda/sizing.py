"""Sizes the KV blocks of a GPU: what weights, tables, graphs and the largest step leave free."""

import logging
from collections.abc import Callable
from typing import Protocol

import torch

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.executors.cuda.patch_inputs import patched_layers
from engine.model.config import ModelConfig

_GIB = 2**30
# cuBLAS workspaces, loaded kernels, fragments
_RESERVE_BYTES = 256 * 2**20

logger = logging.getLogger(__name__)


class DeviceMemory(Protocol):
    """The memory of one device, in bytes; tests substitute fakes."""

    def total(self) -> int:
        """All memory of the device."""
        ...

    def in_use(self) -> int:
        """Memory that this process and others hold now."""
        ...

    def peak(self, work: Callable[[], None]) -> int:
        """The most memory that ``work`` allocates in addition to that in use before."""
        ...


class GpuMemory:
    """The memory of a GPU, as torch and the driver count it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def total(self) -> int:
        return torch.cuda.mem_get_info(self._device)[1]

    def in_use(self) -> int:
        # what torch keeps for reuse is free for us
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free

    def peak(self, work: Callable[[], None]) -> int:
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        work()
        return torch.cuda.max_memory_allocated(self._device) - before


def num_kv_blocks(
    model: ModelConfig,
    config: EngineConfig,
    itemsize: int,
    memory: DeviceMemory,
    run_largest: Callable[[], None],
    *,
    has_tiers: bool = True,
) -> int:
    """Number of KV blocks that fit, or that ``kv_cache_gib`` asks for; at most enough for all
    sequences.

    Args:
        itemsize: bytes of a number in the KV cache, unless its dtype is set.
        run_largest: runs the largest step and waits for it.
        has_tiers: the tables could be in another tier, which an error then suggests.

    Raises:
        ConfigError: the blocks do not fit.
    """
    # twice: the graphs share memory as large as their largest step
    peak = memory.peak(run_largest)
    in_use = memory.in_use()
    usable = int(memory.total() * config.gpu_memory_utilization)
    reserved = _RESERVE_BYTES + (config.patch_bytes if patched_layers(model, config) else 0)
    left = usable - in_use - 2 * peak - reserved
    block_bytes = model.kv_bytes_per_token(itemsize, config.kv_dtype) * config.block_size
    length = min(config.max_model_len or model.max_positions, model.max_positions)
    most = config.max_num_seqs * -(-length // config.block_size)
    wanted = most
    if config.kv_cache_gib is not None:
        wanted = int(config.kv_cache_gib * _GIB) // block_bytes
    # the executor adds a block for padding
    found = min(wanted, left // block_bytes - 1)
    logger.info(
        "KV pool takes %.2f GiB: the GPU has %.2f GiB, of which %.2f may be used"
        " (--gpu-memory-utilization), %.2f are in use, and %.2f are for steps, graphs and row"
        " patches",
        *(max(found, 0) * block_bytes / _GIB, memory.total() / _GIB, usable / _GIB),
        *(in_use / _GIB, (2 * peak + reserved) / _GIB),
    )
    if found < 1 or (config.kv_cache_gib is not None and found < wanted):
        options = [] if config.kv_cache_gib is None else ["--kv-cache-gib"]
        options += ["--table-cache"] if has_tiers else []
        lower = " or ".join([*options, "--max-batched-tokens"])
        use = "--table-tier host" if has_tiers else "more ranks"
        raise ConfigError(
            f"kv_cache_gib: weights, tables and steps leave {max(left, 0) / _GIB:.2f} GiB of the"
            f" GPU; lower {lower}, use {use} or --table-dtype int8, or raise"
            " --gpu-memory-utilization"
        )
    return found
