"""A mixture of experts on the GPU, without waiting for the router's choices."""

import torch
from torch import Tensor

from engine.executors.cuda.kernels import mixture as kernels
from engine.executors.cuda.kernels.rms_norm import rms_norm
from engine.executors.cuda.products import joined, joined_experts, norm_of
from engine.executors.cuda.step_tokens import StepTokens
from engine.executors.parallel.layers import SummedMixture
from engine.model.forward_trace import ForwardTrace
from engine.model.mixture import Expert, MixtureFeedForward
from engine.model.norm import RmsNorm


class CudaMixture:
    """A ``MixtureFeedForward`` with its norm and residual sum. It takes the experts' weights."""

    def __init__(self, mixture: MixtureFeedForward, norm: RmsNorm) -> None:
        self._norm, self._top_k = norm_of(norm), mixture.top_k
        # a rank's experts have some of their columns
        self._group = mixture.group if isinstance(mixture, SummedMixture) else None
        self._router = joined(mixture.gate)
        experts = [expert for expert in mixture.experts if isinstance(expert, Expert)]
        assert len(experts) == len(mixture.experts)
        gate_up = [(expert.w1, expert.w3) for expert in experts]
        self._gate_up_E2IK = joined_experts(gate_up)
        self._down_EDI = joined_experts([(expert.w2,) for expert in experts])

    def run(self, residual_TD: Tensor, tokens: StepTokens, trace: ForwardTrace) -> Tensor:
        x_TD = tokens.with_padding(rms_norm(residual_TD, *self._norm))
        logits_TE = self._router(x_TD)
        trace.router_logits.append(logits_TE)
        weights = self._gate_up_E2IK, self._down_EDI
        if self._group is None:
            return kernels.mixture(residual_TD, x_TD, logits_TE, *weights, self._top_k)
        part_TD = torch.zeros_like(residual_TD)
        kernels.mixture(part_TD, x_TD, logits_TE, *weights, self._top_k)
        return residual_TD.add_(self._group.sum(part_TD))
