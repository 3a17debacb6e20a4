"""Models that curves compare: one trunk with different second feed-forwards."""

from collections.abc import Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Trunk:
    """The model that contestants share, except for wider dense ones.

    Attributes:
        max_positions: longest context in tokens.
    """

    max_positions: int

    def dense(self, name: str) -> Contestant:
        """The dense model of this compute: ``dense``, ``dense 2x`` or ``dense 4x``."""
        return Contestant(name, "dense", 0, self._model(name))

    def memory(self, kind: str, num_subkeys: int) -> Contestant:
        """The smallest dense model with a memory of ``num_subkeys`` squared rows, a power of 4."""
        trunk = self._model("dense")
        memory = {"layers": {str(_COMPARED_LAYER): kind}, "num_subkeys": num_subkeys, **_MEMORY}
        memory |= {"value_dim": trunk["hidden_size"], "value_projection": kind == "pkm"}
        name = f"{kind.replace('_plus', '+')} 2^{num_subkeys.bit_length() * 2 - 2}"
        return Contestant(name, kind, num_subkeys**2, {**trunk, "memory": memory})

    def experts(self) -> Contestant:
        """The smallest dense model with a mixture, of as many active weights per token."""
        trunk = self._model("dense")
        size = trunk["intermediate_size"] // _EXPERTS["num_experts_per_tok"]
        own = {"moe_layers": [_COMPARED_LAYER], "moe_intermediate_size": size, **_EXPERTS}
        return Contestant("moe", "moe", 0, trunk | own)

    def _model(self, name: str) -> dict[str, Any]:
        width, feed_forward = _DENSE[name]
        return {
            "hidden_size": width,
            "intermediate_size": feed_forward,
            "num_hidden_layers": _LAYERS,
            "num_attention_heads": width // _HEAD_DIM,
            "tie_word_embeddings": True,
            "max_position_embeddings": self.max_positions,
        }
