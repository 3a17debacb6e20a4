"""The tokens of one step as layers read them, in tensors on the device."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from engine.executors.cuda.buckets import StepShape
from engine.executors.cuda.kernels.paged_step import PagedStep
from engine.executors.cuda.patch_inputs import device_patches
from memory_ops.patches.device_patches import DevicePatches


@dataclass(frozen=True)
class StepTokens:
    """Positions, KV slots and sequences of T tokens.

    Attributes:
        positions_T: int64.
        angles: rotary cosines and sines of all positions, fp32 ``[positions, 1, E / 2]``.
        kv_slots_T: int64, where keys and values are written: block * block size + offset.
        sources_T: int64, the token that a token of padding repeats; None if there is no such token
            whose rows are undefined.
        num_splits: parts of a decode's context that the attention kernel computes side by side.
        patches: the row patches of each memory layer; none in a graph without patches.
    """

    positions_T: Tensor
    angles: tuple[Tensor, Tensor]
    kv_slots_T: Tensor
    sources_T: Tensor | None
    paged: PagedStep
    num_splits: int
    patches: Mapping[int, DevicePatches]

    def with_padding(self, x_TD: Tensor) -> Tensor:
        """Rows of tokens, with those of padding defined: so padding reads no table rows, and no
        experts, that no other token reads."""
        return x_TD if self.sources_T is None else x_TD.index_select(0, self.sources_T)

    @classmethod
    def of(
        cls,
        inputs: Mapping[str, Tensor],
        shape: StepShape,
        block_table_PB: Tensor,
        angles: tuple[Tensor, Tensor],
        memory_layers: Sequence[int],
    ) -> "StepTokens":
        """Views of a step's inputs."""
        paged = PagedStep(
            inputs["query_starts"],
            inputs["context_lengths"],
            inputs["seats"],
            block_table_PB,
            None if shape.is_decode else inputs["tiles"],
        )
        # the padding of a decode repeats the whole first sequence
        sources_T = None if shape.is_decode else inputs["sources"]
        return cls(
            inputs["positions"],
            angles,
            inputs["kv_slots"],
            sources_T,
            paged,
            shape.num_splits,
            device_patches(inputs, memory_layers),
        )
