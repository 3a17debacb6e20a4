"""Makes a decoder layer's feed-forward, and defines the dense kind."""

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.functional import silu

from engine.model.config import MEMORY_KINDS, ModelConfig
from engine.model.forward_trace import ForwardTrace
from engine.model.memory_layer import MemoryLayer
from engine.model.mixture import MixtureFeedForward
from engine.model.row_patches import ForwardPatches
from engine.model.uninitialised import Linear


class DenseFeedForward(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))`` (arXiv 2002.05202); parameters uninitialised."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size, bias = config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(config.hidden_size, size, bias=bias)
        self.up_proj = Linear(config.hidden_size, size, bias=bias)
        self.down_proj = Linear(size, config.hidden_size, bias=bias)

    def forward(
        self,
        x_TD: Tensor,
        trace: ForwardTrace | None = None,
        patches: ForwardPatches | None = None,
    ) -> Tensor:
        """Return ``[T, D]``; nothing is added to ``trace``, and nothing is patched."""
        y_TD: Tensor = self.down_proj(silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))
        return y_TD


class NamedFeedForward(NamedTuple):
    """A layer's feed-forward, and the name of its parameters in checkpoints."""

    name: str
    module: nn.Module


def make_feed_forward(config: ModelConfig, layer: int) -> NamedFeedForward:
    """Make one layer's feed-forward, of the kind that the config names."""
    kind = config.feed_forward[layer]
    if kind == "dense":
        return NamedFeedForward("mlp", DenseFeedForward(config))
    if kind == "moe":
        assert config.mixture is not None  # ModelConfig checked it
        mixture = MixtureFeedForward(config.mixture, config.hidden_size)
        return NamedFeedForward("block_sparse_moe", mixture)
    assert kind in MEMORY_KINDS and config.memory is not None
    memory = MemoryLayer(config.memory, kind, config.hidden_size, config.rms_norm_eps, layer)
    return NamedFeedForward("memory", memory)
