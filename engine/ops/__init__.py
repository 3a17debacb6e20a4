"""The transformer's operations, each one signature; here stand their plain-torch twins.

Faster versions replace an op behind its signature, never the transformer that calls it.
"""

from engine.ops.attention import attention
from engine.ops.gate import silu_gate
from engine.ops.linear import linear
from engine.ops.norm import rms_norm, rms_norm_add
from engine.ops.rope import rope_write

__all__ = ["attention", "linear", "rms_norm", "rms_norm_add", "rope_write", "silu_gate"]
