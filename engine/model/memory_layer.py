"""The memory layer: product-key query, weighted value rows, gate and projection.

Formulas and symbols are those of "Memory Layers at Scale" (arXiv 2412.09764); H memory heads, N
subkeys per half, K rows per head, k query width per head, V value width, T tokens, D model width.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from engine.model.config import MemoryConfig
from engine.model.forward_trace import ForwardTrace, MemoryTrace
from engine.model.norm import rms_norm
from engine.model.row_patches import ForwardPatches, patched
from engine.model.uninitialised import ExactLinear, Linear
from memory_ops import operations
from memory_ops.tables.value_table import ValueTable


class MemoryLayer(nn.Module):
    """A feed-forward that reads K rows per head from a table of N * N.

        q = Wq x + bq;  rows, w = product top-K of (subkeys . q);  m = sum w * table[row]
        memory_plus:  y = Wv (m * silu(Wg x + bg)) + bv
        pkm:          y = m, or Wv m + bv
        peer:         y = sum w * gelu(down[row] . x) * table[row]   (arXiv 2407.04153)
        output gate:  y = sigmoid(w_o x + b_o) * y
        scalar gate:  y = g * y

    The layer does not own its tables, which layers may share: attach them before a forward.
    """

    def __init__(
        self, config: MemoryConfig, kind: str, hidden_size: int, norm_eps: float, index: int = 0
    ) -> None:
        """Make an uninitialised layer of a ``kind`` of ``MEMORY_KINDS``.

        Tables count lookups by ``index``, the layer's index; the query norm uses ``norm_eps``.
        """
        super().__init__()
        half_dim = config.query_dim // 2
        self.index, self.norm_eps = index, norm_eps
        self.num_heads, self.num_subkeys = config.num_heads, config.num_subkeys
        self.top_k = config.top_k
        self.query = Linear(hidden_size, config.num_heads * config.query_dim)
        self.subkeys = nn.Parameter(torch.empty(config.num_heads, 2, config.num_subkeys, half_dim))
        self.query_norm = nn.Parameter(torch.empty(2, half_dim)) if config.qk_norm else None
        gated = kind == "memory_plus"
        projected = gated or (kind == "pkm" and config.value_projection)
        self.gate = Linear(hidden_size, config.value_dim) if gated else None
        self.value_proj = Linear(config.value_dim, hidden_size) if projected else None
        self.output_gate = ExactLinear(hidden_size, 1) if config.output_gate else None
        self.scalar_gate = nn.Parameter(torch.empty(1)) if config.scalar_gate else None
        self.is_peer = kind == "peer"
        self._table: ValueTable | None = None
        self._down_table: ValueTable | None = None

    @property
    def table(self) -> ValueTable:
        """The attached value table."""
        assert self._table is not None, "no value table is attached to this memory layer"
        return self._table

    @property
    def down_table(self) -> ValueTable:
        """The attached table of PEER's down projections."""
        assert self._down_table is not None, "no down table is attached to this memory layer"
        return self._down_table

    @property
    def tables(self) -> tuple[ValueTable, ...]:
        """All attached tables."""
        return (self.table,) if self._down_table is None else (self.down_table, self.table)

    def attach(self, table: ValueTable, down_table: ValueTable | None = None) -> None:
        """Set the tables to read; the caller has checked their shapes."""
        assert (down_table is not None) == self.is_peer
        self._table, self._down_table = table, down_table

    def half_scores(self, x_TD: Tensor) -> Tensor:
        """Scores of the subkeys, ``[T, H, 2, N]``; see ``half_scores``."""
        return half_scores(self.query(x_TD), self.subkeys, self.query_norm, self.norm_eps)

    def forward(
        self,
        x_TD: Tensor,
        trace: ForwardTrace | None = None,
        patches: ForwardPatches | None = None,
    ) -> Tensor:
        """Return ``y``, ``[T, D]`` in the dtype of ``x``; add the rows read to ``trace``.

        ``patches`` change the rows of their tokens, but never those of PEER.
        """
        rows_THK, weights_THK = operations.product_topk(self.half_scores(x_TD), self.top_k)
        if trace is not None:
            trace.memory.append(MemoryTrace(rows_THK, weights_THK))
        if self.is_peer:
            self.table.hint(rows_THK, self.index)
            dots = self.down_table.start_dots(rows_THK, x_TD, self.index)
            weights_THK = weights_THK * gelu(dots.finish())
        assert patches is None or not self.is_peer
        lookup = self.table.start(rows_THK, weights_THK, self.index)
        lookup = patched(lookup, rows_THK, weights_THK, patches, self.index)
        # compute the gates while the table fetches rows
        gate_TV = self.gate(x_TD) if self.gate is not None else None
        gate_T1 = self.output_gate(x_TD) if self.output_gate is not None else None
        y_TV = lookup.finish()
        y_TV = y_TV.to(x_TD.dtype) if gate_TV is None else silu(gate_TV) * y_TV.to(gate_TV.dtype)
        y_TD = self.value_proj(y_TV) if self.value_proj is not None else y_TV
        y_TD = y_TD if gate_T1 is None else gate_T1.sigmoid() * y_TD
        return y_TD if self.scalar_gate is None else self.scalar_gate.to(y_TD.dtype) * y_TD


def half_scores(
    q_TF: Tensor, subkeys_H2Nk: Tensor, query_norm_2k: Tensor | None, norm_eps: float
) -> Tensor:
    """Dot products of query halves (normed if a norm is given) with the subkeys.

    Queries are ``[T, H k]``, the scores ``[T, H, 2, N]`` in fp32 (fp64 for fp64). Factors have the
    model's dtype and sums are wide, so that trainer and server choose the same rows.
    """
    num_heads, _, _, half_dim = subkeys_H2Nk.shape
    q_TH2k = q_TF.view(-1, num_heads, 2, half_dim)
    if query_norm_2k is not None:
        q_TH2k = rms_norm(q_TH2k, query_norm_2k, norm_eps)
    wide = torch.promote_types(q_TF.dtype, torch.float32)
    # a trainer's subkeys are wider than the model, and its autocast would narrow the sums
    narrow_H2Nk = subkeys_H2Nk.to(q_TF.dtype)
    with torch.autocast(q_TF.device.type, enabled=False):
        return torch.einsum("thck,hcnk->thcn", q_TH2k.to(wide), narrow_H2Nk.to(wide))
