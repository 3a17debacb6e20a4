"""Loads a model for serving: checks settings, chooses the tables' tier, makes executors."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.executors.cpu.kernels import CPU_LIBRARY
from engine.executors.executor import Executor, check_kv_settings, make_executor
from engine.executors.lookahead import LookaheadConfig
from engine.model.config import ModelConfig
from engine.model.transformer import Transformer
from server.model_options import DEFAULT_TABLE_CACHE_BYTES, ModelOptions
from weights.checkpoints.checkpoint import load_model
from weights.checkpoints.config_json import CheckpointConfig, read_config
from weights.checkpoints.gpu_tier import GpuTierChoice
from weights.checkpoints.machine_bytes import MachineBytes
from weights.checkpoints.memory_request import MemoryRequest, MemoryShares
from weights.checkpoints.model_bytes import ModelBytes, model_bytes
from weights.checkpoints.table_tier import CpuTierChoice
from weights.grammars.grammar_memory import GRAMMARS_BYTES

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A loaded model with its serving settings.

    Attributes:
        model: the network with its value tables, on its device.
        config: the configuration of its checkpoint.
        dtype: the dtype to serve in, whatever dtypes the weights are stored in.
        kv_bytes: bytes for its KV blocks; None on a GPU leaves the size to the executor, which
            measures the memory that is left.
        lookahead: settings of the row prefetch; None without prefetch.
        weight_dtype: auto, int8 or int4; see ``make_executor``.
    """

    model: Transformer
    config: CheckpointConfig
    dtype: torch.dtype
    kv_bytes: int | None
    lookahead: LookaheadConfig | None
    weight_dtype: str = "auto"


def served_executor(loaded: LoadedModel, engine: EngineConfig) -> Executor:
    """The executor of ``served_engine``."""
    if loaded.kv_bytes is not None:
        engine = replace(engine, kv_cache_gib=loaded.kv_bytes / 2**30)
    return make_executor(loaded.model, engine, loaded.lookahead, loaded.dtype, loaded.weight_dtype)


def load_served(
    options: ModelOptions,
    folder: Path,
    engine: EngineConfig | None,
    device: torch.device,
    *,
    keep_stored: bool = False,
) -> LoadedModel:
    """Load a folder's model, with its value tables in the tier that ``options`` and memory allow.

    The tables leave enough memory for the KV blocks of ``engine``; without it none are needed.
    ``device`` comes from ``chosen_device``. With ``keep_stored``, weights in groups stay so,
    and on the CPU all keep their stored dtypes: only an executor can run the model.

    Raises:
        CheckpointError: as ``load_model``.
        ConfigError: as ``load_model``; or the model cannot prefetch that far or that many rows, or
            ``options`` shares it between ranks.
    """
    if options.tensor_parallel > 1:
        raise ConfigError(
            "tensor_parallel: this command runs the model in one process; leave it out"
        )
    plan = plan_loading(options, folder, engine, device, keep_stored=keep_stored)
    shares, lookahead = plan.shares, plan.lookahead
    model, config = load_model(
        folder,
        options.dtype,
        shares.cache_bytes,
        device=device,
        host_cache=shares.host_cache_bytes,
        table_dtype=options.table_dtype,
        verify_tables=options.verify_tables,
        keep_stored=keep_stored,
    )
    tables = model.tables.values()
    if lookahead is not None and all(table.fetched_capacity is None for table in tables):
        logger.warning("all value tables are in memory: --table-lookahead has no effect")
        lookahead = None
    return LoadedModel(model, config, plan.dtype, shares.kv_bytes, lookahead, options.weight_dtype)


@dataclass(frozen=True)
class LoadingPlan:
    """Dtypes and memory of a model that is about to be loaded; the settings have been checked.

    Attributes:
        dtype: the dtype to serve in.
        shares: the bytes that KV blocks and row caches get.
        lookahead: as in ``LoadedModel``.
    """

    dtype: torch.dtype
    shares: MemoryShares
    lookahead: LookaheadConfig | None


