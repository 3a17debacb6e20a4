"""Decoder of an exported model, for Hugging Face's transformers, in plain torch.

``memplus export --to transformers`` copies the files of this folder next to the weights, and
``AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`` runs them. They need only
torch and transformers.

Symbols: B sequences, Q new tokens of each, L tokens with those in the cache, T = B Q, D model
width, H heads, G KV heads, E head width, K experts per token, P pairs of lanes.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, scaled_dot_product_attention, silu
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_memplus import MemplusConfig
from .memory_memplus import Memory, ValueTables, rms_norm


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight``, with statistics in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: MemplusConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        width, bias = config.hidden_size, config.attention_bias or config.qkv_bias
        query_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, query_size, bias=bias)
        self.k_proj = nn.Linear(width, kv_size, bias=bias)
        self.v_proj = nn.Linear(width, kv_size, bias=bias)
        self.o_proj = nn.Linear(query_size, width, bias=config.attention_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(
        self, x_BQD: Tensor, angles: tuple[Tensor, Tensor], mask_B1QL: Tensor, cache: Any
    ) -> Tensor:
        q_BHQE, k_BGQE, v_BGQE = (
            projection(x_BQD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q_BHQE, k_BGQE = self.q_norm(q_BHQE), self.k_norm(k_BGQE)
        q_BHQE, k_BGLE, v_BGLE = rotate(q_BHQE, angles), rotate(k_BGQE, angles), v_BGQE
        if cache is not None:
            # a static cache returns places that are not written yet, too
            length = mask_B1QL.shape[-1]
            both = cache.update(k_BGLE, v_BGLE, self.layer)
            k_BGLE, v_BGLE = (one[:, :, :length] for one in both)
        out_BHQE = scaled_dot_product_attention(
            q_BHQE, k_BGLE, v_BGLE, attn_mask=mask_B1QL, enable_gqa=True
        )
        out: Tensor = self.o_proj(out_BHQE.transpose(1, 2).flatten(2))
        return out


def rotate(x_BHQE: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each head, pairing lanes e and e + E / 2."""
    cos, sin = angles
    first, second = x_BHQE.chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x_BHQE.dtype)


class DenseFeedForward(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: MemplusConfig) -> None:
        super().__init__()
        width, size, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(width, size, bias=bias)
        self.up_proj = nn.Linear(width, size, bias=bias)
        self.down_proj = nn.Linear(size, width, bias=bias)

    def forward(self, x_TD: Tensor, tables: nn.Module | None) -> Tensor:
        out: Tensor = self.down_proj(silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))
        return out


