"""Messages between tensor-parallel ranks and nodes, as plain data without tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine.executors.batch import Batch
from engine.executors.block_tables import BlockIds
from engine.executors.cuda.buckets import StepShape
from engine.model.row_patches import RowPatch, ScaledPatch
from memory_ops.patches.patched_rows import PatchedRows

Ids = npt.NDArray[np.int64]
# those of ``PatchedRows``
_DELTA_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class RankReady:
    """A rank has loaded its share; its first message to rank 0."""


@dataclass(frozen=True)
class RankRefused:
    """A rank cannot load its share; the message says why."""

    message: str


@dataclass(frozen=True)
class RankDied:
    """A rank that had loaded its share has ended; a node sends it to rank 0.

    Attributes:
        rank, process: the rank and its process id.
        code: the exit code; negative: the signal that ended it.
    """

    rank: int
    process: int
    code: int


@dataclass(frozen=True)
class NodeJoin:
    """A node asks rank 0 to let its ranks take part; its first message.

    Attributes:
        node: the number of the node, from 1 on.
        traits: what must be the same on all nodes, by name.
        num_blocks: the KV blocks for which the node has memory.
    """

    node: int
    traits: Mapping[str, str]
    num_blocks: int


@dataclass(frozen=True)
class JoinRefused:
    """The node cannot take part; the message says why."""

    message: str


@dataclass(frozen=True)
class StartRanks:
    """All nodes have joined: start the ranks, each with the heads of ``num_blocks`` KV blocks."""

    num_blocks: int


@dataclass(frozen=True)
class MeetOthers:
    """All ranks have loaded their shares: call ``RankGroup.meet`` now.

    Attributes:
        store_port: with several nodes, the port of the store on node 0; see ``NetworkStore``.
    """

    store_port: int = 0


@dataclass(frozen=True)
class RunForward:
    """The forward of one batch; see ``Batch``. Only rank 0 uses its logits.

    Attributes:
        patches: the numbers and scales of each sequence's row patches.
        freed: numbers of patches that no later batch uses.
    """

    ids: Ids
    positions: Ids
    query_starts: tuple[int, ...]
    kv_index: Ids
    context_lengths: tuple[int, ...]
    block_ids: Sequence[BlockIds]
    logits_at: Ids
    patches: Sequence[Sequence[tuple[int, float]]]
    freed: Sequence[int]

    @classmethod
    def of(
        cls, batch: Batch, patches: Sequence[Sequence[tuple[int, float]]], freed: Sequence[int]
    ) -> "RunForward":
        """The message for a batch without pending tokens."""
        return cls(
            ids=batch.ids_T.numpy(),
            positions=batch.positions_T.numpy(),
            query_starts=batch.query_starts,
            kv_index=batch.kv_index_T.numpy(),
            context_lengths=batch.context_lengths,
            block_ids=batch.block_ids,
            logits_at=batch.logits_at_L.numpy(),
            patches=patches,
            freed=freed,
        )

    def batch(self, patches: Mapping[int, RowPatch]) -> Batch:
        """The batch, with patches by their numbers."""
        return Batch(
            ids_T=torch.from_numpy(self.ids),
            positions_T=torch.from_numpy(self.positions),
            query_starts=self.query_starts,
            kv_index_T=torch.from_numpy(self.kv_index),
            context_lengths=self.context_lengths,
            block_ids=self.block_ids,
            seats=range(len(self.block_ids)),
            logits_at_L=torch.from_numpy(self.logits_at),
            patches=[
                [ScaledPatch(patches[number], scale) for number, scale in uses]
                for uses in self.patches
            ],
        )


@dataclass(frozen=True)
class AddPatch:
    """One rank's columns of a row patch, which later batches name by ``number``.

    Attributes:
        content_hash: see ``RowPatch``.
        layers: for each memory layer that the patch changes, an index into ``tables``.
        tables: row ids, and bytes and dtype of their deltas, of each table.
        freed: as in ``RunForward``: a server without requests runs no forward.
    """

    number: int
    content_hash: str
    layers: Mapping[int, int]
    tables: Sequence[tuple[Ids, npt.NDArray[Any], str]]
    freed: Sequence[int]

    @classmethod
    def of(
        cls, number: int, patch: RowPatch, columns: range, freed: Sequence[int] = ()
    ) -> "AddPatch":
        """The message with these columns of a patch on the CPU."""
        rows = patch.distinct_rows
        places = {id(one): place for place, one in enumerate(rows)}
        tables = []
        for one in rows:
            deltas_PC = one.deltas_PV[:, columns.start : columns.stop].contiguous()
            (dtype,) = [name for name, one in _DELTA_DTYPES.items() if one is deltas_PC.dtype]
            tables.append((one.rows_P.numpy(), deltas_PC.view(torch.uint8).numpy(), dtype))
        layers = {layer: places[id(one)] for layer, one in patch.layers.items()}
        return cls(number, patch.content_hash, layers, tables, freed)

    def patch(self) -> RowPatch:
        """The patch of this rank, on the CPU."""
        rows = []
        for rows_P, deltas_PB, dtype in self.tables:
            deltas_PC = torch.from_numpy(deltas_PB).view(_DELTA_DTYPES[dtype])
            rows.append(PatchedRows(torch.from_numpy(rows_P), deltas_PC))
        return RowPatch(self.content_hash, {one: rows[at] for one, at in self.layers.items()})


@dataclass(frozen=True)
class RunStep:
    """One step of the CUDA executor; every rank runs it in this shape.

    Attributes:
        forward: the batch, in which ids of pending tokens name seats.
        seats: see ``Batch``.
    """

    forward: RunForward
    seats: tuple[int, ...]
    shape: StepShape

    @property
    def freed(self) -> Sequence[int]:
        """As in ``RunForward``."""
        return self.forward.freed

    def batch(self, patches: Mapping[int, RowPatch]) -> Batch:
        """The batch, without the use of its logits; only rank 0 chooses tokens."""
        return replace(self.forward.batch(patches), seats=self.seats)


@dataclass(frozen=True)
class CaptureStep:
    """Capture the graph of this shape, which has run before."""

    shape: StepShape
    freed: Sequence[int] = ()


RankMessage = MeetOthers | RunForward | AddPatch | RunStep | CaptureStep
# from a rank of this machine, or from a node, to rank 0
RankAnswer = RankReady | RankRefused | RankDied
NodeAnswer = NodeJoin | RankAnswer
# from rank 0 to a node before its ranks start
JoinAnswer = JoinRefused | StartRanks
