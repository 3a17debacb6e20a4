"""The KV blocks of tensor-parallel ranks: all have as many as the fullest GPU can hold."""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.executors.cuda.device import CudaDevice, Device
from engine.executors.cuda.executor import CudaExecutor
from engine.executors.cuda.sizing import DeviceMemory, GpuMemory, num_kv_blocks
from engine.executors.cuda.step import DeviceModel, DeviceRank
from engine.executors.parallel.shares import RankShare
from engine.model.attention import KvMemoryError

Made = TypeVar("Made", bound=CudaExecutor)


class StepTooLargeError(ConfigError):
    """The GPU of this rank cannot hold the largest step; the other ranks do not know it."""


def rank_settings(config: EngineConfig, share: RankShare) -> EngineConfig:
    """The settings of one rank: the KV memory of its heads, and its part of the patches' memory."""
    heads = share.kv_config.num_kv_heads / share.config.num_kv_heads
    kv_gib = config.kv_cache_gib
    return replace(
        config,
        kv_cache_gib=None if kv_gib is None else kv_gib * heads,
        patch_memory_gib=config.patch_memory_gib / share.size,
    )


def sized_rank(
    model: DeviceModel,
    config: EngineConfig,
    rank: DeviceRank,
    make: Callable[[DeviceModel, EngineConfig, Device, int], Made],
) -> Made:
    """The executor of one rank, from ``make``. All ranks call this at the same time.

    Raises:
        ConfigError: a GPU cannot hold the KV blocks; all ranks get this error.
        StepTooLargeError: this rank's GPU cannot hold the largest step. Other ranks may wait for it
            in a collective, so its process must end at once.
    """
    device = CudaDevice(model.device)
    try:
        num_blocks = agreed_num_blocks(model, config, rank, device, GpuMemory(model.device))
        return make(model, config, device, num_blocks)
    except (torch.OutOfMemoryError, KvMemoryError) as error:
        raise StepTooLargeError(
            "max_batched_tokens: the largest step does not fit in the memory of the GPU of"
            f" tensor-parallel rank {rank.share.rank}; lower --max-batched-tokens or"
            " --max-num-seqs, or use more ranks"
        ) from error


def agreed_num_blocks(
    model: DeviceModel, config: EngineConfig, rank: DeviceRank, device: Device, memory: DeviceMemory
) -> int:
    """The number of KV blocks of every rank. All ranks call this at the same time.

    It runs the largest step on all ranks.

    Raises:
        ConfigError: the GPU of a rank cannot hold the blocks; all ranks get this error.
    """
    own, itemsize = rank_settings(config, rank.share), model.dtype.itemsize
    # one block is enough to measure what a step takes
    probe = CudaExecutor(model, config, device, num_blocks=1)
    problem: ConfigError | None = None
    try:
        found = num_kv_blocks(
            model.kv_config, own, itemsize, memory, probe.run_largest, has_tiers=False
        )
    except ConfigError as error:
        # the other ranks wait for a number
        found, problem = 0, error
    agreed = int(rank.group.smallest(torch.tensor([found], device=model.device)).item())
    if problem is not None:
        raise ConfigError(f"{problem} (tensor-parallel rank {rank.share.rank})") from problem
    if not agreed:
        raise ConfigError(
            "kv_cache_gib: the GPU of another tensor-parallel rank has too little memory; see what"
            " that rank logged"
        )
    return agreed
