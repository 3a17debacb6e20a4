"""The executor protocol, and the choice of a model's executor."""

import logging
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.executors.batch import Batch, LaunchedStep
from engine.executors.cpu.executor import CpuExecutor
from engine.executors.cpu.kernels import KV_STEP, cpu_kernels
from engine.executors.eager import EagerExecutor
from engine.executors.lookahead import LookaheadConfig
from engine.executors.memory_recorder import MemoryRecorder
from engine.model.attention import KvMemoryError
from engine.model.config import ModelConfig
from engine.model.grouped_layers import group_formats
from engine.model.row_patches import RowPatch
from engine.model.transformer import Transformer, converted
from engine.model.weight_bits import WEIGHT_BITS
from engine.progress import Progress
from memory_ops.tables.value_table import ValueTable

logger = logging.getLogger(__name__)


class Executor(Protocol):
    """Computes served steps of one model on one device. One thread calls it.

    Attributes:
        config: the model's shapes.
        num_blocks: number of KV blocks; the executor owns them and chooses their layout.
        tables: the model's value tables, by their names in checkpoints.
        recorder: the rows that memory layers read.
        progress: marked whenever a piece of a step is done.
        steps_ahead: number of steps that may be launched before an earlier one is waited for. If it
            is not 0, batches may hold pending tokens (see ``Batch``).
        balance_rows: number of tokens whose computation takes as long as the rest of a step, most
            of which reads weights. It need not be exact.
        device: the device on which the rows of patches must be.
    """

    config: ModelConfig
    num_blocks: int
    tables: Mapping[str, ValueTable]
    recorder: MemoryRecorder
    progress: Progress
    steps_ahead: int
    balance_rows: int
    device: torch.device

    def logits(self, batch: Batch) -> Tensor:
        """Run one batch up to its logits, ``[L, vocabulary]``, without choosing tokens."""
        ...

    def launch(self, batch: Batch) -> LaunchedStep:
        """Launch one batch: write its keys and values, choose and score its tokens.

        Steps run in the order of their launches. The batch may change after the call.

        Raises:
            TableReadError: rows of a value table could not be read.
            DeviceLostError: see ``LaunchedStep.wait``.
        """
        ...

    def warm_up(self) -> None:
        """Do the extra work of a first step; call it before any request."""
        ...

    def close(self) -> None:
        """End processes that the executor started, if any; call nothing afterwards."""
        ...


class RankedExecutor(Executor, Protocol):
    """The executor of rank 0 of a tensor-parallel model."""

    def share_patch(self, patch: RowPatch) -> RowPatch:
        """Give each rank its columns of a patch on the CPU; returns rank 0's. Any thread may call.

        Raises:
            RankLostError: a rank has died.
        """
        ...


def make_executor(
    model: Transformer,
    config: EngineConfig,
    lookahead: LookaheadConfig | None = None,
    dtype: torch.dtype | None = None,
    weight_dtype: str = "auto",
) -> Executor:
    """Make the fastest executor for a loaded model, with KV memory as configured.

    It computes in ``dtype``, by default the model's; on a GPU the weights have it already.
    ``weight_dtype`` int8 or int4 makes it round weights as ``CpuExecutor`` does; auto keeps them.
    The executor may copy the model's weights: a caller that only serves should drop the model. On
    the CPU the model stays as it is. On a GPU its layers share the weights of the executor, and get
    other formats if layers of one product have several (``in_one_format``).

    Raises:
        ConfigError: the KV memory is too small, or exceeds the machine's memory; a setting needs
            another device; weights to round have few bits already; or native kernels do not support
            the sizes of KV blocks.
        ValueError: ``dtype`` is not that of weights on a GPU.
    """
    weight = model.model.norm.weight
    dtype = dtype or model.dtype
    weight_bits = None if weight_dtype == "auto" else WEIGHT_BITS[weight_dtype]
    if weight_bits is not None and (stored := group_formats(model)):
        fewest = min(one.bits for one in stored.values())
        raise ConfigError(f"weight_dtype: the model's weights have {fewest} bits already")
    if weight.is_cuda:
        if weight_bits is not None:
            raise ConfigError(f"weight_dtype: {weight_dtype} needs a CPU")
        if config.kv_dtype == "int8":
            raise ConfigError("kv_dtype: int8 needs a CPU")
        if dtype is not weight.dtype:
            raise ValueError(f"dtype: {dtype}, but the weights on the GPU have {weight.dtype}")
        # imports triton, which a CPU does not need
        from engine.executors.cuda.sized_executor import sized_executor

        return sized_executor(model, config, lookahead)
    per_token = model.config.kv_bytes_per_token(dtype.itemsize, config.kv_dtype)
    num_blocks = config.num_kv_blocks(per_token, model.config.max_positions)
    kernels = cpu_kernels(weight.device, dtype)
    check_kv_settings(config, model.config, has_kernels=kernels is not None)
    try:
        if kernels is not None:
            logger.info("executor: cpu, native kernels (%s)", kernels.build)
            kv_dtype = torch.int8 if config.kv_dtype == "int8" else None
            sizes = num_blocks, config.block_size
            return CpuExecutor(model, kernels, *sizes, lookahead, dtype, weight_bits, kv_dtype)
        if weight_bits is not None:
            raise ConfigError(f"weight_dtype: {weight_dtype} needs memplus's native library")
        logger.info("executor: eager, plain torch on %s in %s", weight.device, dtype)
        return EagerExecutor(converted(model, dtype), num_blocks, config.block_size, lookahead)
    except KvMemoryError as error:
        kv_gib = num_blocks * config.block_size * per_token / 2**30
        message = f"kv_cache_gib: the machine cannot give {kv_gib:.3g} GiB"
        raise ConfigError(message) from error


def check_kv_settings(config: EngineConfig, model: ModelConfig, *, has_kernels: bool) -> None:
    """Raise ConfigError unless the CPU executor, or the eager one, supports the KV blocks."""
    if config.kv_dtype == "fp8":
        raise ConfigError("kv_dtype: fp8 needs a GPU")
    if not has_kernels:
        if config.kv_dtype == "int8":
            raise ConfigError("kv_dtype: int8 needs memplus's native library")
        return
    if config.block_size % KV_STEP:
        raise ConfigError(
            f"block_size: must be a multiple of {KV_STEP} on a CPU, not {config.block_size}"
        )
    if config.kv_dtype == "int8" and model.head_dim % KV_STEP:
        wanted = f"heads whose size is a multiple of {KV_STEP}"
        raise ConfigError(f"kv_dtype: int8 needs {wanted}, not {model.head_dim}")
