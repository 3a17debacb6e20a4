"""Configuration of an exported model, for Hugging Face's transformers."""

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig


class MemplusConfig(PretrainedConfig):
    """Shapes and options of a decoder.

    ``feed_forward`` names each layer's kind: dense, moe, memory_plus, pkm or peer. ``memory`` and
    ``mixture`` have the shapes of memory layers and of experts. ``rope_frequencies`` are radians
    per position for each pair of lanes; queries and keys are multiplied by ``rope_amplitude``.
    """

    model_type = "memplus"

    def __init__(
        self,
        vocab_size: int = 2,
        hidden_size: int = 2,
        intermediate_size: int = 2,
        num_hidden_layers: int = 1,
        num_attention_heads: int = 1,
        num_key_value_heads: int = 1,
        head_dim: int = 2,
        max_position_embeddings: int = 2048,
        rms_norm_eps: float = 1e-5,
        rope_frequencies: Sequence[float] = (1.0,),
        rope_amplitude: float = 1.0,
        attention_bias: bool = False,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        mlp_bias: bool = False,
        feed_forward: Sequence[str] = ("dense",),
        memory: dict[str, Any] | None = None,
        mixture: dict[str, Any] | None = None,
        tie_word_embeddings: bool = False,
        **settings: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_frequencies = list(rope_frequencies)
        self.rope_amplitude = rope_amplitude
        self.attention_bias = attention_bias
        self.qkv_bias = qkv_bias
        self.qk_norm = qk_norm
        self.mlp_bias = mlp_bias
        self.feed_forward = list(feed_forward)
        self.memory = memory
        self.mixture = mixture
        # older versions of transformers set it in the constructor
        super().__init__(**settings | {"tie_word_embeddings": tie_word_embeddings})
        self.tie_word_embeddings = tie_word_embeddings
