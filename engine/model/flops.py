"""What a token costs: floating-point operations of a forward, by the shapes of the model alone."""

from collections import Counter
from collections.abc import Mapping
from itertools import pairwise

from engine.model.config import ModelConfig
from engine.model.layout import TokenLayout


def forward_flops(config: ModelConfig, attended: float) -> Mapping[str, int]:
    """Multiplications and additions of one token, by part of the model.

    Norms, activations and softmaxes are left out, and a table's rows cost what they are multiplied
    by: a memory of any size reads as many. ``attended`` is how many tokens a token sees, on
    average. A backward pass takes twice as many.

    Returns:
        ``attention``, ``feed_forward`` (dense ones and experts), ``memory``, of which ``scoring``
        (half scores and the sums that rows are chosen by), and ``head``.
    """
    parts: Counter[str] = Counter(head=2 * config.hidden_size * config.vocab_size)
    for kind in config.feed_forward:
        parts.update(_layer_flops(config, kind, attended))
    return parts


def total_flops(flops: Mapping[str, int]) -> int:
    """Of one token's forward; ``scoring`` is a part of ``memory``."""
    return sum(count for part, count in flops.items() if part != "scoring")


class StepFlops:
    """Multiplications and additions of serving steps of one model."""

    def __init__(self, config: ModelConfig) -> None:
        layers = [total_flops(_layer_flops(config, kind, 0)) for kind in config.feed_forward]
        self._num_layers, self._all, self._largest = len(layers), sum(layers), max(layers)
        self._pair = 4 * config.num_heads * config.head_dim
        self._head = 2 * config.hidden_size * config.vocab_size

    def of(self, layout: TokenLayout, num_logits: int) -> tuple[int, int]:
        """Those of a whole step, and of its largest piece: one layer, or the logits."""
        assert layout.paged is not None
        counts = [end - start for start, end in pairwise(layout.query_starts)]
        # each token attends to itself and all before it
        attended = sum(
            count * (length - count) + count * (count + 1) // 2
            for count, length in zip(counts, layout.paged.context_lengths, strict=True)
        )
        num_tokens, attention = layout.query_starts[-1], attended * self._pair
        head = num_logits * self._head
        whole = num_tokens * self._all + self._num_layers * attention + head
        return whole, max(num_tokens * self._largest + attention, head)


def _layer_flops(config: ModelConfig, kind: str, attended: float) -> Mapping[str, int]:
    """The parts of one token in one layer."""
    width = config.hidden_size
    heads = config.num_heads * config.head_dim
    projections = width * (2 * heads + 2 * config.num_kv_heads * config.head_dim)
    parts = Counter(attention=2 * projections + int(4 * heads * attended))
    if kind == "dense":
        parts["feed_forward"] += 6 * width * config.intermediate_size
    elif kind == "moe":
        assert config.mixture is not None
        experts = 3 * config.mixture.top_k * config.mixture.expert_size
        parts["feed_forward"] += 2 * width * (experts + config.mixture.num_experts)
    else:
        own = _memory_flops(config, kind)
        parts.update(own)
        parts["memory"] += own["scoring"]
    return parts


def _memory_flops(config: ModelConfig, kind: str) -> Mapping[str, int]:
    memory = config.memory
    assert memory is not None
    width, value_dim = config.hidden_size, memory.value_dim
    query = width * memory.num_heads * memory.query_dim
    # two halves of N subkeys by half the query's width
    halves = memory.num_heads * memory.num_subkeys * memory.query_dim
    rows = memory.num_heads * memory.top_k * value_dim * (2 if kind == "peer" else 1)
    projected = kind == "memory_plus" or (kind == "pkm" and memory.value_projection)
    products = query + rows + (width * value_dim if kind == "memory_plus" else 0)
    products += width * value_dim if projected else 0
    products += width if memory.output_gate else 0
    return {"memory": 2 * products, "scoring": 2 * halves + memory.num_heads * memory.top_k**2}
