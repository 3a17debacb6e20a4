"""A mixture of experts with packed weights."""

from collections.abc import Callable

from torch import Tensor

from engine.executors.cpu.kernels import CpuKernels
from engine.executors.cpu.packing import pack_linear
from engine.model.forward_trace import ForwardTrace
from engine.model.mixture import Expert, MixtureFeedForward, mix_experts
from engine.model.norm import RmsNorm


class CpuMixture:
    """A ``MixtureFeedForward`` with packed weights, norm and residual sum included."""

    def __init__(self, kernels: CpuKernels, mixture: MixtureFeedForward, norm: RmsNorm) -> None:
        self._kernels, self._norm, self._top_k = kernels, norm, mixture.top_k
        self._router = pack_linear(kernels, mixture.gate)
        self._experts = [
            _pack_expert(kernels, expert)
            for expert in mixture.experts
            if isinstance(expert, Expert)
        ]

    def run(self, residual_TD: Tensor, trace: ForwardTrace | None) -> Tensor:
        """Return the new residual stream; the router's logits are added to ``trace``."""
        x_TD = self._norm(residual_TD)
        logits_TE = self._kernels.linear(self._router, x_TD)
        if trace is not None:
            trace.router_logits.append(logits_TE)
        return residual_TD + mix_experts(x_TD, logits_TE, self._experts, self._top_k)


def _pack_expert(kernels: CpuKernels, expert: Expert) -> Callable[[Tensor], Tensor]:
    gate_up = pack_linear(kernels, expert.w1, expert.w3, is_gated=True)
    down = pack_linear(kernels, expert.w2)
    return lambda x_LD: kernels.linear(down, kernels.linear(gate_up, x_LD))
