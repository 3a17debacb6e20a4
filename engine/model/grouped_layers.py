"""Linear layers and embeddings whose weights are in groups (``grouped_weights``)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from engine.model.grouped_weights import (
    GroupFormat,
    WeightGroups,
    dense_weights,
    group_weights,
)
from engine.model.uninitialised import ExactLinear


class _Grouped(nn.Module):
    """Weights in groups; uninitialised.

    Attributes:
        weight, weight_scales, weight_minimums: the groups' arrays; the last may be None.
    """

    weight: nn.Parameter
    weight_scales: nn.Parameter
    weight_minimums: nn.Parameter | None

    def __init__(self, outputs: int, inputs: int, group_format: GroupFormat) -> None:
        super().__init__()
        self.group_format, self._inputs = group_format, inputs
        self.register_parameter("weight_minimums", None)
        for name, tensor in group_format.tensors(outputs, inputs).items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    @property
    def groups(self) -> WeightGroups:
        """The weights."""
        return WeightGroups(
            self.weight, self.weight_scales, self.group_format.bits, self.weight_minimums
        )

    @groups.setter
    def groups(self, groups: WeightGroups) -> None:
        self.group_format = groups.format
        for name in ("weight", "weight_scales", "weight_minimums"):
            array = groups.tensors.get(name)
            made = None if array is None else nn.Parameter(array, requires_grad=False)
            setattr(self, name, made)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weights, ``[outputs, inputs]`` or ``[V, D]``, in ``dtype``."""
        return dense_weights(self.groups, self._inputs, dtype)


class GroupedLinear(_Grouped):
    """The weights of a linear layer in groups; uninitialised. It cannot run: see ``dense``.

    Attributes:
        bias: ``[O]``, or None.
    """

    def __init__(
        self, in_features: int, out_features: int, group_format: GroupFormat, *, bias: bool
    ) -> None:
        super().__init__(out_features, in_features, group_format)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None


class GroupedEmbedding(_Grouped):
    """The rows of an embedding in groups, with V tokens as outputs; uninitialised."""

    def __init__(self, num_embeddings: int, embedding_dim: int, group_format: GroupFormat) -> None:
        super().__init__(num_embeddings, embedding_dim, group_format)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim

    @classmethod
    def rounded(cls, embedding: nn.Embedding, bits: int) -> "GroupedEmbedding":
        """The rows of an embedding, rounded by ``group_weights``."""
        groups = group_weights(embedding.weight, bits)
        with torch.device("meta"):
            made = cls(embedding.num_embeddings, embedding.embedding_dim, groups.format)
        made.groups = groups
        return made

    def rows(self, ids_T: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows of some tokens, ``[T, D]`` in ``dtype``."""
        return dense_weights(self.groups.part(ids_T), self.embedding_dim, dtype)


def use_groups(model: nn.Module, formats: Mapping[str, GroupFormat]) -> None:
    """Replace layers of a model, by name, by uninitialised ones in groups.

    The names are among ``groupable``.
    """
    for name, one in formats.items():
        layer, (parent, _, last) = model.get_submodule(name), name.rpartition(".")
        made: nn.Module
        if isinstance(layer, nn.Embedding):
            made = GroupedEmbedding(layer.num_embeddings, layer.embedding_dim, one)
        else:
            assert isinstance(layer, nn.Linear)
            sizes = layer.in_features, layer.out_features
            made = GroupedLinear(*sizes, one, bias=layer.bias is not None)
        setattr(model.get_submodule(parent), last, made)


def groupable(model: nn.Module) -> set[str]:
    """Names of a model's layers whose weights may be in groups."""
    return {
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Embedding) and not isinstance(layer, ExactLinear)
    }


def group_formats(model: nn.Module) -> dict[str, GroupFormat]:
    """Formats of the layers whose weights are in groups, by name."""
    return {
        name: layer.group_format
        for name, layer in model.named_modules()
        if isinstance(layer, GroupedLinear | GroupedEmbedding)
    }


def dense_state(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state of a model in ``dtype``, with dense weights instead of groups."""
    state = model.state_dict()
    for name, one in group_formats(model).items():
        layer = model.get_submodule(name)
        assert isinstance(layer, GroupedLinear | GroupedEmbedding)
        for tensor in one.tensors(0, 0):
            del state[f"{name}.{tensor}"]
        state[f"{name}.weight"] = layer.dense(dtype)
    return {name: value.to(dtype) for name, value in state.items()}
