"""The transformer's operations, each one signature; here stand their plain-torch twins.

Faster versions replace an op behind its signature, never the transformer that calls it.
"""

from engine.ops.attention import attention
from engine.ops.gate import silu_gate
from engine.ops.layer import feed_forward, self_attention
from engine.ops.linear import Projection, linear
from engine.ops.norm import rms_norm
from engine.ops.product_keys import ProductKeys, half_scores

__all__ = [
    "ProductKeys",
    "Projection",
    "attention",
    "feed_forward",
    "half_scores",
    "linear",
    "rms_norm",
    "self_attention",
    "silu_gate",
]