def plan_loading(
    options: ModelOptions,
    folder: Path,
    engine: EngineConfig | None,
    device: torch.device,
    *,
    keep_stored: bool,
    machine: MachineBytes | None = None,
) -> LoadingPlan:
    """Check the settings and choose the tables' tier, before minutes are spent on loading them.

    ``machine`` is given if only some ranks of a tensor-parallel model run on this machine, or all:
    the shares are then those of these ranks. The other arguments and the errors are those of
    ``load_served``.
    """
    checkpoint = read_config(folder)
    described = checkpoint.model
    has_kernels = device.type == "cpu" and CPU_LIBRARY.best_build is not None
    if options.weight_dtype != "auto":
        _check_rounding(options.weight_dtype, folder, checkpoint, has_kernels=has_kernels)
    if engine is not None and device.type == "cpu":
        check_kv_settings(engine, described, has_kernels=has_kernels)
    lookahead = _lookahead(options, described) if options.table_lookahead else None
    kv_dtype = engine.kv_dtype if engine else "auto"
    reads_groups = keep_stored and (has_kernels or device.type != "cpu")
    packed_dtype = options.weight_dtype if reads_groups else None
    sizes = model_bytes(folder, options.dtype, options.table_dtype, kv_dtype, packed_dtype, device)
    kv_bytes = engine.kv_bytes(sizes.kv_per_token, described.max_positions) if engine else 0
    patch_bytes = engine.patch_bytes if engine and described.takes_patches else 0
    weights, tables = sizes.weights, sizes.tables
    if machine is not None:
        kv_bytes, patch_bytes = machine.kv_bytes(kv_bytes), int(patch_bytes * machine.columns)
        weights, tables = machine.weights, machine.tables
    request = MemoryRequest(
        kv_bytes=kv_bytes,
        requested_cache=options.table_cache_bytes if options.table_cache is not None else None,
        default_cache=DEFAULT_TABLE_CACHE_BYTES,
        tier=options.table_tier,
        is_kv_requested=engine is not None and engine.kv_cache_gib is not None,
        grammar_bytes=GRAMMARS_BYTES if engine else 0,
        patch_bytes=patch_bytes,
    )
    choice = _tier_choice(request, device, engine or EngineConfig(), sizes)
    shares = choice.shares(tables, weights)
    return LoadingPlan(sizes.dtype, shares, lookahead)


def _check_rounding(
    weight_dtype: str, folder: Path, checkpoint: CheckpointConfig, *, has_kernels: bool
) -> None:
    """Raise ConfigError unless the weights of a folder can be rounded at load."""
    if checkpoint.has_groups:
        raise ConfigError(
            f"weight_dtype: the weights of {folder} have few bits already; leave the option out"
        )
    if not has_kernels:
        raise ConfigError(f"weight_dtype: {weight_dtype} needs memplus's native library")


def _tier_choice(
    request: MemoryRequest, device: torch.device, engine: EngineConfig, sizes: ModelBytes
) -> CpuTierChoice | GpuTierChoice:
    if device.type == "cpu":
        return CpuTierChoice(request, largest_cache=sizes.disk_cache)
    return GpuTierChoice(request, device, engine.gpu_memory_utilization, sizes.host_cache)


def _lookahead(options: ModelOptions, model: ModelConfig) -> LookaheadConfig:
    """The prefetch settings of ``options``, checked against the model; at least 1 row."""
    if model.memory is None:
        raise ConfigError("table_lookahead: this model has no memory layers")
    most = model.memory_layers[-1] + 1
    if options.table_lookahead > most:
        raise ConfigError(
            f"table_lookahead: must be at most {most}, the layers up to the last memory layer,"
            f" not {options.table_lookahead}"
        )
    top_k, num_subkeys = model.memory.top_k, model.memory.num_subkeys
    candidates = max(1, round(options.lookahead_share * top_k))
    if candidates > num_subkeys:
        raise ConfigError(
            f"table_lookahead_share: {options.lookahead_share} of {top_k} rows is {candidates}"
            f" rows, but at most {num_subkeys} can be predicted, the number of subkeys"
        )
    return LookaheadConfig(options.table_lookahead, candidates)
