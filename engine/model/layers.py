"""One decoder layer: attention, and a feed-forward, a memory or both, after norms."""

from torch import Tensor, nn

from engine.model.attention import Attention
from engine.model.config import ModelConfig
from engine.model.feed_forward import DenseFeedForward, make_feed_forward
from engine.model.forward_trace import ForwardTrace
from engine.model.layout import TokenLayout
from engine.model.memory_layer import MemoryLayer
from engine.model.norm import RmsNorm


class DecoderLayer(nn.Module):
    """One pre-norm block; its modules have the names of checkpoints.

    If a layer has a memory and a feed-forward, both read the same normed residual stream.

    Attributes:
        memory: the layer's memory, if it has one.
    """

    memory: MemoryLayer | None

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.register_module("memory", None)
        self._feed_forward_name, module = make_feed_forward(config, layer)
        self.add_module(self._feed_forward_name, module)
        if self.memory is not None and config.has_dense(layer):
            self._feed_forward_name = "mlp"
            self.mlp = DenseFeedForward(config)

    @property
    def feed_forward(self) -> nn.Module | None:
        """The layer's feed-forward; None if a memory replaces it."""
        module = self.get_submodule(self._feed_forward_name)
        return None if module is self.memory else module

    def forward(
        self,
        x_TD: Tensor,
        layout: TokenLayout,
        angles: tuple[Tensor, Tensor],
        kv_blocks: Tensor | None = None,
        trace: ForwardTrace | None = None,
    ) -> Tensor:
        """Return the new residual stream; the arguments are those of ``Attention.forward``."""
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), layout, angles, kv_blocks)
        normed_TD = self.post_attention_layernorm(x_TD)
        for module in (self.memory, self.feed_forward):
            if module is not None:
                x_TD = x_TD + module(normed_TD, trace, layout.patches)
        return x_TD
