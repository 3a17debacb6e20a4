"""A mixture of experts with packed weights."""

from collections.abc import Callable

from torch import Tensor

from engine.executors.cpu.packing import Packer
from engine.model.forward_trace import ForwardTrace
from engine.model.mixture import Expert, MixtureFeedForward, mix_experts
from engine.model.norm import RmsNorm
from engine.model.row_patches import ForwardPatches


class CpuMixture:
    """A ``MixtureFeedForward`` with packed weights, norm and residual sum included."""

    def __init__(self, packer: Packer, mixture: MixtureFeedForward, norm: RmsNorm) -> None:
        self._kernels, self._norm = packer.kernels, packer.norm(norm)
        self._top_k = mixture.top_k
        self._router = packer.linear(mixture.gate)
        self._experts = [
            _pack_expert(packer, expert) for expert in mixture.experts if isinstance(expert, Expert)
        ]

    def run(
        self, residual_TD: Tensor, trace: ForwardTrace | None, patches: ForwardPatches | None
    ) -> Tensor:
        """Return the new residual stream; the router's logits are added to ``trace``."""
        x_TD = self._norm(residual_TD)
        logits_TE = self._kernels.linear(self._router, x_TD)
        if trace is not None:
            trace.router_logits.append(logits_TE)
        return residual_TD + mix_experts(x_TD, logits_TE, self._experts, self._top_k)


def _pack_expert(packer: Packer, expert: Expert) -> Callable[[Tensor], Tensor]:
    kernels, down = packer.kernels, packer.linear(expert.w2)
    gate_up = packer.linear(expert.w1, expert.w3, is_gated=True)
    return lambda x_LD: kernels.linear(down, kernels.linear(gate_up, x_LD))
