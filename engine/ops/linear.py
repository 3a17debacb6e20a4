"""Linear layers over one input, with the norm before them and what follows: one product."""

from typing import Protocol

import torch
from torch import Tensor, nn

from engine.ops.gate import silu_gate_by_torch
from engine.ops.native.library import NativeOps
from engine.ops.native.packed_linear import PackedLinear, WeightRows
from engine.ops.norm import rms_norm


class Norm(Protocol):
    """An RMSNorm: its learned weight and its epsilon."""

    weight: nn.Parameter
    eps: float


class Projection:
    """Layers that read the same input; it owns none of them, and sees weights assigned later.

        out = concat(W_i norm(x) + b_i)
        gated, of two layers:  out = silu(W_0 norm(x) + b_0) * (W_1 norm(x) + b_1)

    A layer is an ``nn.Linear``, or an ``nn.Embedding`` whose rows give the logits.
    """

    def __init__(
        self, *layers: nn.Linear | nn.Embedding, norm: Norm | None = None, is_gated: bool = False
    ) -> None:
        self.layers = layers
        self.norm = norm
        self.is_gated = is_gated
        self.packed: tuple[NativeOps, PackedLinear] | None = None

    def pack(self, native: NativeOps) -> PackedLinear:
        """Lay the weights out for these kernels, and give them up.

        An embedding keeps its weight, from which rows are looked up. From then on the layers' own
        forward, gradients and ``state_dict`` are gone.
        """
        rows, first = [], 0
        for index, layer in enumerate(self.layers):
            bias_O = layer.bias if isinstance(layer, nn.Linear) else None
            part = index if self.is_gated else 0
            rows.append(WeightRows(layer.weight, bias_O, first=first, part=part))
            first += 0 if self.is_gated else len(layer.weight)
        outputs = len(self.layers[0].weight) if self.is_gated else first
        norm = None if self.norm is None else (self.norm.weight, self.norm.eps)
        packed = native.pack(rows, outputs, norm=norm, is_gated=self.is_gated)
        self.packed = native, packed
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                layer.register_parameter("weight", None)
        return packed


def linear(x_TI: Tensor, projection: Projection, residual_TO: Tensor | None = None) -> Tensor:
    """What the projection defines, added to the residual stream where there is one.

    ``[T, O]`` in the dtype of ``x``; the arguments are left as they were. Packed, an output is the
    same, bit for bit, whatever rows stand beside its own.
    """
    if projection.packed is not None:
        native, packed = projection.packed
        return native.linear(packed, x_TI, residual_TO)
    return linear_by_torch(x_TI, projection, residual_TO)


def linear_by_torch(
    x_TI: Tensor, projection: Projection, residual_TO: Tensor | None = None
) -> Tensor:
    """``linear`` on any device, at any precision, and with gradients."""
    if projection.norm is not None:
        x_TI = rms_norm(x_TI, projection.norm.weight, projection.norm.eps)
    outs = []
    for layer in projection.layers:
        bias_O = layer.bias if isinstance(layer, nn.Linear) else None
        outs.append(nn.functional.linear(x_TI, layer.weight, bias_O))
    if projection.is_gated:
        gate_TO, up_TO = outs
        out_TO = silu_gate_by_torch(gate_TO, up_TO)
    else:
        out_TO = outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)
    return out_TO if residual_TO is None else residual_TO + out_TO
