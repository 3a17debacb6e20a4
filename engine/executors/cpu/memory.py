"""A memory layer with packed weights, in two halves, so that row fetches overlap compute."""

from torch import Tensor, nn
from torch.nn.functional import gelu, pad

from engine.executors.cpu.packed_linear import PackedLinear
from engine.executors.cpu.packed_memory import MemoryProducts, PackedMemory
from engine.executors.cpu.packing import Packer
from engine.executors.lookahead import PredictedMemory
from engine.model.forward_trace import ForwardTrace, MemoryTrace
from engine.model.memory_layer import MemoryLayer
from engine.model.norm import RmsNorm
from engine.model.row_patches import ForwardPatches, patched
from memory_ops import operations
from memory_ops.backends import has_native_lookup
from memory_ops.tables.value_table import Lookup

# a multiple of the values that torch computes at a time
_WHOLE_VECTORS = 128


class CpuMemory:
    """A ``MemoryLayer`` with packed weights, norm and residual sum included."""

    def __init__(self, packer: Packer, memory: MemoryLayer, norm: RmsNorm) -> None:
        self._kernels, self._norm = packer.kernels, packer.norm(norm)
        self.index, self.top_k = memory.index, memory.top_k
        self.num_heads, self.num_subkeys = memory.num_heads, memory.num_subkeys
        self.num_references = memory.num_heads * memory.top_k
        self.tables, self.table = memory.tables, memory.table
        self._down_table = memory.down_table if memory.is_peer else None
        self._query = packer.linear(memory.query, norm=norm)
        self._subkeys = packer.subkeys(memory)
        self._gate = _pack_any(packer, memory.gate, norm)
        gate = memory.scalar_gate
        self._scale = 1.0 if gate is None else float(packer.cast(gate))
        # scale this bias too: y is linear in the rows only without it
        self._values = (
            None
            if memory.value_proj is None
            else packer.linear(memory.value_proj, bias_scale=self._scale)
        )
        self._output_gate = _pack_any(packer, memory.output_gate, norm)

    def half_scores(self, residual_TD: Tensor) -> Tensor:
        """Half scores ``[T, H, 2, N]`` in fp32."""
        kernels = self._kernels
        scores_TF = kernels.linear(self._subkeys, kernels.linear(self._query, residual_TD))
        return scores_TF.view(-1, self.num_heads, 2, self.num_subkeys)

    @property
    def predicted(self) -> PredictedMemory:
        """This layer for the lookahead."""
        return PredictedMemory(self.index, self.num_subkeys, self.tables, self.half_scores)

    def start(
        self, residual_TD: Tensor, trace: ForwardTrace | None, patches: ForwardPatches | None
    ) -> Lookup:
        """Choose the rows, add them to ``trace`` and start to read them, with their patches."""
        rows_THK, weights_THK = operations.product_topk(self.half_scores(residual_TD), self.top_k)
        if trace is not None:
            trace.memory.append(MemoryTrace(rows_THK, weights_THK))
        if self._down_table is not None:
            self.table.hint(rows_THK, self.index)
            dots = self._down_table.start_dots(rows_THK, self._norm(residual_TD), self.index)
            weights_THK = weights_THK * gelu(dots.finish())
        assert patches is None or self._down_table is None
        lookup = self.table.start(rows_THK, weights_THK, self.index)
        return patched(lookup, rows_THK, weights_THK, patches, self.index)

    def finish(self, lookup: Lookup, residual_TD: Tensor) -> Tensor:
        """Wait for the rows; return the new residual stream from the one given to ``start``."""
        kernels = self._kernels
        # compute the gates while the table fetches rows
        gate_TV, gate_T1 = (
            None if gate is None else kernels.linear(gate, residual_TD)
            for gate in (self._gate, self._output_gate)
        )
        y_TV = lookup.finish()
        if self._scale != 1.0:
            y_TV = y_TV * self._scale
        # rows of fp64 give sums in fp64
        y_TV = (
            y_TV.to(residual_TD.dtype)
            if gate_TV is None
            else kernels.silu_gate(gate_TV, y_TV.float())
        )
        if gate_T1 is None and self._values is not None:
            return kernels.linear(self._values, y_TV, residual_TD)
        y_TD = y_TV if self._values is None else kernels.linear(self._values, y_TV)
        return residual_TD + (y_TD if gate_T1 is None else _sigmoid(gate_T1) * y_TD)

    def packed(self) -> PackedMemory | None:
        """The layer in native form, or None if the kernels cannot run it.

        They must be able to read the table's rows, and only the residual sum may follow the value
        projection.
        """
        source = self.table.row_source(self.index)
        if self._values is None or self._output_gate is not None or source is None:
            return None
        if not has_native_lookup(source.rows, self.num_subkeys, self.top_k):
            return None
        products = MemoryProducts(self._query, self._subkeys, self._gate, self._values)
        return PackedMemory(source, self.num_heads, self.top_k, products, self._scale)


def _sigmoid(gate_T1: Tensor) -> Tensor:
    """``sigmoid`` whose bits do not depend on the number of tokens."""
    # torch computes the values behind the last whole vector in another way
    padding = -len(gate_T1) % _WHOLE_VECTORS
    return pad(gate_T1, (0, 0, 0, padding)).sigmoid()[: len(gate_T1)]


def _pack_any(packer: Packer, layer: nn.Linear | None, norm: RmsNorm | None) -> PackedLinear | None:
    return None if layer is None else packer.linear(layer, norm=norm)
