"""Layers of a tensor-parallel rank, whose outputs are summed or gathered over all ranks."""

from dataclasses import replace

from torch import Tensor, nn
from torch.nn.functional import linear, pad

from engine.executors.parallel.collectives import Collectives
from engine.executors.parallel.shares import RankShare
from engine.model.config import MixtureConfig
from engine.model.forward_trace import ForwardTrace
from engine.model.mixture import MixtureFeedForward
from engine.model.row_patches import ForwardPatches
from engine.model.uninitialised import Linear


class SummedLinear(Linear):
    """A layer that has the weights of this rank's inputs: ``y = sum over ranks of W x, + b``."""

    def __init__(self, inputs: int, outputs: int, bias: bool, group: Collectives) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.group = group

    def forward(self, x_TI: Tensor) -> Tensor:
        y_TO = self.group.sum(linear(x_TI, self.weight))
        return y_TO if self.bias is None else y_TO + self.bias


class GatheredColumns(nn.Module):
    """The columns ``[T, V / size]`` of all ranks, for memory layers without value projection."""

    def __init__(self, group: Collectives) -> None:
        super().__init__()
        self.group = group

    def forward(self, x_TV: Tensor) -> Tensor:
        return self.group.gather_columns(x_TV)


class SummedMixture(MixtureFeedForward):
    """A mixture with some of the inner columns of each expert, and the whole router."""

    def __init__(self, config: MixtureConfig, columns: int, width: int, group: Collectives) -> None:
        super().__init__(replace(config, expert_size=columns), width)
        self.group = group

    def forward(
        self,
        x_TD: Tensor,
        trace: ForwardTrace | None = None,
        patches: ForwardPatches | None = None,
    ) -> Tensor:
        return self.group.sum(super().forward(x_TD, trace, patches))


class GatheredLogits:
    """Logits of all tokens, of which each rank computes some."""

    def __init__(self, share: RankShare, group: Collectives) -> None:
        self.share, self.group = share, group
        self.width = -(-share.config.vocab_size // share.size)

    def __call__(self, hidden_LD: Tensor, weight_VD: Tensor) -> Tensor:
        """The product of the last hidden states with the head's whole weight ``[V, D]``."""
        return self.of_all_ranks(self.own_logits(hidden_LD, weight_VD))

    def of_all_ranks(self, own_LW: Tensor) -> Tensor:
        """The logits of all tokens, from those of this rank's."""
        own_LW = pad(own_LW, (0, self.width - own_LW.shape[1]))
        return self.group.gather_columns(own_LW)[:, : self.share.config.vocab_size]

    def own_rows(self, weight_VD: Tensor) -> Tensor:
        """The rows of the head's weight that this rank multiplies."""
        tokens = self.share.vocabulary
        return weight_VD[tokens.start : tokens.stop]

    def own_logits(self, hidden_LD: Tensor, weight_VD: Tensor) -> Tensor:
        """The logits of this rank's tokens."""
        return linear(hidden_LD, self.own_rows(weight_VD))
