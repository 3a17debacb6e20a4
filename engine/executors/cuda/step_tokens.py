"""The tokens of one step as layers read them, in tensors on the device."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from engine.executors.cuda.buckets import StepShape
from engine.executors.cuda.kernels.paged_step import PagedStep
from engine.executors.cuda.patch_inputs import device_patches
from engine.executors.cuda.step_inputs import NUM_STEP_COUNTS, PART_INPUTS, part_input
from memory_ops.patches.device_patches import DevicePatches


@dataclass(frozen=True)
class StepTokens:
    """Positions, KV slots and sequences of the T tokens of a step, or of a micro-batch of it.

    Attributes:
        part: the tokens of the step.
        positions_T: int64.
        angles: rotary cosines and sines of all positions, fp32 ``[positions, 1, E / 2]``.
        kv_slots_T: int64, where keys and values are written: block * block size + offset.
        sources_T: int64, the token that a token of padding repeats; None if there is no such token
            whose rows are undefined.
        num_splits: parts of a decode's context that the attention kernel computes side by side.
        patches: the row patches of each memory layer; none in a graph without patches.
    """

    part: slice
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
    ) -> "list[StepTokens]":
        """Views of a step's inputs, of each micro-batch."""
        found = []
        for number, (first, last) in enumerate(pairwise(shape.edges)):
            part = slice(first, last)
            own = {name: inputs[part_input(name, number)] for name in PART_INPUTS}
            paged = PagedStep(
                own["query_starts"],
                own["context_lengths"],
                own["seats"],
                block_table_PB,
                None if shape.is_decode else own["tiles"],
            )
            num_counted_1 = inputs["counts"][NUM_STEP_COUNTS + number :][:1]
            found.append(
                cls(
                    part,
                    inputs["positions"][part],
                    angles,
                    inputs["kv_slots"][part],
                    # the padding of a decode repeats the whole first sequence
                    None if shape.is_decode else inputs["sources"][part],
                    paged,
                    shape.num_splits,
                    device_patches(inputs, memory_layers, part, num_counted_1),
                )
            )
        return found
