"""Shapes and options of a model, as validated plain data without torch."""

from dataclasses import dataclass

from engine.model.checks import check_positive
from engine.model.rope_scaling import RopeScaling, YarnScaling

MEMORY_KINDS = ("memory_plus", "pkm", "peer")
FEED_FORWARD_KINDS = ("dense", "moe", *MEMORY_KINDS)
PLACEMENTS = ("replace", "beside")
# of a key or value of one head in an int8 KV cache
KV_SCALE_BYTES = 4
# names in checkpoints: the table of value rows, and that of PEER's down projections
_TABLE, _DOWN_TABLE = "memory.table", "memory.down_table"


@dataclass(frozen=True)
class MemoryConfig:
    """Shapes and options of all memory layers (arXiv 2412.09764).

    Attributes:
        num_heads: H, memory heads.
        num_subkeys: N, subkeys of each half; the table has N * N rows.
        top_k: K, rows read per head.
        query_dim: k, width of one head's query (two halves of k / 2).
        value_dim: V, width of a row.
        share_values: whether all memory layers share one table.
        qk_norm: RMSNorm over each query half, one learned weight per half.
        value_projection: ``pkm`` layers only: y = Wv m + bv. ``memory_plus`` always projects.
        output_gate: y is multiplied by sigmoid(w_o x + b_o).
        placement: ``replace``: memories replace feed-forwards; ``beside``: the layer has a dense
            feed-forward too, which reads the same x, and both are added.
        scalar_gate: y is multiplied by one learned number per layer.
    """

    num_heads: int
    num_subkeys: int
    top_k: int
    query_dim: int
    value_dim: int
    share_values: bool = True
    qk_norm: bool = False
    value_projection: bool = False
    output_gate: bool = False
    placement: str = "replace"
    scalar_gate: bool = False

    def __post_init__(self) -> None:
        check_positive(self, "num_heads", "num_subkeys", "top_k", "query_dim", "value_dim")
        if self.query_dim % 2:
            raise ValueError(f"query_dim: must be even, not {self.query_dim}")
        for name, largest in (("num_heads", 1024), ("num_subkeys", 65_536), ("query_dim", 65_536)):
            if getattr(self, name) > largest:
                raise ValueError(f"{name}: {getattr(self, name)} is more than {largest}")
        if self.top_k > self.num_subkeys:
            raise ValueError(f"top_k: {self.top_k} exceeds num_subkeys {self.num_subkeys}")
        if self.placement not in PLACEMENTS:
            allowed = ", ".join(PLACEMENTS)
            raise ValueError(f"placement: {self.placement!r} is not one of {allowed}")

    @property
    def num_rows(self) -> int:
        """R, rows of one table."""
        return self.num_subkeys**2


@dataclass(frozen=True)
class MixtureConfig:
    """A mixture of SwiGLU experts; a router chooses ``top_k`` per token, as in Mixtral.

    Attributes:
        num_experts: E, at most 4096.
        expert_size: inner width of one expert.
        router_loss_weight: weight of the load-balancing loss in training.
    """

    num_experts: int
    top_k: int
    expert_size: int
    router_loss_weight: float = 0.001

    def __post_init__(self) -> None:
        # errors use the names in config.json
        names = "num_local_experts", "num_experts_per_tok", "moe_intermediate_size"
        values = self.num_experts, self.top_k, self.expert_size
        for name, value in zip(names, values, strict=True):
            if value < 1:
                raise ValueError(f"{name}: must be greater than 0, not {value}")
        if self.num_experts > 4096:
            raise ValueError(f"num_local_experts: {self.num_experts} is more than 4096")
        if self.top_k > self.num_experts:
            raise ValueError(f"num_experts_per_tok: {self.top_k} exceeds {self.num_experts}")
        if self.router_loss_weight < 0:
            raise ValueError(f"router_aux_loss_coef: {self.router_loss_weight} is less than 0")


