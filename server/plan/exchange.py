"""Exchanges of tensor-parallel ranks in a step: their number, bytes and time."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from engine.config import EngineConfig
from engine.model.config import MEMORY_KINDS, ModelConfig
from server.plan.machine import Link

_WIDE = 4  # bytes of a sum over table rows, and of a logit on a GPU, which are in fp32
# on GPUs, rank 0 gives the others the token that each running sequence got last
_LAST_TOKENS = 8 * EngineConfig.max_num_seqs


class Collective(NamedTuple):
    """One exchange of all ranks.

    ``num_bytes`` are those of the tensor that an ``all-reduce`` sums, that an ``all-gather`` or a
    ``broadcast`` gives to each rank, or of which an ``all-to-all`` gives each rank some columns.
    """

    kind: str
    num_bytes: int

    def sent_bytes(self, size: int) -> float:
        """Bytes that each of ``size`` ranks sends, at least.

        A ring sends each part of a sum around twice: to sum it, and to spread the sum.
        """
        if self.kind == "broadcast":
            return self.num_bytes
        times = 2 if self.kind == "all-reduce" else 1
        return times * self.num_bytes * (size - 1) / size


@dataclass(frozen=True)
class Exchange:
    """The collectives of a model's ranks, as in the table of ``docs/parallel.md``.

    Attributes:
        config: the whole model.
        size: the number of ranks.
        table_sharding: that of ``RankShare``.
        itemsize: bytes of a number of the residual stream.
        is_on_gpu: whether each rank has a GPU, whose logits are in fp32.
    """

    config: ModelConfig
    size: int
    table_sharding: str
    itemsize: int
    is_on_gpu: bool

    def collectives(self, tokens: int, num_logits: int) -> list[Collective]:
        """All exchanges of a step, in their order; none if there is one rank."""
        if self.size == 1:
            return []
        found = [Collective("broadcast", _LAST_TOKENS)] if self.is_on_gpu else []
        found += self._of_layers(tokens)
        if num_logits:
            # ranks have equal numbers of logits, of which the last one's may be padding
            vocabulary = self.size * -(-self.config.vocab_size // self.size)
            itemsize = _WIDE if self.is_on_gpu else self.itemsize
            found.append(Collective("all-gather", num_logits * vocabulary * itemsize))
        return found

    def sent_bytes(self, tokens: int, num_logits: int) -> float:
        """Bytes that each rank sends in a step."""
        return sum(one.sent_bytes(self.size) for one in self.collectives(tokens, num_logits))

    def seconds(self, tokens: int, num_logits: int, link: Link) -> float:
        """The time of a step's exchanges; nothing overlaps with them."""
        count = len(self.collectives(tokens, num_logits))
        transfer = self.sent_bytes(tokens, num_logits) / link.gb_per_s / 1e9
        return count * link.latency_s + transfer

    def _of_layers(self, tokens: int) -> Iterator[Collective]:
        config = self.config
        residual = Collective("all-reduce", tokens * config.hidden_size * self.itemsize)
        for layer, kind in enumerate(config.feed_forward):
            yield residual  # behind the output projection of attention
            if kind in MEMORY_KINDS:
                yield from self._of_memory(tokens, kind, residual)
            if config.has_dense(layer) or kind == "moe":
                yield residual

    def _of_memory(self, tokens: int, kind: str, residual: Collective) -> Iterator[Collective]:
        memory = self.config.memory
        assert memory is not None
        values = tokens * memory.value_dim
        if kind == "peer":
            yield Collective("all-reduce", tokens * memory.num_heads * memory.top_k * _WIDE)
        if self.table_sharding == "rows":
            yield Collective("all-to-all", values * _WIDE)
        if kind == "memory_plus" or (kind == "pkm" and memory.value_projection):
            yield residual
        else:
            yield Collective("all-gather", values * self.itemsize)
