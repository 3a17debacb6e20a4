"""Native products of a tensor-parallel rank on a CPU: packed weights in place of torch's layers."""

from torch import Tensor, nn

from engine.executors.cpu.kernels import CpuKernels
from engine.executors.cpu.packing import Packer
from engine.executors.parallel.layers import GatheredLogits, SummedLinear
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


class NativeLogits(GatheredLogits):
    """``GatheredLogits`` on packed weights."""

    def __init__(self, plain: GatheredLogits, weight_VD: Tensor, kernels: CpuKernels) -> None:
        super().__init__(plain.share, plain.group)
        self._product = NativeLinear(_without_bias(self.own_rows(weight_VD)), kernels)

    def own_logits(self, hidden_LD: Tensor, weight_VD: Tensor) -> Tensor:
        logits_LW: Tensor = self._product(hidden_LD)
        return logits_LW


def use_native_products(model: Transformer, kernels: CpuKernels) -> None:
    """Replace the linear layers of a rank's model by packed ones, and free their weights.

    The embedding, and with it the weight of the head, stays for lookups.
    """
    for name, layer in list(model.model.named_modules()):
        if not isinstance(layer, nn.Linear):
            continue
        is_summed = isinstance(layer, SummedLinear)
        made = NativeSum(layer, kernels) if is_summed else NativeLinear(layer, kernels)
        parent, _, leaf = name.rpartition(".")
        setattr(model.model.get_submodule(parent), leaf, made)
    assert isinstance(model.head_product, GatheredLogits)
    model.head_product = NativeLogits(model.head_product, model.head.weight, kernels)


def _without_bias(weight_OI: Tensor) -> nn.Linear:
    outputs, inputs = weight_OI.shape
    layer = Linear(inputs, outputs, bias=False, device="meta")
    layer.weight = nn.Parameter(weight_OI, requires_grad=False)
    return layer
