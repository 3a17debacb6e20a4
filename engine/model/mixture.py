"""The mixture-of-experts feed-forward, with Mixtral's semantics and names.

T tokens, D model width, E experts, K experts per token ("Mixtral of Experts", arXiv 2401.04088).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from engine.model.config import MixtureConfig
from engine.model.forward_trace import ForwardTrace
from engine.model.row_patches import ForwardPatches
from engine.model.uninitialised import ExactLinear, Linear


class Expert(nn.Module):
    """SwiGLU: ``w2(silu(w1 x) * w3 x)``; parameters uninitialised."""

    def __init__(self, hidden_size: int, size: int) -> None:
        super().__init__()
        self.w1 = Linear(hidden_size, size, bias=False)
        self.w2 = Linear(size, hidden_size, bias=False)
        self.w3 = Linear(hidden_size, size, bias=False)

    def forward(self, x_LD: Tensor) -> Tensor:
        y_LD: Tensor = self.w2(silu(self.w1(x_LD)) * self.w3(x_LD))
        return y_LD


class MixtureFeedForward(nn.Module):
    """A router and its experts; parameters uninitialised. See ``mix_experts``."""

    def __init__(self, config: MixtureConfig, hidden_size: int) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.gate = ExactLinear(hidden_size, config.num_experts, bias=False)
        sizes = [config.expert_size] * config.num_experts
        self.experts = nn.ModuleList(Expert(hidden_size, size) for size in sizes)

    def forward(
        self,
        x_TD: Tensor,
        trace: ForwardTrace | None = None,
        patches: ForwardPatches | None = None,
    ) -> Tensor:
        """Return ``[T, D]``; add the router's logits to ``trace``."""
        logits_TE = self.gate(x_TD)
        if trace is not None:
            trace.router_logits.append(logits_TE)
        return mix_experts(x_TD, logits_TE, list(self.experts), self.top_k)


def mix_experts(
    x_TD: Tensor, logits_TE: Tensor, experts: Sequence[Callable[[Tensor], Tensor]], top_k: int
) -> Tensor:
    """The weighted sum of the ``top_k`` experts with the largest router logits of each token:

        p = softmax(logits) in fp32;  y = sum over the K largest of p_e / (their sum) * expert_e(x)

    Returns ``[T, D]`` in the dtype of ``x``.
    """
    chosen_TK = logits_TE.float().softmax(-1).topk(top_k)
    weights_TK = chosen_TK.values / chosen_TK.values.sum(-1, keepdim=True)
    # (token, expert) pairs sorted by expert, then by token
    order_L = chosen_TK.indices.flatten().argsort(stable=True)
    counts = chosen_TK.indices.flatten().bincount(minlength=len(experts)).tolist()
    tokens_L = order_L // top_k
    parts = torch.split(x_TD.index_select(0, tokens_L), counts)
    outs = [expert(part) for expert, part in zip(experts, parts, strict=True) if len(part)]
    y_LD = torch.cat(outs) if outs else x_TD[:0]
    weights_L1 = weights_TK.flatten().index_select(0, order_L).unsqueeze(1)
    y_LD = (y_LD * weights_L1.to(y_LD.dtype)).to(x_TD.dtype)
    return torch.zeros_like(x_TD).index_add(0, tokens_L, y_LD)
