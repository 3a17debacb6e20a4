"""The memory layer: product-key query, weighted value rows, gate and projection.

Formulas and symbols are those of "Memory Layers at Scale" (arXiv 2412.09764); H memory heads, N
subkeys per half, K rows per head, k query width per head, V value width, T tokens, D model width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import memory_ops
from engine import ops
from engine.model.config import MemoryConfig
from memory_ops.tables.value_table import ValueTable


@dataclass(frozen=True)
class MemoryTrace:
    """What one memory layer read: int64 ``rows_THK`` and their ``weights_THK``, ``[T, H, K]``."""

    rows_THK: Tensor
    weights_THK: Tensor


class MemoryLayer(nn.Module):
    """A feed-forward that reads K rows per head from a table of N * N.

        q = Wq x + bq;  rows, w = product top-K of (subkeys . q);  m = sum w * table[row]
        memory_plus:  y = Wv (m * silu(Wg x + bg)) + bv
        pkm:          y = m, or Wv m + bv
        output gate:  y = sigmoid(w_o x + b_o) * y

    The value table is not the layer's own: it may be shared, and lies where its tier holds it. It
    must be attached before the first forward.
    """

    def __init__(self, config: MemoryConfig, kind: str, hidden_size: int, norm_eps: float) -> None:
        """Make a layer of ``kind`` ``memory_plus`` or ``pkm``, parameters uninitialised."""
        super().__init__()
        half_dim = config.query_dim // 2
        self.top_k = config.top_k
        self.norm_eps = norm_eps
        self.query = nn.Linear(hidden_size, config.num_heads * config.query_dim)
        self.subkeys = nn.Parameter(torch.empty(config.num_heads, 2, config.num_subkeys, half_dim))
        self.query_norm = nn.Parameter(torch.empty(2, half_dim)) if config.qk_norm else None
        gated = kind == "memory_plus"
        projected = gated or config.value_projection
        self.gate = nn.Linear(hidden_size, config.value_dim) if gated else None
        self.value_proj = nn.Linear(config.value_dim, hidden_size) if projected else None
        self.output_gate = nn.Linear(hidden_size, 1) if config.output_gate else None
        self._table: ValueTable | None = None

    @property
    def table(self) -> ValueTable:
        """The attached value table."""
        assert self._table is not None, "no value table was attached to this memory layer"
        return self._table

    def attach(self, table: ValueTable) -> None:
        """Read rows from this table from now on; its shape is the caller's to have checked."""
        self._table = table

    def half_scores(self, x_TD: Tensor) -> Tensor:
        """Dot products of query halves and subkeys, ``[T, H, 2, N]`` in fp32 (fp64 for fp64).

        Both factors are in the model's dtype and the sums are kept wide, so that trainer and
        server choose the same rows.
        """
        num_heads, _, _, half_dim = self.subkeys.shape
        q_THk = ops.linear(x_TD, self.query.weight, self.query.bias)
        q_TH2k = q_THk.view(-1, num_heads, 2, half_dim)
        if self.query_norm is not None:
            q_TH2k = ops.rms_norm(q_TH2k, self.query_norm, self.norm_eps)
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        return torch.einsum("thck,hcnk->thcn", q_TH2k.to(wide), self.subkeys.to(wide))

    def forward(self, x_TD: Tensor, trace: list[MemoryTrace] | None = None) -> Tensor:
        """Return ``y``, ``[T, D]`` in the dtype of ``x``; what is read is added to ``trace``."""
        rows_THK, weights_THK = memory_ops.product_topk(self.half_scores(x_TD), self.top_k)
        if trace is not None:
            trace.append(MemoryTrace(rows_THK, weights_THK))
        lookup = self.table.start(rows_THK, weights_THK)
        # the table may still be fetching: what does not depend on the rows runs meanwhile
        gate_TV = None
        if self.gate is not None:
            gate_TV = ops.linear(x_TD, self.gate.weight, self.gate.bias)
        y_TV = lookup.finish().to(x_TD.dtype)
        if gate_TV is not None:
            y_TV = ops.silu_gate(gate_TV, y_TV)
        y_TD = y_TV
        if self.value_proj is not None:
            y_TD = ops.linear(y_TV, self.value_proj.weight, self.value_proj.bias)
        if self.output_gate is not None:
            gate_T1 = ops.linear(x_TD, self.output_gate.weight, self.output_gate.bias)
            y_TD = gate_T1.sigmoid() * y_TD
        return y_TD
