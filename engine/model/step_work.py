"""Minimum bytes and operations of an engine step, computed from the model's shapes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import NamedTuple, Protocol

import torch

from engine.model.config import ModelConfig
from engine.model.flops import forward_flops, total_flops
from engine.model.grouped_weights import GroupFormat
from engine.model.machine_limits import MachineLimits
from engine.model.transformer import Transformer

_WEIGHT = ".weight"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Chunk:
    """Tokens of one sequence that a step runs: ``count`` of them after ``start`` earlier ones."""

    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def pairs(self) -> int:
        """Pairs of a token and a position that it attends to: itself and all earlier ones."""
        return self.count * (self.start + self.end + 1) // 2


@dataclass(frozen=True)
class StepWork:
    """Bytes read, and operations; an addition and a multiplication count as two.

    ``flops`` are those of values like the activations, ``integer_ops`` those of weights in groups.
    """

    num_bytes: int
    flops: int
    integer_ops: int = 0

    def __add__(self, other: "StepWork") -> "StepWork":
        return StepWork(
            self.num_bytes + other.num_bytes,
            self.flops + other.flops,
            self.integer_ops + other.integer_ops,
        )

    def least_seconds(self, limits: MachineLimits) -> float:
        """The roofline: reading and multiplying overlap, so the longer of the two counts."""
        products = self.flops / limits.gflops
        if self.integer_ops:
            products += self.integer_ops / limits.integer_gops
        return max(self.num_bytes / limits.gb_per_s, products) / 1e9


class WeightPart(Protocol):
    """A range of ``len`` indices of one dimension of a weight."""

    @property
    def dim(self) -> int: ...
    def __len__(self) -> int: ...


class WorkShare(Protocol):
    """The part of each step that one of several processes computes; see ``RankShare``."""

    @property
    def rank_config(self) -> ModelConfig: ...
    @property
    def vocabulary(self) -> Sequence[int]: ...
    @property
    def read_columns(self) -> Sequence[int]: ...
    @property
    def read_rows(self) -> Sequence[int]: ...
    def part(self, name: str) -> WeightPart | None: ...


class _Weights(NamedTuple):
    """Bytes of weights, and the number of those that are multiplied as integers."""

    num_bytes: int
    grouped: int


class ModelWork:
    """Lower bounds on the work of one model's steps.

    A step reads every dense weight once, whatever its number of tokens. It reads the head, tied or
    not, only if it computes logits. Embedding lookups are negligible. It reads each sequence's keys
    and values once, those of the step included. A memory layer reads the rows of every token, but
    no table row twice. A mixture reads the experts of one token, since all tokens may choose the
    same ones. Activations are assumed to stay in the caches.

    With a ``share`` this is the work of one process. It has its own part of the weights, heads and
    logits, and on average its part of the table rows.

    Attributes:
        config: the model, with the heads and feed-forward columns of the share.
        row_bytes: bytes per table row, or of a share's columns of it; 0 without tables.
        kv_bytes: bytes of one token's keys and values in all layers.
        has_groups: whether weights are multiplied as integers.
        read_fraction: the fraction of the values of each row that are read.
    """

    def __init__(
        self,
        config: ModelConfig,
        itemsize: int,
        row_bytes: int,
        formats: Mapping[str, GroupFormat] | None = None,
        kv_dtype: str = "auto",
        *,
        has_integer_products: bool = True,
        share: WorkShare | None = None,
    ) -> None:
        """Read the model's shapes.

        Args:
            config: the model.
            itemsize: bytes per weight, and by default per number of a key or value.
            row_bytes: bytes per table row, or of the share's columns of it.
            formats: formats of the layers whose weights are in groups, by name.
            kv_dtype: that of ``EngineConfig``.
            has_integer_products: whether weights in groups are multiplied as integers, as CPU
                kernels do; else as values.
            share: the part of one process, whose weights are not in groups; None computes all.
        """
        assert share is None or not formats
        weights = _weights(config, itemsize, formats or {}, share)
        if not has_integer_products:
            weights = {name: one._replace(grouped=0) for name, one in weights.items()}
        self.has_groups = any(one.grouped for one in weights.values())
        flops = dict(forward_flops(config, attended=0))
        self._head_flops = flops.pop("head")
        self._layer_flops = total_flops(flops)
        self.config, self.read_fraction, self._row_fraction = config, 1.0, 1.0
        if share is not None:
            self._head_flops = self._head_flops * len(share.vocabulary) // config.vocab_size
            self._layer_flops -= _flops_of_others(config, share)
            self.config = share.rank_config
            if config.memory is not None:
                self.read_fraction = len(share.read_columns) / config.memory.value_dim
                self._row_fraction = len(share.read_rows) / config.memory.num_rows
        self.kv_bytes = self.config.kv_bytes_per_token(itemsize, kv_dtype)
        self.row_bytes = row_bytes
        self._head = weights[_head_name(config)]
        layers = {name: one for name, one in weights.items() if name not in (_EMBEDDING, _HEAD)}
        self._experts = _total(one for name, one in layers.items() if ".experts." in name)
        self._layers = _total(one for name, one in layers.items() if ".experts." not in name)

    def of(self, chunks: Iterable[Chunk], num_logits: int) -> StepWork:
        """The work of a step that runs ``chunks`` and computes ``num_logits`` rows of logits."""
        chunks = list(chunks)
        return self.products(sum(chunk.count for chunk in chunks), num_logits) + self.attention(
            chunks
        )

    def products(self, tokens: int, num_logits: int) -> StepWork:
        """The part of a step that reads weights and table rows."""
        share = self._share_of_experts(tokens)
        weights = self._layers.num_bytes + (self._head.num_bytes if num_logits else 0)
        grouped = self._layers.grouped + round(self._experts.grouped * share)
        integer_ops = 2 * (grouped * tokens + self._head.grouped * num_logits)
        return StepWork(
            num_bytes=weights + round(self._experts.num_bytes * share) + self.table_bytes(tokens),
            flops=self._layer_flops * tokens + self._head_flops * num_logits - integer_ops,
            integer_ops=integer_ops,
        )

    def attention(self, chunks: Iterable[Chunk]) -> StepWork:
        """The part of a step that reads keys and values."""
        chunks, config = list(chunks), self.config
        pairs = sum(chunk.pairs for chunk in chunks)
        return StepWork(
            num_bytes=sum(chunk.end for chunk in chunks) * self.kv_bytes,
            # one product with the key, one with the value
            flops=4 * pairs * config.num_layers * config.num_heads * config.head_dim,
        )

    def seconds_in_turn(
        self,
        chunks: Iterable[Chunk],
        num_logits: int,
        limits: MachineLimits,
        micro_batches: int = 1,
    ) -> float:
        """The least time of a step whose products and attention take turns.

        On one device they do: attention waits for memory while products wait for arithmetic. Each
        of ``micro_batches`` reads the weights of all layers; the head is read once, after them.
        """
        chunks = list(chunks)
        tokens = sum(chunk.count for chunk in chunks)
        edges = [tokens * i // micro_batches for i in range(micro_batches + 1)]
        *earlier, last = (end - start for start, end in pairwise(edges))
        parts = [self.products(count, 0) for count in earlier] + [self.products(last, num_logits)]
        seconds = sum(part.least_seconds(limits) for part in parts)
        return seconds + self.attention(chunks).least_seconds(limits)

    def table_bytes(self, tokens: int) -> int:
        """Bytes of the table rows that a step of ``tokens`` tokens reads, a part of its bytes."""
        memory = self.config.memory
        if memory is None:
            return 0
        rows = min(tokens * memory.num_heads * memory.top_k, memory.num_rows)
        return round(rows * self._row_fraction * self.row_bytes) * self.config.table_lookups

    def _share_of_experts(self, tokens: int) -> float:
        """Share of the experts that a step reads if all tokens choose the same ones."""
        mixture = self.config.mixture
        return mixture.top_k / mixture.num_experts if mixture is not None and tokens else 0.0


def _head_name(config: ModelConfig) -> str:
    return _EMBEDDING if config.tie_embeddings else _HEAD


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(one.shape) for name, one in Transformer(config).state_dict().items()}


def _own_shape(
    config: ModelConfig, share: WorkShare | None, name: str, shape: tuple[int, ...]
) -> tuple[int, ...]:
    """The shape of what the share multiplies of a weight; of the head, some rows."""
    if share is None:
        return shape
    if name == _head_name(config):
        return (len(share.vocabulary), *shape[1:])
    part = share.part(name)
    if part is None:
        return shape
    return (*shape[: part.dim], len(part), *shape[part.dim + 1 :])


def _weights(
    config: ModelConfig,
    itemsize: int,
    formats: Mapping[str, GroupFormat],
    share: WorkShare | None,
) -> dict[str, _Weights]:
    found = {}
    for name, shape in _shapes(config).items():
        layer = name.removesuffix(_WEIGHT)
        if layer in formats:
            found[name] = _Weights(formats[layer].num_bytes(*shape), prod(shape))
        else:
            found[name] = _Weights(itemsize * prod(_own_shape(config, share, name, shape)), 0)
    return found


def _flops_of_others(config: ModelConfig, share: WorkShare) -> int:
    """The part of a token's operations in all layers that other processes compute."""
    flops, memory, mixture = 0.0, config.memory, config.mixture
    for name, shape in _shapes(config).items():
        if len(shape) == 2 and name != _head_name(config):
            used = 1.0
            if mixture is not None and ".experts." in name:
                used = mixture.top_k / mixture.num_experts
            flops += 2 * used * (prod(shape) - prod(_own_shape(config, share, name, shape)))
    if memory is not None:
        columns = memory.value_dim - len(share.read_columns)
        flops += 2 * config.rows_per_token * columns
    return round(flops)


def _total(weights: Iterable[_Weights]) -> _Weights:
    listed = list(weights)
    return _Weights(sum(one.num_bytes for one in listed), sum(one.grouped for one in listed))
