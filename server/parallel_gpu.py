"""Loads a model over tensor-parallel GPUs: rank 0's executor, and the other ranks' processes."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.executors.cuda.rank_executors import FirstRankExecutor, OtherRankExecutor
from engine.executors.cuda.rank_sizing import StepTooLargeError, rank_settings, sized_rank
from engine.executors.cuda.step import DeviceModel, DeviceRank
from engine.executors.parallel.channel import Channel
from engine.executors.parallel.device_group import DeviceGroup
from engine.executors.parallel.messages import MeetOthers, RankReady
from engine.executors.parallel.rank_loop import follow
from engine.executors.parallel.ranks import Ranks, RankSettings
from engine.executors.parallel.shares import RankShare
from engine.executors.parallel.tables import CapturedPart
from server.config import keep_nccl_local
from server.logs import set_up_logs
from server.model_options import DEFAULT_TABLE_CACHE_BYTES, ModelOptions
from server.rank_loading import checked_share, loaded_or_refused
from weights.checkpoints.checkpoint import open_checkpoint
from weights.checkpoints.gpu_tier import GpuTierChoice
from weights.checkpoints.host_cache_limits import HostCacheLimits
from weights.checkpoints.memory_request import MemoryRequest
from weights.checkpoints.shard_loading import load_share, share_bytes, table_share_bytes
from weights.checkpoints.table_loading import check_checksums

RANK_ENTRY = "server.parallel_gpu:main"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GpuShareSettings:
    """The model that every rank loads its share of, and the settings of its executor.

    Attributes:
        folder: the checkpoint folder.
        dtype: dtype of the weights.
        table_dtype: as in ``ModelOptions``.
        table_sharding: as in ``RankShare``.
        engine: the settings of all ranks together.
        first: the GPU of rank 0; each later rank has the next one.
        log_format: as in ``MonitoringOptions``.
    """

    folder: Path
    dtype: torch.dtype
    table_dtype: str
    table_sharding: str
    engine: EngineConfig
    first: torch.device
    log_format: str

    def load(self, rank: int, size: int, group: DeviceGroup) -> tuple[DeviceModel, DeviceRank]:
        """Load one rank's model onto its GPU, which becomes the current one.

        Raises:
            CheckpointError: as ``load_share``.
            ConfigError: as ``load_share``; or the GPU has too little memory.
        """
        checkpoint, stored = open_checkpoint(self.folder)
        share = RankShare(checkpoint.model, rank, size, self.table_sharding)
        tables = [stored[name] for name in checkpoint.model.table_names]
        device = gpu_of(self.first, rank)
        check_memory(
            share,
            self.engine,
            device,
            weight_bytes=share_bytes(share, group, self.dtype),
            row_bytes=table_share_bytes(tables, self.table_dtype, share),
            itemsize=self.dtype.itemsize,
        )
        types = self.dtype, self.table_dtype
        model = load_share(self.folder, share, group, *types, device, CapturedPart)
        made = DeviceRank(share, group)
        return DeviceModel(model, rank=made), made


def gpu_of(first: torch.device, rank: int) -> torch.device:
    """The GPU of a rank, which becomes the current one."""
    device = torch.device("cuda", first.index + rank)
    torch.cuda.set_device(device)
    return device


def check_memory(
    share: RankShare,
    engine: EngineConfig,
    device: torch.device,
    *,
    weight_bytes: int,
    row_bytes: int,
    itemsize: int,
) -> None:
    """Raise ConfigError if the GPU of a rank cannot hold its share, before minutes of loading.

    ``engine`` has the settings of all ranks together, ``itemsize`` is the bytes of a number in the
    KV cache.
    """
    own, config = rank_settings(engine, share), share.config
    per_token = share.kv_config.kv_bytes_per_token(itemsize)
    request = MemoryRequest(
        kv_bytes=own.kv_bytes(per_token, config.max_positions),
        requested_cache=None,
        default_cache=DEFAULT_TABLE_CACHE_BYTES,
        tier="device",
        is_kv_requested=engine.kv_cache_gib is not None,
        patch_bytes=own.patch_bytes if config.takes_patches else 0,
    )
    choice = GpuTierChoice(request, device, own.gpu_memory_utilization, HostCacheLimits(0, 0))
    choice.shares(row_bytes, weight_bytes)


def gpu_parallel_executor(
    options: ModelOptions,
    folder: Path,
    engine: EngineConfig,
    first: torch.device,
    log_format: str = "text",
    on_rank_death: Callable[[], object] = lambda: None,
) -> FirstRankExecutor:
    """Start the other ranks, load this rank's share, and return the executor of all ranks.

    ``first`` is the GPU of this rank. Call it in the main thread, see ``Ranks``. If another rank
    dies after it has loaded its share, a thread calls ``on_rank_death`` and ends this process with
    status 1: nothing else is sure to end a collective on the GPU that waits for the dead rank.

    Raises:
        CheckpointError: the model cannot be served.
        ConfigError: a setting does not fit the model, the number of ranks or a GPU's memory.
        RankLostError: another rank died while it loaded.
    """
    checked = checked_share(options, folder, engine)
    share = checked.share
    if options.verify_tables:
        check_checksums(checked.tables)
    settings = GpuShareSettings(
        folder,
        checked.dtype,
        options.table_dtype,
        share.table_sharding,
        engine,
        first,
        log_format,
    )
    keep_nccl_local()
    ranks, group = Ranks(RANK_ENTRY, share.size, settings), DeviceGroup(0, share.size)
    try:
        model, rank = settings.load(0, share.size, group)
        ranks.wait_until_ready()
        ranks.watch(partial(_end, ranks, on_rank_death))
        ranks.send([MeetOthers()] * (share.size - 1))
        # the store stays until ``close``: a thread of nccl's group looks into it from time to time
        group.meet(ranks.store, model.device)
        executor = sized_rank(
            model, engine, rank, partial(FirstRankExecutor, rank=rank, ranks=ranks)
        )
    except BaseException:
        ranks.close()
        group.leave()
        raise
    logger.info(
        "executor: cuda, %d tensor-parallel ranks in %s%s",
        share.size,
        settings.dtype,
        f", value tables by {share.table_sharding}" if share.config.memory is not None else "",
    )
    return executor


def _end(ranks: Ranks, on_rank_death: Callable[[], object]) -> None:
    """End this process, whose main thread may wait for the dead rank for ever."""
    ranks.delete_store()
    on_rank_death()
    os._exit(1)


def main(connection: Channel, settings: RankSettings) -> None:
    """Load one rank's share and run it until rank 0 ends; if it cannot be loaded, send why."""
    model = settings.model
    assert isinstance(model, GpuShareSettings)
    set_up_logs(model.log_format)
    group = DeviceGroup(settings.rank, settings.size)
    loaded = loaded_or_refused(connection, lambda: model.load(settings.rank, settings.size, group))
    if loaded is None:
        return
    try:
        _run(connection, settings, model.engine, *loaded)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # rank 0 ended while a rank loaded
    except Exception:
        logger.exception("rank %d ends", settings.rank)
        # the usual end could wait for the other ranks, which would not learn of this one's
        os._exit(1)


def _run(
    connection: Channel,
    settings: RankSettings,
    engine: EngineConfig,
    model: DeviceModel,
    rank: DeviceRank,
) -> None:
    """Meet the other ranks, and run the steps that rank 0 sends."""
    connection.send(RankReady())
    # ranks load at different speeds, and the meeting waits for a short time only
    message = connection.recv()
    assert isinstance(message, MeetOthers)
    rank.group.meet(settings.store, model.device)
    try:
        executor = sized_rank(model, engine, rank, OtherRankExecutor)
    except ConfigError as error:
        # rank 0 has an error too, and ends this process; earlier it would take its end for a death
        logger.error("rank %d ends: %s", settings.rank, error)
        if isinstance(error, StepTooLargeError):
            # rank 0 may have no error, and wait for this rank on its GPU
            os._exit(1)
        connection.recv()
        raise
    follow(connection, model.device, executor.follow)
