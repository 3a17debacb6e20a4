"""What a step must at least read and multiply, by the shapes of the model alone."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.machine_limits import MachineLimits
from engine.model.config import ModelConfig
from weights.checkpoint import expected_shapes

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Chunk:
    """Tokens of one sequence that a step runs: so many, after those that it has already."""

    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count


@dataclass(frozen=True)
class StepWork:
    """Bytes read and operations done, multiplications and additions counted each."""

    num_bytes: int
    flops: int

    def least_seconds(self, limits: MachineLimits) -> float:
        """The roofline: reading and multiplying go on at the same time, so the longer counts."""
        return max(self.num_bytes / limits.gb_per_s, self.flops / limits.gflops) / 1e9


class ModelWork:
    """The work of one model's steps.

    Every dense weight is read once a step, however many tokens there are: the head too, whether
    its own or the embedding's, if any logits are wanted. Rows that are looked up in the embedding,
    one a token, are next to nothing. Each sequence's keys and values are read once, those of the
    step included; a memory layer reads its rows for every token, no row of its table twice.
    Activations are taken to stay in the caches.
    """

    def __init__(self, config: ModelConfig, itemsize: int, row_bytes: int) -> None:
        """``itemsize`` is that of weights, keys and values; ``row_bytes`` that of a table's row."""
        shapes = expected_shapes(config)
        head = _EMBEDDING if config.tie_embeddings else _HEAD
        apart = {_EMBEDDING, _HEAD, *config.table_names}
        self._config = config
        self._itemsize = itemsize
        self._row_bytes = row_bytes
        self._head_weights = math.prod(shapes[head])
        self._layer_weights = sum(math.prod(shapes[name]) for name in set(shapes) - apart)

    def of(self, chunks: Iterable[Chunk], num_logits: int) -> StepWork:
        """The work of a step that runs these and makes logits at so many positions."""
        chunks = list(chunks)
        config = self._config
        tokens = sum(chunk.count for chunk in chunks)
        kept = sum(chunk.end for chunk in chunks)
        # pairs of a token and one that it attends to, itself and all before
        pairs = sum(chunk.count * (chunk.start + chunk.end + 1) // 2 for chunk in chunks)
        weights = self._layer_weights + (self._head_weights if num_logits else 0)
        return StepWork(
            num_bytes=weights * self._itemsize
            + kept * config.kv_bytes_per_token(self._itemsize)
            + self._table_bytes(tokens),
            flops=2 * self._layer_weights * tokens
            + 2 * self._head_weights * num_logits
            # a product with the key and one with the value
            + 4 * pairs * config.num_layers * config.num_heads * config.head_dim,
        )

    def _table_bytes(self, tokens: int) -> int:
        memory = self._config.memory
        if memory is None:
            return 0
        rows = min(tokens * memory.num_heads * memory.top_k, memory.num_rows)
        return rows * self._row_bytes * len(self._config.memory_layers)
