"""Makes the CUDA executor of a model, with the KV blocks that the GPU's memory allows."""

import logging

import torch

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.executors.cuda.device import CudaDevice
from engine.executors.cuda.executor import CudaExecutor
from engine.executors.cuda.sizing import GpuMemory, num_kv_blocks
from engine.executors.cuda.step import DeviceModel
from engine.executors.lookahead import LookaheadConfig
from engine.model.attention import KvMemoryError
from engine.model.transformer import Transformer

logger = logging.getLogger(__name__)


def sized_executor(
    model: Transformer, config: EngineConfig, lookahead: LookaheadConfig | None = None
) -> CudaExecutor:
    """The executor of a model whose weights are on a GPU.

    Raises:
        ConfigError: the GPU's memory cannot hold the KV blocks, or the largest step.
    """
    weight = model.model.norm.weight
    device = CudaDevice(weight.device)
    logger.info(
        "executor: cuda, Triton kernels on %s in %s",
        torch.cuda.get_device_name(weight.device),
        weight.dtype,
    )
    try:
        device_model = DeviceModel(model, lookahead)
        # one block is enough to measure what a step takes
        probe = CudaExecutor(device_model, config, device, num_blocks=1)
        memory = GpuMemory(weight.device)
        itemsize = weight.dtype.itemsize
        num_blocks = num_kv_blocks(model.config, config, itemsize, memory, probe.run_largest)
        del probe
        return CudaExecutor(device_model, config, device, num_blocks)
    except (torch.OutOfMemoryError, KvMemoryError) as error:
        raise ConfigError(
            "max_batched_tokens: the largest step does not fit in the GPU's memory; lower"
            " --max-batched-tokens, --max-num-seqs or --table-cache, or use --table-tier host"
        ) from error
