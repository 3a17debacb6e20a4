"""Memory for the KV blocks of all layers."""

import torch
from torch import Tensor

from engine.model.config import ModelConfig
from memory_ops.anonymous import anonymous_zeros


def kv_memory(config: ModelConfig, num_blocks: int, block_size: int, like: Tensor) -> Tensor:
    """Zeros ``[layers, blocks, 2, G, block_size, E]`` on the device and in the dtype of ``like``.

    On a CPU, blocks that were never written occupy no memory.

    Raises:
        OSError: the system cannot provide the memory.
    """
    shape = (config.num_layers, num_blocks, 2, config.num_kv_heads, block_size, config.head_dim)
    if like.device.type == "cpu":
        return anonymous_zeros(shape, like.dtype)
    return torch.zeros(shape, dtype=like.dtype, device=like.device)
