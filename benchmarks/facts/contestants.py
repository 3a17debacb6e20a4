"""The compared models: one trunk with different second feed-forwards."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

# width and feed-forward width; names give the compute, relative to the first
_DENSE = {"dense": (48, 144), "dense 2x": (80, 192), "dense 4x": (112, 336)}
_LAYERS, _HEAD_DIM = 2, 16
_MEMORY = {"num_heads": 2, "top_k": 16, "query_dim": 16, "qk_norm": True}
_COMPARED_LAYER = 1
_EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.01}


@dataclass(frozen=True)
class Contestant:
    """A model to train.

    Attributes:
        name: its name in the results.
        kind: kind of the second feed-forward.
        num_rows: rows of its table, 0 without one.
        model: the ``[model]`` section of its training configuration.
        row_wise: whether the table's optimiser keeps one second moment per row.
    """

    name: str
    kind: str
    num_rows: int
    model: Mapping[str, Any]
    row_wise: bool = False


def contestants(is_reduced: bool) -> list[Contestant]:
    """Dense models of 1, 2 and 4 times the compute, Memory+ of all sizes, a PKM, a mixture.

    Models with a memory, or with two experts per token, need at most 4 % more compute than the
    smallest dense model.
    """
    dense = [_dense(name) for name in _DENSE]
    if is_reduced:
        return [dense[0], _memory("memory_plus", 64), _memory("memory_plus", 256)]
    memories = [_memory("memory_plus", 2**bits) for bits in (6, 7, 8, 9)]
    row_wise = replace(
        memories[2], name=f"{memories[2].name} row-wise", kind="memory_plus row-wise", row_wise=True
    )
    return [*dense, *memories, row_wise, _memory("pkm", 256), _experts()]


def _dense(name: str) -> Contestant:
    return Contestant(name, "dense", 0, _trunk(name))


def _memory(kind: str, num_subkeys: int) -> Contestant:
    trunk = _trunk("dense")
    memory = {"layers": {str(_COMPARED_LAYER): kind}, "num_subkeys": num_subkeys, **_MEMORY}
    memory |= {"value_dim": trunk["hidden_size"], "value_projection": kind == "pkm"}
    name = f"{kind.replace('_plus', '+')} 2^{num_subkeys.bit_length() * 2 - 2}"
    return Contestant(name, kind, num_subkeys**2, {**trunk, "memory": memory})


def _experts() -> Contestant:
    trunk = _trunk("dense")
    size = trunk["intermediate_size"] // _EXPERTS["num_experts_per_tok"]
    own = {"moe_layers": [_COMPARED_LAYER], "moe_intermediate_size": size, **_EXPERTS}
    return Contestant("moe", "moe", 0, trunk | own)


def _trunk(name: str) -> dict[str, Any]:
    width, feed_forward = _DENSE[name]
    return {
        "hidden_size": width,
        "intermediate_size": feed_forward,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": width // _HEAD_DIM,
        "tie_word_embeddings": True,
        "max_position_embeddings": 64,
    }
