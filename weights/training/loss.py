"""Loss of packed sequences: next-token cross entropy, and load balancing of experts."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from engine.model.layout import TokenLayout
from engine.model.transformer import ForwardOutput, Transformer
from weights.training.token_stream import PackedTokens


class BatchLoss(NamedTuple):
    """Loss of a batch, fp32 scalars.

    Attributes:
        nats: sum of the cross entropy over all targets.
        penalty: weighted load-balancing loss; None without experts.
    """

    nats: Tensor
    penalty: Tensor | None

    @property
    def total(self) -> Tensor:
        """The loss that training minimises."""
        return self.nats if self.penalty is None else self.nats + self.penalty


def batch_output(
    model: Transformer,
    batch: PackedTokens,
    dtype: torch.dtype,
    *,
    with_logits: bool = True,
    with_trace: bool = False,
) -> ForwardOutput:
    """Run the model on a batch, with logits of all tokens or of none.

    Uses autocast if ``dtype`` is bfloat16.
    """
    device = model.model.embed_tokens.weight.device
    ids_T, positions_T = (
        torch.from_numpy(part).to(device) for part in (batch.ids_T, batch.positions_T)
    )
    layout = TokenLayout(positions_T, batch.starts)
    wanted_L = torch.arange(len(ids_T) if with_logits else 0, device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
        output: ForwardOutput = model(ids_T, layout, wanted_L, with_trace=with_trace)
    return output


def batch_loss(model: Transformer, batch: PackedTokens, dtype: torch.dtype) -> BatchLoss:
    """Run the model and compute its loss, with autocast to ``dtype`` if that is bfloat16."""
    mixture = model.config.mixture
    out = batch_output(model, batch, dtype, with_trace=mixture is not None)
    targets_T = torch.from_numpy(batch.targets_T).to(out.logits_LV.device)
    nats = functional.cross_entropy(out.logits_LV.float(), targets_T, reduction="sum")
    if mixture is None:
        return BatchLoss(nats, None)
    balance = load_balancing_loss(out.router_logits, mixture.top_k)
    return BatchLoss(nats, balance * (mixture.router_loss_weight * len(targets_T)))


def load_balancing_loss(router_logits: Sequence[Tensor], top_k: int) -> Tensor:
    """``E sum_e f_e p_e``: f_e is the mean choices of expert e per token, p_e its mean probability.

    Means are over the tokens of all layers together, as in Mixtral. The loss is ``top_k`` if all
    experts are used equally, and 0 without tokens. Source: "Switch Transformers" (arXiv
    2101.03961), equation 4.
    """
    probabilities_LE = torch.cat([logits.float() for logits in router_logits]).softmax(-1)
    if not len(probabilities_LE):
        return probabilities_LE.sum()
    num_experts = probabilities_LE.shape[1]
    chosen_LK = probabilities_LE.topk(top_k).indices
    counts_E = functional.one_hot(chosen_LK, num_experts).sum(1).float().mean(0)
    return num_experts * (counts_E * probabilities_LE.mean(0)).sum()
