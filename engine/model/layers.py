"""One decoder layer: attention and a feed-forward, each after a norm, added to the residual."""

from torch import Tensor, nn

from engine.model.attention import Attention
from engine.model.config import ModelConfig
from engine.model.feed_forward import make_feed_forward
from engine.model.forward_trace import ForwardTrace
from engine.model.layout import TokenLayout
from engine.model.norm import RmsNorm


class DecoderLayer(nn.Module):
    """One pre-norm block; its feed-forward has the same name as in checkpoints."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self._feed_forward_name, feed_forward = make_feed_forward(config, layer)
        self.add_module(self._feed_forward_name, feed_forward)

    @property
    def feed_forward(self) -> nn.Module:
        """The layer's feed-forward, of any kind."""
        return self.get_submodule(self._feed_forward_name)

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
        y_TD: Tensor = self.feed_forward(self.post_attention_layernorm(x_TD), trace, layout.patches)
        return x_TD + y_TD
