"""Kernels with their twins in plain torch, the inputs of a call, and the work that it needs."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from memory_ops.patches.patched_rows import PatchedRows


@dataclass(frozen=True)
class KernelInputs:
    """Arguments of one call, and the work that they need.

    Attributes:
        arguments: of kernel and twin, in their order.
        options: their keyword arguments.
        num_bytes: bytes that the call must read and write.
        flops: operations of its products.
        outputs: arguments that receive results.
    """

    arguments: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)
    num_bytes: int = 0
    flops: int = 0
    outputs: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of all tensors in the arguments, each counted once."""
        found = {id(one): one.nbytes for one in tensors((self.arguments, self.options))}
        return sum(found.values())

    def call(self, function: Callable[..., Any]) -> list[Tensor]:
        """Call a kernel or its twin; returns its results."""
        returned = function(*self.arguments, **self.options)
        written = [self.arguments[index] for index in self.outputs]
        return list(tensors((returned, written)))

    def copied(self, device: torch.device) -> "KernelInputs":
        """The same inputs in other memory, on a device."""
        arguments, options = _copied((self.arguments, self.options), device)
        return replace(self, arguments=arguments, options=options)


def tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors in sequences, mappings, dataclasses and patches."""
    if isinstance(tree, Tensor):
        yield tree
    for part in _parts(tree).values():
        yield from tensors(part)


def _parts(tree: Any) -> Mapping[Any, Any]:
    if isinstance(tree, tuple | list):
        return dict(enumerate(tree))
    if isinstance(tree, dict):
        return tree
    if isinstance(tree, PatchedRows):
        return {name: getattr(tree, name) for name in ("rows_P", "deltas_PV", "index_I")}
    if is_dataclass(tree):
        return {one.name: getattr(tree, one.name) for one in fields(tree)}
    return {}


def _copied(tree: Any, device: torch.device) -> Any:
    if isinstance(tree, Tensor):
        return tree.to(device, copy=True)
    if isinstance(tree, PatchedRows):
        return tree.to(device)
    parts = {key: _copied(part, device) for key, part in _parts(tree).items()}
    if isinstance(tree, tuple) and hasattr(tree, "_make"):
        return tree._make(parts.values())
    if isinstance(tree, tuple | list):
        return type(tree)(parts.values())
    if isinstance(tree, dict):
        return parts
    return replace(tree, **parts) if parts else tree


@dataclass(frozen=True)
class KernelCase:
    """A kernel, its twin in plain torch with the same signature, and a maker of inputs."""

    name: str
    kernel: Callable[..., Any]
    twin: Callable[..., Any]
    inputs: Callable[[], KernelInputs]
