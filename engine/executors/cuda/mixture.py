"""A mixture of experts on the GPU, without waiting for the router's choices."""

from torch import Tensor, nn

from engine.executors.cuda.kernels import mixture as kernels
from engine.executors.cuda.kernels.rms_norm import rms_norm
from engine.executors.cuda.products import joined, norm_of
from engine.executors.cuda.step_tokens import StepTokens
from engine.model.forward_trace import ForwardTrace
from engine.model.mixture import Expert, MixtureFeedForward
from engine.model.norm import RmsNorm


class CudaMixture:
    """A ``MixtureFeedForward`` with its norm and residual sum. It takes the experts' weights."""

    def __init__(self, mixture: MixtureFeedForward, norm: RmsNorm) -> None:
        self._norm, self._top_k = norm_of(norm), mixture.top_k
        self._router = joined(mixture.gate)
        experts = [expert for expert in mixture.experts if isinstance(expert, Expert)]
        assert len(experts) == len(mixture.experts)
        size, width = experts[0].w1.weight.shape
        like = experts[0].w1.weight
        self._gate_up_E2IK = like.new_empty(len(experts), 2 * size, width)
        self._down_EDI = like.new_empty(len(experts), width, size)
        for index, expert in enumerate(experts):
            # one expert at a time: the model's weights become views, so there is no second copy
            gate_up, down = self._gate_up_E2IK[index], self._down_EDI[index]
            for layer, place in (
                (expert.w1, gate_up[:size]),
                (expert.w3, gate_up[size:]),
                (expert.w2, down),
            ):
                place.copy_(layer.weight)
                layer.weight = nn.Parameter(place, requires_grad=False)

    def run(self, residual_TD: Tensor, tokens: StepTokens, trace: ForwardTrace) -> Tensor:
        x_TD = tokens.with_padding(rms_norm(residual_TD, *self._norm))
        logits_TE = self._router(x_TD)
        trace.router_logits.append(logits_TE)
        weights = self._gate_up_E2IK, self._down_EDI
        return kernels.mixture(residual_TD, x_TD, logits_TE, *weights, self._top_k)
