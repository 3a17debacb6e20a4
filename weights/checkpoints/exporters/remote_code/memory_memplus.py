"""Memory layers of an exported model: product-key lookups in tables of value rows, in plain torch.

A memory layer is a feed-forward that reads a few rows of a large table ("Memory Layers at Scale",
arXiv 2412.09764). Symbols: T tokens, D model width, H memory heads, N subkeys per half, K rows per
head, C = H K rows per token, R = N N rows, V row width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from .configuration_memplus import MemplusConfig

# values of rows that are looked up at a time
_LOOKUP_SIZE = 1 << 25


class ValueTables(nn.Module):
    """The rows that all memory layers share, and those of PEER's down projections."""

    def __init__(self, shape: dict[str, Any], has_down_table: bool) -> None:
        super().__init__()
        add_tables(self, shape, has_down_table)


def add_tables(module: nn.Module, shape: dict[str, Any], has_down_table: bool) -> None:
    """Give a module the parameters ``table`` and maybe ``down_table``, ``[N * N, V]``."""
    names = ("table", "down_table") if has_down_table else ("table",)
    for name in names:
        rows = torch.zeros(shape["num_subkeys"] ** 2, shape["value_dim"])
        module.register_parameter(name, nn.Parameter(rows))


class Memory(nn.Module):
    """A feed-forward that reads K rows per head from a table of N * N rows.

    q = Wq x + bq;  rows, w = the K best of the sums of two half scores;  m = sum w * table[row]
    memory_plus:  y = Wv (m * silu(Wg x + bg)) + bv
    pkm:          y = m, or Wv m + bv
    peer:         y = sum w * gelu(down[row] . x) * table[row]   (arXiv 2407.04153)
    output gate:  y = sigmoid(w_o x + b_o) * y
    scalar gate:  y = g * y
    """

    def __init__(self, config: MemplusConfig, kind: str) -> None:
        super().__init__()
        shape, width = config.memory or {}, config.hidden_size
        heads, half_dim = shape["num_heads"], shape["query_dim"] // 2
        self.top_k, self.num_subkeys, self.eps = (
            shape["top_k"],
            shape["num_subkeys"],
            config.rms_norm_eps,
        )
        self.is_peer, is_gated = kind == "peer", kind == "memory_plus"
        is_projected = is_gated or (kind == "pkm" and shape["value_projection"])
        self.query = nn.Linear(width, heads * shape["query_dim"])
        self.subkeys = nn.Parameter(torch.zeros(heads, 2, shape["num_subkeys"], half_dim))
        self.query_norm = nn.Parameter(torch.ones(2, half_dim)) if shape["qk_norm"] else None
        self.gate = nn.Linear(width, shape["value_dim"]) if is_gated else None
        self.value_proj = nn.Linear(shape["value_dim"], width) if is_projected else None
        self.output_gate = nn.Linear(width, 1) if shape["output_gate"] else None
        self.scalar_gate = nn.Parameter(torch.ones(1)) if shape["scalar_gate"] else None
        if not shape["share_values"]:
            add_tables(self, shape, self.is_peer)

    def forward(self, x_TD: Tensor, tables: nn.Module | None) -> Tensor:
        owner: Any = self if tables is None else tables
        rows_TC, weights_TC = self.choose_rows(x_TD)
        if self.is_peer:
            weights_TC = weights_TC * gelu(row_dots(owner.down_table, rows_TC, x_TD))
        m_TV = weighted_rows(owner.table, rows_TC, weights_TC).to(x_TD.dtype)
        if self.gate is not None:
            m_TV = silu(self.gate(x_TD)) * m_TV
        y_TD = m_TV if self.value_proj is None else self.value_proj(m_TV)
        y_TD = y_TD if self.output_gate is None else self.output_gate(x_TD).sigmoid() * y_TD
        return y_TD if self.scalar_gate is None else self.scalar_gate * y_TD

    def choose_rows(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and weights of the rows of all heads, ``[T, H K]``; equal scores keep their order."""
        heads, _, _, half_dim = self.subkeys.shape
        q_TH2k = self.query(x_TD).view(-1, heads, 2, half_dim)
        if self.query_norm is not None:
            q_TH2k = rms_norm(q_TH2k, self.query_norm, self.eps)
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        scores_TH2N = torch.einsum("thck,hcnk->thcn", q_TH2k.to(wide), self.subkeys.to(wide))
        half_TH2K, subkeys_TH2K = best(scores_TH2N, self.top_k)
        sums_THC = (half_TH2K[:, :, 0, :, None] + half_TH2K[:, :, 1, None, :]).flatten(-2)
        scores_THK, places_THK = best(sums_THC, self.top_k)
        first_THK = subkeys_TH2K[:, :, 0].gather(-1, places_THK // self.top_k)
        second_THK = subkeys_TH2K[:, :, 1].gather(-1, places_THK % self.top_k)
        rows_THK = first_THK * self.num_subkeys + second_THK
        return rows_THK.flatten(1), scores_THK.softmax(dim=-1).flatten(1)


def best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest scores and their places; of equal ones the first."""
    ordered, places = scores.sort(dim=-1, descending=True, stable=True)
    return ordered[..., :count], places[..., :count]


def weighted_rows(table_RV: Tensor, rows_TC: Tensor, weights_TC: Tensor) -> Tensor:
    """Sums of weighted rows, ``[T, V]``, in the weights' dtype."""
    size = max(1, _LOOKUP_SIZE // (rows_TC.shape[1] * table_RV.shape[1]))
    parts = zip(rows_TC.split(size), weights_TC.split(size), strict=True)
    sums = [torch.einsum("tc,tcv->tv", w, table_RV[rows].to(w.dtype)) for rows, w in parts]
    return torch.cat(sums)


def row_dots(table_RV: Tensor, rows_TC: Tensor, x_TV: Tensor) -> Tensor:
    """Inner products of rows and each token's vector, ``[T, C]``, in fp32 or wider."""
    size = max(1, _LOOKUP_SIZE // (rows_TC.shape[1] * table_RV.shape[1]))
    wide = torch.promote_types(x_TV.dtype, torch.float32)
    parts = zip(rows_TC.split(size), x_TV.to(wide).split(size), strict=True)
    return torch.cat([torch.einsum("tcv,tv->tc", table_RV[rows].to(wide), x) for rows, x in parts])


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)
