"""The share of each tensor-parallel rank: its heads, columns of feed-forwards, and table rows."""

from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from engine.config import TABLE_SHARDINGS
from engine.errors import ConfigError
from engine.model.config import ModelConfig


@dataclass(frozen=True)
class Part:
    """A contiguous range of one dimension of a weight."""

    dim: int
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first

    def of(self, weight: Tensor) -> Tensor:
        """The part of a weight: a view of whole rows, or a copy of columns."""
        return weight.narrow(self.dim, self.first, len(self)).contiguous()


@dataclass(frozen=True)
class RankShare:
    """The share of rank ``rank`` of ``size``; every rank has the same config.

    Query heads stay with their KV head. Heads, and columns of feed-forwards, that ``size`` does not
    divide are split as evenly as possible. Columns of value tables must be divisible. Embedding,
    norms, routers, and the memory layers' queries and subkeys are whole on every rank.

    Attributes:
        table_sharding: ``columns`` of every row, or whole ``rows``; see ``TABLE_SHARDINGS``.

    Raises:
        ConfigError: the model has too few heads or columns.
    """

    config: ModelConfig
    rank: int
    size: int
    table_sharding: str = "columns"

    def __post_init__(self) -> None:
        config, size = self.config, self.size
        assert 0 <= self.rank < size and self.table_sharding in TABLE_SHARDINGS
        if size > config.num_kv_heads:
            heads = config.num_kv_heads
            raise ConfigError(f"tensor_parallel: {size} exceeds num_key_value_heads {heads}")
        widths = {"intermediate_size": config.intermediate_size, "vocab_size": config.vocab_size}
        if config.mixture is not None:
            widths["moe_intermediate_size"] = config.mixture.expert_size
        for name, width in widths.items():
            if size > width:
                raise ConfigError(f"tensor_parallel: {size} exceeds {name} {width}")
        if config.memory is None:
            return
        if config.memory.value_dim % size:
            width = config.memory.value_dim
            raise ConfigError(f"tensor_parallel: {size} does not divide memory.value_dim {width}")
        if size > config.memory.num_rows:
            rows = config.memory.num_rows
            raise ConfigError(f"tensor_parallel: {size} exceeds the {rows} rows of a value table")

    @cached_property
    def kv_config(self) -> ModelConfig:
        """The model's config with the heads of this rank."""
        config, heads = self.config, len(self._of(self.config.num_kv_heads))
        per_kv_head = config.num_heads // config.num_kv_heads
        return replace(config, num_heads=heads * per_kv_head, num_kv_heads=heads)

    @cached_property
    def rank_config(self) -> ModelConfig:
        """The model's config with the heads and the feed-forward columns of this rank."""
        config, mixture = self.kv_config, self.config.mixture
        if mixture is not None:
            mixture = replace(mixture, expert_size=len(self._of(mixture.expert_size)))
        columns = len(self._of(config.intermediate_size))
        return replace(config, intermediate_size=columns, mixture=mixture)

    @property
    def value_columns(self) -> range:
        """The columns of value rows that this rank's memory layers compute with."""
        assert self.config.memory is not None
        return self._of(self.config.memory.value_dim)

    @property
    def table_rows(self) -> range:
        """The rows that this rank reads if tables are split by rows."""
        assert self.config.memory is not None
        return self._of(self.config.memory.num_rows)

    @property
    def read_rows(self) -> range:
        """The rows of value tables of which this rank reads ``read_columns``."""
        assert self.config.memory is not None
        num_rows = self.config.memory.num_rows
        return self.table_rows if self.table_sharding == "rows" else range(num_rows)

    @property
    def read_columns(self) -> range:
        """The columns of ``read_rows`` that this rank reads."""
        assert self.config.memory is not None
        width = self.config.memory.value_dim
        return range(width) if self.table_sharding == "rows" else self.value_columns

    @property
    def vocabulary(self) -> range:
        """The tokens whose logits this rank computes."""
        # equal ranges but for the last one, which the gathered logits need
        width = -(-self.config.vocab_size // self.size)
        last = min(width * (self.rank + 1), self.config.vocab_size)
        return range(min(width * self.rank, last), last)

    def part(self, name: str) -> Part | None:
        """This rank's part of a tensor, by its name in checkpoints; None if it needs all of it."""
        module, _, kind = name.rpartition(".")
        found = self.layer_part(module)
        # each rank adds the whole bias to the sum over all ranks
        return None if found is None or (found.dim == 1 and kind == "bias") else found

    def layer_part(self, module: str) -> Part | None:
        """This rank's part of the weight of a linear layer, by the layer's name."""
        parent, _, leaf = module.rpartition(".")
        owner = parent.rpartition(".")[2]
        found = self._parts.get(f"{'expert' if owner.isdecimal() else owner}.{leaf}")
        if found is None:
            return None
        dim, share = found
        return Part(dim, share.start, share.stop)

    def _of(self, count: int, unit: int = 1) -> range:
        """The share of ``count`` times ``unit`` values, in whole units."""
        first, last = (count * rank // self.size for rank in (self.rank, self.rank + 1))
        return range(first * unit, last * unit)

    @cached_property
    def _parts(self) -> dict[str, tuple[int, range]]:
        """Dimension and range of each split layer, by the ends of their names."""
        config = self.config
        kv_size, inner = config.head_dim, self._of(config.intermediate_size)
        query = self._of(config.num_kv_heads, kv_size * config.num_heads // config.num_kv_heads)
        key = self._of(config.num_kv_heads, kv_size)
        parts = {
            "self_attn.q_proj": (0, query),
            "self_attn.k_proj": (0, key),
            "self_attn.v_proj": (0, key),
            "self_attn.o_proj": (1, query),
            "mlp.gate_proj": (0, inner),
            "mlp.up_proj": (0, inner),
            "mlp.down_proj": (1, inner),
        }
        if config.mixture is not None:
            expert = self._of(config.mixture.expert_size)
            parts |= {"expert.w1": (0, expert), "expert.w3": (0, expert), "expert.w2": (1, expert)}
        if config.memory is not None:
            values = self.value_columns
            parts |= {"memory.gate": (0, values), "memory.value_proj": (1, values)}
        return parts
