"""A mixture of experts for a feed-forward, with Mixtral's semantics and names.

T tokens, D model width, E experts, K of them a token ("Mixtral of Experts", arXiv 2401.04088).
"""

import torch
from torch import Tensor, nn

from engine import ops
from engine.model.config import MixtureConfig
from engine.model.forward_trace import ForwardTrace
from engine.model.norm import RmsNorm
from engine.model.uninitialised import Linear
from engine.ops.native.library import NativeOps


class Expert(nn.Module):
    """SwiGLU: ``w2(silu(w1 x) * w3 x)``; parameters uninitialised."""

    def __init__(self, hidden_size: int, size: int) -> None:
        super().__init__()
        self.w1 = Linear(hidden_size, size, bias=False)
        self.w2 = Linear(size, hidden_size, bias=False)
        self.w3 = Linear(hidden_size, size, bias=False)
        self.gate_up = ops.Projection(self.w1, self.w3, is_gated=True)
        self.down = ops.Projection(self.w2)

    def forward(self, x_LD: Tensor) -> Tensor:
        return ops.linear(ops.linear(x_LD, self.gate_up), self.down)


class MixtureFeedForward(nn.Module):
    """The K experts that a token's router likes best, weighted:

        p = softmax(W x) in fp32;  y = sum over the K largest of p_e / (their sum) * expert_e(x)

    Parameters are uninitialised.
    """

    def __init__(self, config: MixtureConfig, hidden_size: int, norm: RmsNorm) -> None:
        """``norm``, the decoder layer's own, is applied to what comes in."""
        super().__init__()
        self.top_k = config.top_k
        self.gate = Linear(hidden_size, config.num_experts, bias=False)
        sizes = [config.expert_size] * config.num_experts
        self.experts = nn.ModuleList(Expert(hidden_size, size) for size in sizes)
        self.router = ops.Projection(self.gate)
        self._norm = (norm,)  # the decoder layer's, and no part of this module

    def pack(self, native: NativeOps) -> None:
        """Lay the weights out for serving; see ``Projection.pack``."""
        self.router.pack(native)
        for expert in self.experts:
            assert isinstance(expert, Expert)
            expert.gate_up.pack(native)
            expert.down.pack(native)

    def forward(self, residual_TD: Tensor, trace: ForwardTrace | None) -> Tensor:
        """Return the new residual stream; what the router said is added to ``trace``."""
        (norm,) = self._norm
        x_TD = norm(residual_TD)
        logits_TE = ops.linear(x_TD, self.router)
        if trace is not None:
            trace.router_logits.append(logits_TE)
        chosen_TK = logits_TE.float().softmax(-1).topk(self.top_k)
        weights_TK = chosen_TK.values / chosen_TK.values.sum(-1, keepdim=True)
        # reads in the order of their experts, and for each expert of their tokens
        order_L = chosen_TK.indices.flatten().argsort(stable=True)
        counts = chosen_TK.indices.flatten().bincount(minlength=len(self.experts)).tolist()
        tokens_L = order_L // self.top_k
        parts = x_TD.index_select(0, tokens_L).split(counts)
        outs = [expert(part) for expert, part in zip(self.experts, parts, strict=True) if len(part)]
        y_LD = torch.cat(outs) if outs else x_TD[:0]
        weights_L1 = weights_TK.flatten().index_select(0, order_L).unsqueeze(1)
        y_LD = (y_LD * weights_L1.to(y_LD.dtype)).to(residual_TD.dtype)
        return residual_TD + torch.zeros_like(residual_TD).index_add(0, tokens_L, y_LD)
