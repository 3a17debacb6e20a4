"""Tensors kept on the device between steps: KV blocks, block table, last tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.model.attention import kv_memory
from engine.model.config import ModelConfig


@dataclass(frozen=True)
class DeviceState:
    """Tensors on the device.

    Attributes:
        kv_blocks: ``[layers, blocks, 2, G, block_size, E]``; the last block is scrap, for padding.
        block_table_PB: int32, the KV blocks of the sequence in each seat.
        last_token_P: int64, the token that each seat got last.
        logits_LV: fp32, memory for the logits of a step.
        chosen_L: int64, memory for the tokens that a step chooses.
    """

    kv_blocks: Tensor
    block_table_PB: Tensor
    last_token_P: Tensor
    logits_LV: Tensor
    chosen_L: Tensor

    @classmethod
    def allocate(
        cls,
        model: ModelConfig,
        config: EngineConfig,
        num_blocks: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "DeviceState":
        """Zeros on a device, with keys and values in ``dtype`` unless they are fp8.

        Raises:
            KvMemoryError: the device cannot provide the KV memory.
        """
        seats = config.max_num_seqs
        kv_dtype = torch.uint8 if config.kv_dtype == "fp8" else dtype
        # independent of ``num_blocks``: kernels are compiled for the table's width
        length = min(config.max_model_len or model.max_positions, model.max_positions)
        most_blocks = -(-length // config.block_size)
        like = torch.empty(0, dtype=kv_dtype, device=device)
        return cls(
            kv_memory(model, num_blocks + 1, config.block_size, like),
            torch.zeros(seats, most_blocks, dtype=torch.int32, device=device),
            torch.zeros(seats, dtype=torch.int64, device=device),
            torch.zeros(seats, model.vocab_size, dtype=torch.float32, device=device),
            torch.zeros(seats, dtype=torch.int64, device=device),
        )
