"""The loss of packed sequences: cross entropy of each token that follows another."""

import torch
from torch import Tensor
from torch.nn import functional

from engine.model.transformer import Transformer
from engine.ops.layout import TokenLayout
from weights.token_stream import PackedTokens


def summed_loss(model: Transformer, batch: PackedTokens, dtype: torch.dtype) -> Tensor:
    """Nats of all targets together, fp32; products in ``dtype`` where that is bfloat16."""
    device = model.model.embed_tokens.weight.device
    ids_T, targets_T, positions_T = (
        torch.from_numpy(part).to(device)
        for part in (batch.ids_T, batch.targets_T, batch.positions_T)
    )
    layout = TokenLayout(positions_T, batch.starts)
    every_T = torch.arange(len(ids_T), device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
        logits_TV = model(ids_T, layout, every_T).logits_LV
    return functional.cross_entropy(logits_TV.float(), targets_T, reduction="sum")
