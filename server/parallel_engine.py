"""Loads a model over tensor-parallel ranks: rank 0's executor, and the other ranks' processes."""

import logging
import os
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.executors.cpu.kernels import cpu_kernels
from engine.executors.eager import EagerExecutor
from engine.executors.parallel.channel import Channel
from engine.executors.parallel.executor import ParallelExecutor
from engine.executors.parallel.group import RankGroup, RankLostError
from engine.executors.parallel.messages import MeetOthers, RankReady
from engine.executors.parallel.native_layers import use_native_layers
from engine.executors.parallel.network_store import NetworkPlace, NetworkStore
from engine.executors.parallel.node_listener import NodeListener
from engine.executors.parallel.rank_loop import run_rank
from engine.executors.parallel.ranks import AFTER_ANOTHER, Ranks, RankSettings
from engine.executors.parallel.shares import RankShare
from engine.model.attention import KvMemoryError
from engine.model.transformer import Transformer
from server.allocator import keep_freed_memory
from server.logs import set_up_logs
from server.memory_nodes import spread_over_nodes
from server.model_loading import plan_loading
from server.model_options import ModelOptions
from server.node_options import NodeSettings
from server.node_traits import difference, node_traits
from server.rank_loading import checked_share, loaded_or_refused
from weights.checkpoints.checkpoint import open_checkpoint
from weights.checkpoints.machine_bytes import machine_bytes
from weights.checkpoints.shard_loading import load_share
from weights.checkpoints.table_loading import check_checksums

RANK_ENTRY = "server.parallel_engine:main"
# nodes may download their model first
JOIN_TIMEOUT_S = 600.0
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
    nodes: NodeSettings | None = None,
) -> ParallelExecutor:
    """Start the other ranks, load this rank's share, and return the executor of all ranks.

    Call it in the main thread, see ``Ranks``. ``on_rank_death`` is called, in a thread, when
    another rank dies, or a node leaves, after it has loaded its share. With ``nodes``, waits first
    until all of them have joined.

    Raises:
        CheckpointError: the model cannot be served.
        ConfigError: a setting does not fit the model or the number of ranks.
        RankLostError: another rank died while it loaded, or a node did not join or has left.
    """
    here = range(options.tensor_parallel) if nodes is None else nodes.ranks(0)
    share, settings = planned(options, folder, engine, log_format, here)
    if nodes is None:
        ranks, place = Ranks(RANK_ENTRY, share.size, settings), None
    else:
        ranks, settings, place = _gathered(nodes, share, settings, engine)
    try:
        group = RankGroup(0, share.size)
        model = settings.load(share, group)
        sizes = settings.num_blocks, settings.block_size
        executor = ParallelExecutor(model, *sizes, share, ranks)
        ranks.wait_until_ready()
        ranks.watch(on_rank_death)
        if place is None:
            ranks.send([MeetOthers()] * (share.size - 1))
            group.meet(ranks.store)
        else:
            with closing(NetworkStore(place.own)) as store:
                ranks.send([MeetOthers(store.port)] * (share.size - 1))
                group.meet_over_network(place, store.port)
        ranks.delete_store()
    except KvMemoryError as error:
        ranks.close()
        raise ConfigError("kv_cache_gib: the machine has too little memory for it") from error
    except BaseException:
        ranks.close()
        raise
    has_kernels = cpu_kernels(_CPU, settings.dtype) is not None
    logger.info(
        "executor: %d tensor-parallel ranks%s, %s layers in %s%s",
        share.size,
        "" if nodes is None else f" on {nodes.count} nodes",
        "native" if has_kernels else "torch's",
        settings.dtype,
        f", value tables by {share.table_sharding}" if share.config.memory is not None else "",
    )
    return executor


def _gathered(
    nodes: NodeSettings, share: RankShare, settings: ShareSettings, engine: EngineConfig
) -> tuple[Ranks, ShareSettings, NetworkPlace]:
    """All ranks but this one when all nodes have joined, and the settings that fit all nodes."""
    traits = traits_of(share, settings, engine, nodes)
    listener = NodeListener(nodes.address, nodes.port)
    others = {node: nodes.ranks(node) for node in range(1, nodes.count)}
    names = ", ".join(map(str, others))
    logger.info("waiting for node %s at %s port %d", names, listener.address, nodes.port)
    joined = listener.gather(
        nodes.key, others, lambda join: difference(traits, join.traits), JOIN_TIMEOUT_S
    )
    settings = replace(settings, num_blocks=min(settings.num_blocks, joined.num_blocks))
    place = NetworkPlace(listener.address, listener.address)
    try:
        joined.start(settings.num_blocks)
        started = nodes.ranks(0)[1:]
        made = Ranks(RANK_ENTRY, share.size, settings, started=started, place=place, nodes=joined)
    except BaseException:
        joined.close()
        raise
    return made, settings, place


def traits_of(
    share: RankShare, settings: ShareSettings, engine: EngineConfig, nodes: NodeSettings
) -> dict[str, str]:
    """``node_traits`` of this machine."""
    dtypes = settings.dtype, settings.table_dtype
    return node_traits(settings.folder, share, *dtypes, engine, nodes.count)


def planned(
    options: ModelOptions, folder: Path, engine: EngineConfig, log_format: str, ranks: range
) -> tuple[RankShare, ShareSettings]:
    """Rank 0's share and the settings of all ranks, checked before any rank starts.

    ``ranks`` are those of this machine, whose memory is checked.

    Raises:
        CheckpointError, ConfigError: as ``parallel_executor``.
    """
    checked = checked_share(options, folder, engine)
    share, config = checked.share, checked.share.config
    machine = machine_bytes(
        checked.weights, checked.tables, share, ranks, checked.dtype, options.table_dtype
    )
    plan = plan_loading(options, folder, engine, _CPU, keep_stored=False, machine=machine)
    if plan.shares.cache_bytes is not None:
        part = "whole" if len(ranks) == share.size else "its ranks' part of the"
        raise ConfigError(
            f"tensor_parallel: needs memory for {part} value tables; this machine has too little"
        )
    if options.verify_tables:
        check_checksums(checked.tables)
    if plan.shares.kv_bytes is not None:
        engine = replace(engine, kv_cache_gib=machine.whole_kv_bytes(plan.shares.kv_bytes) / 2**30)
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


def main(connection: Channel, settings: RankSettings) -> None:
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
        settings.meet(group, message)
        run_rank(executor, connection)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # rank 0 ended while a rank loaded
    except RankLostError as error:
        logger.error("rank %d ends: %s", settings.rank, error)
        sys.exit(AFTER_ANOTHER)
    finally:
        group.leave()
