"""The two halves of a decoder layer, as additions to the residual stream.

Packed, they take one native call each: between the operations of a half nothing comes back to
Python, and its threads stay together.
"""

from torch import Tensor

from engine.ops.attention import attention
from engine.ops.layout import TokenLayout
from engine.ops.linear import Projection, linear


def self_attention(
    residual_TD: Tensor,
    qkv: Projection,
    out: Projection,
    num_heads: int,
    num_kv_heads: int,
    angles: tuple[Tensor, Tensor],
    layout: TokenLayout,
    kv_blocks: Tensor | None,
) -> Tensor:
    """``residual + out(attention(qkv(residual)))``; see ``ops.attention``.

    Packed, the argument itself is changed and returned.
    """
    if qkv.packed is None or out.packed is None or kv_blocks is None or layout.paged is None:
        qkv_TF = linear(residual_TD, qkv)
        out_TF = attention(qkv_TF, num_heads, num_kv_heads, angles, layout, kv_blocks)
        return linear(out_TF, out, residual_TD)
    native, packed_qkv = qkv.packed
    native.self_attention(
        residual_TD, packed_qkv, out.packed[1], num_heads, angles, layout, layout.paged, kv_blocks
    )
    return residual_TD


def feed_forward(residual_TD: Tensor, gate_up: Projection, down: Projection) -> Tensor:
    """``residual + down(gate_up(residual))``. Packed, the argument itself is changed."""
    if gate_up.packed is None or down.packed is None:
        return linear(linear(residual_TD, gate_up), down, residual_TD)
    native, packed_gate_up = gate_up.packed
    native.feed_forward(residual_TD, packed_gate_up, down.packed[1])
    return residual_TD