class Expert(nn.Module):
    """SwiGLU: ``w2(silu(w1 x) * w3 x)``."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, size, bias=False)
        self.w2 = nn.Linear(size, width, bias=False)
        self.w3 = nn.Linear(width, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(silu(self.w1(x)) * self.w3(x))
        return out


class Mixture(nn.Module):
    """Experts and a router that chooses some for each token, as in Mixtral."""

    def __init__(self, config: MemplusConfig) -> None:
        super().__init__()
        shape, width = config.mixture or {}, config.hidden_size
        self.top_k = shape["top_k"]
        self.gate = nn.Linear(width, shape["num_experts"], bias=False)
        experts = (Expert(width, shape["expert_size"]) for _ in range(shape["num_experts"]))
        self.experts = nn.ModuleList(experts)

    def forward(self, x_TD: Tensor, tables: nn.Module | None) -> Tensor:
        weights_TK, chosen_TK = self.gate(x_TD).float().softmax(-1).topk(self.top_k)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        y_TD = torch.zeros_like(x_TD)
        for number, expert in enumerate(self.experts):
            tokens, places = (chosen_TK == number).nonzero(as_tuple=True)
            y_LD = expert(x_TD[tokens]) * weights_TK[tokens, places].unsqueeze(1)
            y_TD = y_TD.index_add(0, tokens, y_LD.to(y_TD.dtype))
        return y_TD


class Layer(nn.Module):
    """Attention, then a feed-forward, a memory or both, after norms, added to the residual."""

    def __init__(self, config: MemplusConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        kind = config.feed_forward[layer]
        names = {"dense": ["mlp"], "moe": ["block_sparse_moe"]}
        self.names = names.get(kind, ["memory"])
        if self.names == ["memory"] and (config.memory or {})["placement"] == "beside":
            self.names.append("mlp")
        kinds = {"mlp": DenseFeedForward, "block_sparse_moe": Mixture}
        for name in self.names:
            made = kinds[name](config) if name in kinds else Memory(config, kind)
            self.add_module(name, made)

    def forward(
        self,
        x_BQD: Tensor,
        angles: tuple[Tensor, Tensor],
        mask_B1QL: Tensor,
        cache: Any,
        tables: nn.Module | None,
    ) -> Tensor:
        x_BQD = x_BQD + self.self_attn(self.input_layernorm(x_BQD), angles, mask_B1QL, cache)
        normed_TD = self.post_attention_layernorm(x_BQD).flatten(0, 1)
        for name in self.names:
            x_BQD = x_BQD + self.get_submodule(name)(normed_TD, tables).view_as(x_BQD)
        return x_BQD


class Decoder(nn.Module):
    """Embedding, layers and last norm."""

    def __init__(self, config: MemplusConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = (Layer(config, i) for i in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MemplusForCausalLM(PreTrainedModel, GenerationMixin):
    """A decoder whose feed-forwards are dense, mixtures of experts, or memory layers."""

    config_class = MemplusConfig
    base_model_prefix = "model"
    _no_split_modules: Any = ("Layer",)
    _supports_sdpa = True
    # the loss is a mean: a trainer must not pass the number of items
    accepts_loss_kwargs = False

    def __init__(self, config: MemplusConfig) -> None:
        super().__init__(config)
        self.model = Decoder(config)
        self.lm_head: nn.Linear | None = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.memory: ValueTables | None = None
        if config.memory is not None and config.memory["share_values"]:
            self.memory = ValueTables(config.memory, "peer" in config.feed_forward)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of token ids."""
        embedding: nn.Module = self.model.embed_tokens
        return embedding

    def get_output_embeddings(self) -> nn.Module | None:
        """The head; None if the embedding's weight computes the logits."""
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **settings: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the last ``logits_to_keep`` tokens, or of all (0); arguments as those of Llama.

        ``attention_mask`` is ``[B, L]``, 0 for padding. ``cache_position``, which old versions of
        transformers send, follows from the cache. Raises ValueError for arguments that have no use.
        """
        for name in settings.keys() - {"cache_position"}:
            raise ValueError(f"{name}: is not supported")
        if output_attentions:
            raise ValueError("output_attentions: attention weights are never computed")
        if return_dict is False:
            raise ValueError("return_dict: must be true")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: give one of them")
        x_BQD = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache()
        past = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        mask_B1QL = attention_mask_of(x_BQD, past, attention_mask)
        if position_ids is None:
            position_ids = positions_of(x_BQD, past, attention_mask)
        angles = self.angles(position_ids)
        states = [x_BQD]
        for layer in self.model.layers:
            x_BQD = layer(x_BQD, angles, mask_B1QL, past_key_values, self.memory)
            states.append(x_BQD)
        x_BQD = states[-1] = self.model.norm(x_BQD)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        logits_BQV = linear(x_BQD[:, kept], head.weight)
        return CausalLMOutputWithPast(
            loss=None if labels is None else next_token_loss(logits_BQV, labels),
            logits=logits_BQV,
            past_key_values=past_key_values,
            hidden_states=tuple(states) if output_hidden_states else None,
        )

    def angles(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[B, 1, Q, P]`` in fp32."""
        frequencies_P = torch.tensor(
            self.config.rope_frequencies, dtype=torch.float32, device=position_ids.device
        )
        angles_B1QP = position_ids[:, None, :, None].float() * frequencies_P
        amplitude = self.config.rope_amplitude
        return angles_B1QP.cos() * amplitude, angles_B1QP.sin() * amplitude


def attention_mask_of(x_BQD: Tensor, past: int, attention_mask: Tensor | None) -> Tensor:
    """Which tokens each token attends to, ``[B or 1, 1, Q, L]``: earlier ones and itself.

    A mask that transformers has already prepared in this form, for a static cache, stays as it is.
    """
    new = x_BQD.shape[1]
    visible_QL = torch.ones(new, past + new, dtype=torch.bool, device=x_BQD.device).tril(past)
    if attention_mask is None:
        return visible_QL[None, None]
    if attention_mask.dim() == 4:
        return attention_mask
    if attention_mask.shape != (x_BQD.shape[0], past + new):
        raise ValueError(
            f"attention_mask: must be [sequences, tokens], here {(x_BQD.shape[0], past + new)},"
            f" not {tuple(attention_mask.shape)}"
        )
    # padding attends to itself, since a softmax over nothing is NaN
    self_QL = visible_QL.tril(past).triu(past)
    return (visible_QL & attention_mask[:, None, None, :].bool()) | self_QL


def positions_of(x_BQD: Tensor, past: int, attention_mask: Tensor | None) -> Tensor:
    """Positions ``[B or 1, Q]``; padding in a mask ``[B, L]`` does not count."""
    if attention_mask is None or attention_mask.dim() == 4:
        return torch.arange(past, past + x_BQD.shape[1], device=x_BQD.device)[None]
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]


def next_token_loss(logits_BQV: Tensor, labels_BQ: Tensor) -> Tensor:
    """Mean cross entropy of each token's successor; labels of -100 do not count."""
    if logits_BQV.shape[1] != labels_BQ.shape[1]:
        raise ValueError("labels: need the logits of all tokens (logits_to_keep=0)")
    return cross_entropy(logits_BQV[:, :-1].flatten(0, 1).float(), labels_BQ[:, 1:].flatten())
