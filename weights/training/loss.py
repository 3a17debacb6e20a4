"""The loss of packed sequences: cross entropy of each token that follows another."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from engine.model.layout import TokenLayout
from engine.model.transformer import Transformer
from weights.training.token_stream import PackedTokens


class BatchLoss(NamedTuple):
    """What a batch costs: ``nats`` of all its targets, and what an even use of experts asks.

    Both are fp32; ``penalty`` is None without experts.
    """

    nats: Tensor
    penalty: Tensor | None

    @property
    def total(self) -> Tensor:
        """What training makes small."""
        return self.nats if self.penalty is None else self.nats + self.penalty


def batch_loss(model: Transformer, batch: PackedTokens, dtype: torch.dtype) -> BatchLoss:
    """Run the model; products in ``dtype`` where that is bfloat16."""
    device = model.model.embed_tokens.weight.device
    ids_T, targets_T, positions_T = (
        torch.from_numpy(part).to(device)
        for part in (batch.ids_T, batch.targets_T, batch.positions_T)
    )
    layout = TokenLayout(positions_T, batch.starts)
    every_T = torch.arange(len(ids_T), device=device)
    mixture = model.config.mixture
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
        out = model(ids_T, layout, every_T, with_trace=mixture is not None)
    nats = functional.cross_entropy(out.logits_LV.float(), targets_T, reduction="sum")
    if mixture is None:
        return BatchLoss(nats, None)
    balance = load_balancing_loss(out.router_logits, mixture.top_k)
    return BatchLoss(nats, balance * (mixture.router_loss_weight * len(ids_T)))


def load_balancing_loss(router_logits: Sequence[Tensor], top_k: int) -> Tensor:
    """``E sum_e f_e p_e``: f counts the choices of expert e a token, p is its mean probability.

    Over the tokens of all layers together, as Mixtral's; it is ``top_k`` where all experts are used
    alike ("Switch Transformers", arXiv 2101.03961, equation 4), and 0 without tokens.
    """
    probabilities_LE = torch.cat([logits.float() for logits in router_logits]).softmax(-1)
    if not len(probabilities_LE):
        return probabilities_LE.sum()
    num_experts = probabilities_LE.shape[1]
    chosen_LK = probabilities_LE.topk(top_k).indices
    counts_E = functional.one_hot(chosen_LK, num_experts).sum(1).float().mean(0)
    return num_experts * (counts_E * probabilities_LE.mean(0)).sum()
