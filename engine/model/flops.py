"""Counts floating-point operations per token and per step, from the model's shapes."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise

from engine.model.config import MEMORY_KINDS, ModelConfig


def forward_flops(config: ModelConfig, attended: float) -> Mapping[str, int]:
    """Multiplications and additions of one token's forward, by part of the model.

    Norms, activations and softmaxes are not counted; a backward pass takes twice as many.
    ``attended`` is the mean number of tokens that a token attends to.

    Returns:
        ``attention``, ``feed_forward`` (dense and experts), ``head``, and ``memory``, which
        includes ``scoring`` (half scores and the sums that rows are chosen by).
    """
    parts: Counter[str] = Counter(head=2 * config.hidden_size * config.vocab_size)
    for layer in range(config.num_layers):
        parts.update(_layer_flops(config, layer, attended))
    return parts


def total_flops(flops: Mapping[str, int]) -> int:
    """The sum of ``forward_flops``; ``memory`` includes ``scoring``."""
    return sum(count for part, count in flops.items() if part != "scoring")


class StepFlops:
    """Multiplications and additions of serving steps of one model."""

    def __init__(self, config: ModelConfig) -> None:
        layers = [total_flops(_layer_flops(config, i, 0)) for i in range(config.num_layers)]
        self._num_layers, self._all, self._largest = len(layers), sum(layers), max(layers)
        self._pair = 4 * config.num_heads * config.head_dim
        self._head = 2 * config.hidden_size * config.vocab_size

    def of(
        self, query_starts: Sequence[int], context_lengths: Sequence[int], num_logits: int
    ) -> tuple[int, int]:
        """Operations of a whole step, and of its largest piece: one layer, or the logits.

        The sequences are those of a ``TokenLayout`` and its ``PagedKv``.
        """
        counts = [end - start for start, end in pairwise(query_starts)]
        # each token attends to itself and all before it
        attended = sum(
            count * (length - count) + count * (count + 1) // 2
            for count, length in zip(counts, context_lengths, strict=True)
        )
        num_tokens, attention = query_starts[-1], attended * self._pair
        head = num_logits * self._head
        whole = num_tokens * self._all + self._num_layers * attention + head
        return whole, max(num_tokens * self._largest + attention, head)


def _layer_flops(config: ModelConfig, layer: int, attended: float) -> Mapping[str, int]:
    """Operations of one token in one layer, by part."""
    width, kind = config.hidden_size, config.feed_forward[layer]
    heads = config.num_heads * config.head_dim
    projections = width * (2 * heads + 2 * config.num_kv_heads * config.head_dim)
    parts = Counter(attention=2 * projections + int(4 * heads * attended))
    if config.has_dense(layer):
        parts["feed_forward"] += 6 * width * config.intermediate_size
    if kind in MEMORY_KINDS:
        own = _memory_flops(config, kind)
        parts.update(own)
        parts["memory"] += own["scoring"]
    elif kind == "moe":
        assert config.mixture is not None
        experts = 3 * config.mixture.top_k * config.mixture.expert_size
        parts["feed_forward"] += 2 * width * (experts + config.mixture.num_experts)
    return parts


def _memory_flops(config: ModelConfig, kind: str) -> Mapping[str, int]:
    memory = config.memory
    assert memory is not None
    width, value_dim = config.hidden_size, memory.value_dim
    query = width * memory.num_heads * memory.query_dim
    # two halves, each N subkeys by half the query's width
    halves = memory.num_heads * memory.num_subkeys * memory.query_dim
    rows = memory.num_heads * memory.top_k * value_dim * (2 if kind == "peer" else 1)
    gated = kind == "memory_plus"
    projected = gated or (kind == "pkm" and memory.value_projection)
    products = query + rows + (gated + projected) * width * value_dim + memory.output_gate * width
    return {"memory": 2 * products, "scoring": 2 * halves + memory.num_heads * memory.top_k**2}
