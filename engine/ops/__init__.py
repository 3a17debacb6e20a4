"""The operations of the transformer and the sampler, each one signature, with plain-torch twins.

Faster versions replace an op behind its signature, never the code that calls it.
"""

from engine.ops.attention import attention
from engine.ops.gate import silu_gate
from engine.ops.linear import Projection, linear
from engine.ops.log_probabilities import log_probabilities
from engine.ops.norm import rms_norm
from engine.ops.product_keys import ProductKeys, half_scores
from engine.ops.sampling import sample

__all__ = [
    "ProductKeys",
    "Projection",
    "attention",
    "half_scores",
    "linear",
    "log_probabilities",
    "rms_norm",
    "sample",
    "silu_gate",
]
