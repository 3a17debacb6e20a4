"""The memory layer: product-key query, weighted value rows, gate and projection.

Formulas and symbols are those of "Memory Layers at Scale" (arXiv 2412.09764); H memory heads, N
subkeys per half, K rows per head, k query width per head, V value width, T tokens, D model width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine import ops
from engine.model.config import MemoryConfig
from engine.model.forward_trace import ForwardTrace, MemoryTrace
from engine.model.norm import RmsNorm
from engine.model.uninitialised import Linear
from engine.ops.native.library import NativeOps
from engine.ops.native.packed_memory import PackedMemory
from memory_ops import operations
from memory_ops.backends import is_fit_for_cpu
from memory_ops.tables.value_table import Lookup, ValueTable


class MemoryLayer(nn.Module):
    """A feed-forward that reads K rows per head from a table of N * N.

        q = Wq x + bq;  rows, w = product top-K of (subkeys . q);  m = sum w * table[row]
        memory_plus:  y = Wv (m * silu(Wg x + bg)) + bv
        pkm:          y = m, or Wv m + bv
        peer:         y = sum w * gelu(down[row] . x) * table[row]   (arXiv 2407.04153)
        output gate:  y = sigmoid(w_o x + b_o) * y

    The tables are not the layer's own: they may be shared, and lie where their tier holds them.
    They must be attached before the first forward.
    """

    def __init__(
        self,
        config: MemoryConfig,
        kind: str,
        hidden_size: int,
        norm_eps: float,
        norm: RmsNorm | None = None,
        index: int = 0,
    ) -> None:
        """Make a layer of a ``kind`` of ``MEMORY_KINDS``, parameters uninitialised.

        ``norm``, the decoder layer's own, is applied to what comes in; ``index`` is its place in
        the model, by which tables tell lookups apart.
        """
        super().__init__()
        half_dim = config.query_dim // 2
        self.index = index
        self.num_heads, self.num_subkeys = config.num_heads, config.num_subkeys
        self.top_k = config.top_k
        self.norm_eps = norm_eps
        self.query = Linear(hidden_size, config.num_heads * config.query_dim)
        self.subkeys = nn.Parameter(torch.empty(config.num_heads, 2, config.num_subkeys, half_dim))
        self.query_norm = nn.Parameter(torch.empty(2, half_dim)) if config.qk_norm else None
        gated = kind == "memory_plus"
        projected = gated or (kind == "pkm" and config.value_projection)
        self.gate = Linear(hidden_size, config.value_dim) if gated else None
        self.value_proj = Linear(config.value_dim, hidden_size) if projected else None
        self.output_gate = Linear(hidden_size, 1) if config.output_gate else None
        self.queries = ops.Projection(self.query, norm=norm)
        self.keys = ops.ProductKeys(self)
        self.gates = ops.Projection(self.gate, norm=norm) if self.gate is not None else None
        self.values = ops.Projection(self.value_proj) if self.value_proj is not None else None
        self.output_gates = (
            ops.Projection(self.output_gate, norm=norm) if self.output_gate is not None else None
        )
        self.is_peer = kind == "peer"
        self._norm = (norm,)  # the decoder layer's, and no part of this module
        self._table: ValueTable | None = None
        self._down_table: ValueTable | None = None

    @property
    def table(self) -> ValueTable:
        """The attached value table."""
        assert self._table is not None, "no value table was attached to this memory layer"
        return self._table

    @property
    def down_table(self) -> ValueTable:
        """The attached table of what PEER's experts multiply x with."""
        assert self._down_table is not None, "no table of this kind was attached"
        return self._down_table

    @property
    def tables(self) -> tuple[ValueTable, ...]:
        """All that are attached."""
        return (self.table,) if self._down_table is None else (self.down_table, self.table)

    def attach(self, table: ValueTable, down_table: ValueTable | None = None) -> None:
        """Read rows from these tables, from before ``pack`` on; the caller has checked shapes."""
        assert self.keys.packed is None and (down_table is not None) == self.is_peer
        self._table, self._down_table = table, down_table

    def pack(self, native: NativeOps) -> PackedMemory | None:
        """Lay the weights out for serving; see ``Projection.pack``.

        Returns what the native library needs to run all of the layer, where it can: where the rows
        lie in memory, or are brought there, and nothing but the sum follows the value projection.
        """
        query, subkeys = self.queries.pack(native), self.keys.pack(native)
        gate = self.gates.pack(native) if self.gates is not None else None
        values = self.values.pack(native) if self.values is not None else None
        if self.output_gates is not None:
            self.output_gates.pack(native)
            return None
        source = self.table.row_source(self.index)
        if values is None or source is None:
            return None
        if not is_fit_for_cpu(source.rows, self.num_subkeys, self.top_k):
            return None
        return PackedMemory(
            source,
            self.num_heads,
            self.top_k,
            query=query,
            subkeys=subkeys,
            gate=gate,
            values=values,
        )

    def half_scores(self, x_TD: Tensor) -> Tensor:
        """See ``ops.half_scores``."""
        return ops.half_scores(ops.linear(x_TD, self.queries), self.keys)

    def forward(
        self,
        x_TD: Tensor,
        trace: ForwardTrace | None = None,
        residual_TD: Tensor | None = None,
    ) -> Tensor:
        """Return ``y``, ``[T, D]`` in the dtype of ``x``, added to the residual stream if given.

        What is read is added to ``trace``.
        """
        return self.finish(self.start(x_TD, trace), x_TD, residual_TD)

    def start(self, x_TD: Tensor, trace: ForwardTrace | None = None) -> Lookup:
        """Choose the rows and begin to read them: ``forward``'s first half."""
        rows_THK, weights_THK = operations.product_topk(self.half_scores(x_TD), self.top_k)
        if trace is not None:
            trace.memory.append(MemoryTrace(rows_THK, weights_THK))
        if self.is_peer:
            weights_THK = weights_THK * self._activations(x_TD, rows_THK)
        return self.table.start(rows_THK, weights_THK, self.index)

    def finish(self, lookup: Lookup, x_TD: Tensor, residual_TD: Tensor | None = None) -> Tensor:
        """Wait for the rows and return what ``forward`` does; ``x`` is what ``start`` was given."""
        # the table may still be fetching: what does not depend on the rows runs meanwhile
        gate_TV = ops.linear(x_TD, self.gates) if self.gates is not None else None
        gate_T1 = ops.linear(x_TD, self.output_gates) if self.output_gates is not None else None
        y_TV = lookup.finish()
        y_TV = ops.silu_gate(gate_TV, y_TV) if gate_TV is not None else y_TV.to(x_TD.dtype)
        if gate_T1 is None and self.values is not None:
            return ops.linear(y_TV, self.values, residual_TD)
        y_TD = ops.linear(y_TV, self.values) if self.values is not None else y_TV
        if gate_T1 is not None:
            y_TD = gate_T1.sigmoid() * y_TD
        return y_TD if residual_TD is None else residual_TD + y_TD

    def _activations(self, x_TD: Tensor, rows_THK: Tensor) -> Tensor:
        self.table.hint(rows_THK, self.index)
        (norm,) = self._norm
        normed_TD = norm(x_TD) if norm is not None else x_TD
        dots = self.down_table.start_dots(rows_THK, normed_TD, self.index)
        return functional.gelu(dots.finish())
