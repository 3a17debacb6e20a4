"""Loads a model over tensor-parallel ranks: rank 0's executor, and the other ranks' processes."""

import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.executors.cpu.kernels import cpu_kernels
from engine.executors.eager import EagerExecutor
from engine.executors.parallel.executor import ParallelExecutor
from engine.executors.parallel.group import RankGroup, RankLostError
from engine.executors.parallel.messages import MeetOthers, RankReady
from engine.executors.parallel.native_layers import use_native_layers
from engine.executors.parallel.rank_loop import run_rank
from engine.executors.parallel.ranks import Ranks, RankSettings
from engine.executors.parallel.shares import RankShare
from engine.model.attention import KvMemoryError
from engine.model.transformer import Transformer
from server.allocator import keep_freed_memory
from server.logs import set_up_logs
from server.memory_nodes import spread_over_nodes
from server.model_loading import plan_loading
from server.model_options import ModelOptions
from server.rank_loading import checked_share, loaded_or_refused
from weights.checkpoints.checkpoint import open_checkpoint
from weights.checkpoints.shard_loading import copied_bytes, load_share
from weights.checkpoints.table_loading import check_checksums

RANK_ENTRY = "server.parallel_engine:main"
_CPU = torch.device("cpu")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShareSettings:
    """The model and the KV blocks that every rank loads its share of.

    Attributes:
        folder: the checkpoint folder.
        dtype: dtype of the weights.
        table_dtype: as in ``ModelOptions``.
        table_sharding: as in ``RankShare``.
        num_blocks, block_size: the KV blocks, of which each rank has its heads.
        log_format: as in ``MonitoringOptions``.
    """

    folder: Path
    dtype: torch.dtype
    table_dtype: str
    table_sharding: str
    num_blocks: int
    block_size: int
    log_format: str

    def load(self, share: RankShare, group: RankGroup) -> Transformer:
        """Load one rank's model; errors as ``load_share``."""
        model = load_share(self.folder, share, group, self.dtype, self.table_dtype)
        if (kernels := cpu_kernels(_CPU, self.dtype)) is not None:
            use_native_layers(model, kernels)
        return model


def parallel_executor(
    options: ModelOptions,
    folder: Path,
    engine: EngineConfig,
    log_format: str = "text",
    on_rank_death: Callable[[], object] = lambda: None,
) -> ParallelExecutor:
    """Start the other ranks, load this rank's share, and return the executor of all ranks.

    Call it in the main thread, see ``Ranks``. ``on_rank_death`` is called, in a thread, when
    another rank dies after it has loaded its share.

    Raises:
        CheckpointError: the model cannot be served.
        ConfigError: a setting does not fit the model or the number of ranks.
        RankLostError: another rank died while it loaded.
    """
    share, settings = _planned(options, folder, engine, log_format)
    ranks = Ranks(RANK_ENTRY, share.size, settings)
    try:
        group = RankGroup(0, share.size)
        model = settings.load(share, group)
        sizes = settings.num_blocks, settings.block_size
        executor = ParallelExecutor(model, *sizes, share, ranks)
        ranks.wait_until_ready()
        ranks.watch(on_rank_death)
        ranks.send([MeetOthers()] * (share.size - 1))
        group.meet(ranks.store)
        ranks.delete_store()
    except KvMemoryError as error:
        ranks.close()
        raise ConfigError("kv_cache_gib: the machine has too little memory for it") from error
    except BaseException:
        ranks.close()
        raise
    has_kernels = cpu_kernels(_CPU, settings.dtype) is not None
    logger.info(
        "executor: %d tensor-parallel ranks, %s layers in %s%s",
        share.size,
        "native" if has_kernels else "torch's",
        settings.dtype,
        f", value tables by {share.table_sharding}" if share.config.memory is not None else "",
    )
    return executor


def _planned(
    options: ModelOptions, folder: Path, engine: EngineConfig, log_format: str
) -> tuple[RankShare, ShareSettings]:
    """Rank 0's share and the settings of all ranks, checked before any rank starts."""
    checked = checked_share(options, folder, engine)
    share, config = checked.share, checked.share.config
    copies = (share.size - 1) * copied_bytes(checked.weights, share, checked.dtype)
    plan = plan_loading(options, folder, engine, _CPU, keep_stored=False, copy_bytes=copies)
    if plan.shares.cache_bytes is not None:
        raise ConfigError(
            "tensor_parallel: needs memory for the whole value tables; this machine has too little"
        )
    if options.verify_tables:
        check_checksums(checked.tables)
    if plan.shares.kv_bytes is not None:
        engine = replace(engine, kv_cache_gib=plan.shares.kv_bytes / 2**30)
    # the memory of all ranks together, so that all have the same number of blocks
    per_token = config.kv_bytes_per_token(plan.dtype.itemsize)
    return share, ShareSettings(
        folder=folder,
        dtype=plan.dtype,
        table_dtype=options.table_dtype,
        table_sharding=share.table_sharding,
        num_blocks=engine.num_kv_blocks(per_token, config.max_positions),
        block_size=engine.block_size,
        log_format=log_format,
    )


def main(connection: Connection, settings: RankSettings) -> None:
    """Load one rank's share and run it until rank 0 ends; if it cannot be loaded, send why."""
    model = settings.model
    assert isinstance(model, ShareSettings)
    keep_freed_memory()
    set_up_logs(model.log_format)
    spread_over_nodes(os.sched_getaffinity(0))
    group = RankGroup(settings.rank, settings.size)

    def load() -> EagerExecutor:
        config = open_checkpoint(model.folder)[0].model
        share = RankShare(config, settings.rank, settings.size, model.table_sharding)
        sizes = model.num_blocks, model.block_size
        return EagerExecutor(model.load(share, group), *sizes, kv_config=share.kv_config)

    executor = loaded_or_refused(connection, load)
    if executor is None:
        return
    try:
        connection.send(RankReady())
        # ranks load at different speeds, and the meeting waits for a short time only
        message = connection.recv()
        assert isinstance(message, MeetOthers)
        group.meet(settings.store)
        run_rank(executor, connection)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # rank 0 ended while a rank loaded
    except RankLostError as error:
        logger.error("rank %d ends: %s", settings.rank, error)
        sys.exit(1)
    finally:
        group.leave()