@dataclass(frozen=True)
class LayerTables:
    """Names of the tables that a memory layer reads; only PEER has ``down``."""

    values: str
    down: str | None = None


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama family; widths are defined as by Hugging Face.

    ``attention_bias`` gives all projections of attention a bias, ``qkv_bias`` those of queries,
    keys and values alone (Qwen2). ``qk_norm`` normalises each head's queries and keys before the
    rotation (Qwen3).
    ``feed_forward`` names each layer's kind, one of ``FEED_FORWARD_KINDS``; empty means all dense.
    ``memory`` is given if and only if a layer is a memory layer, ``mixture`` if a layer is ``moe``.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    attention_bias: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    mlp_bias: bool = False
    feed_forward: tuple[str, ...] = ()
    memory: MemoryConfig | None = None
    mixture: MixtureConfig | None = None

    def __post_init__(self) -> None:
        check_positive(
            self, "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads"
        )
        check_positive(
            self, "num_kv_heads", "head_dim", "max_positions", "rms_norm_eps", "rope_theta"
        )
        for name in ("num_heads", "head_dim"):
            # their product, and the table of rotary frequencies, must not be vast
            if getattr(self, name) > 65_536:
                raise ValueError(f"{name}: {getattr(self, name)} is more than 65536")
        heads, kv_heads = self.num_heads, self.num_kv_heads
        if heads % kv_heads:
            raise ValueError(f"num_kv_heads: {kv_heads} does not divide num_heads {heads}")
        if isinstance(self.rope_scaling, YarnScaling) and self.rope_theta <= 1:
            raise ValueError(f"rope_theta: yarn needs more than 1, not {self.rope_theta}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim: must be even for rotary embeddings, not {self.head_dim}")
        self._check_attention()
        if not self.feed_forward:
            object.__setattr__(self, "feed_forward", ("dense",) * self.num_layers)
        self._check_feed_forward()

    def _check_attention(self) -> None:
        """Refuse combinations that no family of models has, so that each has a config.json."""
        if self.qkv_bias and (self.attention_bias or self.qk_norm):
            raise ValueError("qkv_bias: cannot be combined with attention_bias or qk_norm")
        for name in ("qkv_bias", "qk_norm"):
            if getattr(self, name) and (self.mlp_bias or self.mixture is not None):
                raise ValueError(f"{name}: cannot be combined with mlp_bias or experts")

    def _check_feed_forward(self) -> None:
        if len(self.feed_forward) != self.num_layers:
            count = len(self.feed_forward)
            raise ValueError(f"feed_forward: names {count} layers of {self.num_layers}")
        for kind in self.feed_forward:
            if kind not in FEED_FORWARD_KINDS:
                allowed = ", ".join(FEED_FORWARD_KINDS)
                raise ValueError(f"feed_forward: {kind!r} is not one of {allowed}")
        if bool(self.memory_layers) != (self.memory is not None):
            raise ValueError("memory: must be given if and only if a layer is a memory layer")
        if ("moe" in self.feed_forward) != (self.mixture is not None):
            raise ValueError("num_local_experts: must be given if and only if a layer is moe")
        if self.mlp_bias and not any(map(self.has_dense, range(self.num_layers))):
            raise ValueError("mlp_bias: needs dense feed-forwards, and the model has none")
        if self.memory is not None:
            self._check_memory(self.memory)

    def _check_memory(self, memory: MemoryConfig) -> None:
        if memory.placement == "beside" and self.mixture is not None:
            raise ValueError("memory.placement: beside cannot be combined with experts")
        projection, has_pkm = memory.value_projection, "pkm" in self.feed_forward
        if projection and not has_pkm:
            raise ValueError(
                "memory.value_projection: is only for pkm layers, and the model has none"
            )
        if memory.value_dim == self.hidden_size:
            return
        differs = (
            f"memory.value_dim: {memory.value_dim} differs from hidden_size {self.hidden_size}"
        )
        if has_pkm and not projection:
            raise ValueError(f"{differs}; pkm layers then need value_projection")
        if "peer" in self.feed_forward:
            raise ValueError(f"{differs}; peer layers need equal widths")

    @property
    def memory_layers(self) -> tuple[int, ...]:
        """Indices of the memory layers."""
        return tuple(i for i, kind in enumerate(self.feed_forward) if kind in MEMORY_KINDS)

    @property
    def table_lookups(self) -> int:
        """Lookups of a step in value tables; a peer layer reads two tables."""
        return len(self.memory_layers) + self.feed_forward.count("peer")

    @property
    def rows_per_token(self) -> int:
        """Table rows that one token reads in all layers."""
        if self.memory is None:
            return 0
        return self.table_lookups * self.memory.num_heads * self.memory.top_k

    def has_dense(self, layer: int) -> bool:
        """Whether a layer has a dense feed-forward, with or without a memory."""
        is_beside = self.memory is not None and self.memory.placement == "beside"
        return self.feed_forward[layer] == "dense" or (is_beside and layer in self.memory_layers)

    @property
    def takes_patches(self) -> bool:
        """Whether it has memory layers, and the output of each is linear in the table's rows."""
        return self.patch_refusal is None

    @property
    def patch_refusal(self) -> str | None:
        """The reason why the model takes no row patches; None if it takes them."""
        if not self.memory_layers:
            return "the model has no memory layers, so it takes no row patches"
        if "peer" not in self.feed_forward:
            return None
        layer = self.feed_forward.index("peer")
        return (
            f"layer {layer} is peer, whose output is not linear in its rows; row patches need"
            " memory_plus or pkm"
        )

    @property
    def table_names(self) -> tuple[str, ...]:
        """Names of all tables, each ``[R, V]``."""
        layers = (self.layer_tables(layer) for layer in self.memory_layers)
        names = (name for tables in layers for name in (tables.values, tables.down))
        return tuple(dict.fromkeys(name for name in names if name is not None))

    def layer_tables(self, layer: int) -> LayerTables:
        """Names of the tables of one memory layer."""
        assert self.memory is not None and layer in self.memory_layers
        owner = "" if self.memory.share_values else f"model.layers.{layer}."
        is_peer = self.feed_forward[layer] == "peer"
        return LayerTables(owner + _TABLE, owner + _DOWN_TABLE if is_peer else None)

    def kv_bytes_per_token(self, itemsize: int, kv_dtype: str = "auto") -> int:
        """Bytes of one token's keys and values in all layers.

        ``kv_dtype`` is that of ``EngineConfig``; ``auto`` has values of ``itemsize`` bytes.
        """
        row_bytes = self.head_dim * (itemsize if kv_dtype == "auto" else 1)
        if kv_dtype == "int8":
            row_bytes += KV_SCALE_BYTES
        return 2 * self.num_layers * self.num_kv_heads * row_bytes
