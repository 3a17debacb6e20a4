"""The compared retrofits: which weights learn, where the memory is, and its gate."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.memory_variant import with_memory
from engine.model.config import ModelConfig
from weights.checkpoints.feed_forward_json import feed_forward_to_json

BASE = "base"
# peak learning rates of weights, the first one first; a memory alone learned little at 1e-3
_ALL_LRS, _MEMORY_LRS = (3e-4, 1e-4), (3e-3, 1e-2)


@dataclass(frozen=True)
class Contestant:
    """A way to train a finished model.

    Attributes:
        name: its name in the results.
        memory: changes of the memory layers' config; None trains the model without memory layers.
        lrs: peak learning rates that are tried: as many for all. Empty for the base, which is
            scored as it is.
        is_frozen: whether only the memory layers and their table are trained.
    """

    name: str
    memory: Mapping[str, Any] | None = None
    lrs: tuple[float, ...] = ()
    is_frozen: bool = False

    def model(self, base: ModelConfig, num_subkeys: int) -> dict[str, Any]:
        """The ``[model]`` section: the keys in which the trained model differs from ``base``."""
        if self.memory is None:
            return {}
        shape = with_memory(base, num_subkeys)
        assert shape.memory is not None
        memory = replace(shape.memory, qk_norm=True, **self.memory)
        return {"memory": feed_forward_to_json(replace(shape, memory=memory))["memory"]}


def contestants() -> list[Contestant]:
    """The base, and all ways to train it."""
    beside = {"placement": "beside"}
    return [
        Contestant(BASE),
        Contestant("no memory, all weights", None, _ALL_LRS),
        Contestant("replaced, all weights", {}, _ALL_LRS),
        _memory_only("replaced, memory only", {}),
        Contestant("beside, all weights", beside, _ALL_LRS),
        _memory_only("beside, memory only", beside),
        _memory_only("beside, memory only, scalar gate", {**beside, "scalar_gate": True}),
        _memory_only("beside, memory only, output gate", {**beside, "output_gate": True}),
    ]


def _memory_only(name: str, memory: Mapping[str, Any]) -> Contestant:
    return Contestant(name, memory, _MEMORY_LRS, is_frozen=True)
