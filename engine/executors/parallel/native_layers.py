"""Layers of a tensor-parallel rank on a CPU that native kernels compute, on packed weights."""

from torch import Tensor, nn

from engine.executors.cpu.kernels import CpuKernels
from engine.executors.cpu.packing import Packer
from engine.executors.parallel.layers import GatheredLogits, SummedLinear
from engine.model.attention import Attention
from engine.model.feed_forward import DenseFeedForward
from engine.model.forward_trace import ForwardTrace
from engine.model.layout import TokenLayout
from engine.model.row_patches import ForwardPatches
from engine.model.transformer import Transformer
from engine.model.uninitialised import Linear


class NativeLinear(nn.Module):
    """A linear layer on packed weights. An output row is the same, bit for bit, in any batch."""

    def __init__(self, layer: nn.Linear, kernels: CpuKernels) -> None:
        super().__init__()
        self._packed, self._kernels = Packer(kernels, layer.weight.dtype).linear(layer), kernels

    def forward(self, x_TI: Tensor) -> Tensor:
        return self._kernels.linear(self._packed, x_TI.contiguous())


class NativeSum(nn.Module):
    """``SummedLinear`` on packed weights."""

    def __init__(self, layer: SummedLinear, kernels: CpuKernels) -> None:
        super().__init__()
        self._product = NativeLinear(_without_bias(layer.weight), kernels)
        self._bias, self._group = layer.bias, layer.group

    def forward(self, x_TI: Tensor) -> Tensor:
        y_TO: Tensor = self._group.sum(self._product(x_TI))
        return y_TO if self._bias is None else y_TO + self._bias


class NativeAttention(nn.Module):
    """``Attention`` of this rank's heads over KV blocks."""

    def __init__(self, attention: Attention, kernels: CpuKernels) -> None:
        super().__init__()
        packer = Packer(kernels, attention.q_proj.weight.dtype)
        self._qkv = packer.linear(attention.q_proj, attention.k_proj, attention.v_proj)
        self._norms = packer.head_norms(attention)
        self._num_heads = len(attention.q_proj.weight) // attention.head_dim
        assert isinstance(attention.o_proj, SummedLinear)
        self._output, self._kernels = NativeSum(attention.o_proj, kernels), kernels

    def forward(
        self,
        x_TD: Tensor,
        layout: TokenLayout,
        angles: tuple[Tensor, Tensor],
        kv_blocks: Tensor,
    ) -> Tensor:
        qkv_TF = self._kernels.linear(self._qkv, x_TD)
        sizes = self._num_heads, angles, layout, kv_blocks
        out_TD: Tensor = self._output(self._kernels.attention(qkv_TF, *sizes, self._norms))
        return out_TD


class NativeFeedForward(nn.Module):
    """``DenseFeedForward`` with this rank's columns."""

    def __init__(self, dense: DenseFeedForward, kernels: CpuKernels) -> None:
        super().__init__()
        packer = Packer(kernels, dense.gate_proj.weight.dtype)
        self._gated = packer.linear(dense.gate_proj, dense.up_proj, is_gated=True)
        assert isinstance(dense.down_proj, SummedLinear)
        self._down, self._kernels = NativeSum(dense.down_proj, kernels), kernels

    def forward(
        self,
        x_TD: Tensor,
        trace: ForwardTrace | None = None,
        patches: ForwardPatches | None = None,
    ) -> Tensor:
        y_TD: Tensor = self._down(self._kernels.linear(self._gated, x_TD))
        return y_TD


class NativeLogits(GatheredLogits):
    """``GatheredLogits`` on packed weights."""

    def __init__(self, plain: GatheredLogits, weight_VD: Tensor, kernels: CpuKernels) -> None:
        super().__init__(plain.share, plain.group)
        self._product = NativeLinear(_without_bias(self.own_rows(weight_VD)), kernels)

    def own_logits(self, hidden_LD: Tensor, weight_VD: Tensor) -> Tensor:
        logits_LW: Tensor = self._product(hidden_LD)
        return logits_LW


def use_native_layers(model: Transformer, kernels: CpuKernels) -> None:
    """Replace the layers of a rank's model by packed ones, one at a time, and free their weights.

    The model then needs KV blocks whose size is a multiple of ``KV_STEP``. The embedding, and with
    it the weight of the head, stays for lookups.
    """
    for kinds in ((Attention, DenseFeedForward), (nn.Linear,)):
        for name, module in list(model.model.named_modules()):
            if isinstance(module, kinds):
                parent, _, leaf = name.rpartition(".")
                setattr(model.model.get_submodule(parent), leaf, _native(module, kernels))
    assert isinstance(model.head_product, GatheredLogits)
    model.head_product = NativeLogits(model.head_product, model.head.weight, kernels)


def _native(module: nn.Module, kernels: CpuKernels) -> nn.Module:
    if isinstance(module, Attention):
        return NativeAttention(module, kernels)
    if isinstance(module, DenseFeedForward):
        return NativeFeedForward(module, kernels)
    if isinstance(module, SummedLinear):
        return NativeSum(module, kernels)
    assert isinstance(module, nn.Linear)
    return NativeLinear(module, kernels)


def _without_bias(weight_OI: Tensor) -> nn.Linear:
    outputs, inputs = weight_OI.shape
    layer = Linear(inputs, outputs, bias=False, device="meta")
    layer.weight = nn.Parameter(weight_OI, requires_grad=False)
    return layer
