"""Products of a tensor-parallel rank on its GPU: their results are summed or gathered over ranks.

A product cannot add to the residual stream itself: each rank has a part of the result only. So a
kernel computes the part, a collective joins the parts, and then bias and residual are added once.
"""

from typing import NamedTuple

from torch import Tensor, nn

from engine.executors.cuda.kernels.rms_norm import Norm
from engine.executors.cuda.products import Product, joined, weight_of
from engine.executors.parallel.collectives import Collectives
from engine.executors.parallel.layers import GatheredColumns, GatheredLogits, SummedLinear
from engine.model.grouped_layers import GroupedLinear
from engine.model.transformer import Transformer


class SummedProduct(NamedTuple):
    """``y = sum over ranks of W x, + b``, with this rank's columns of W."""

    part: Product
    bias_N: Tensor | None
    group: Collectives

    def __call__(self, x_MK: Tensor, *, residual_MO: Tensor | None = None) -> Tensor:
        """Return y, or add it to a residual stream in place."""
        y_MN = self.group.sum(self.part(x_MK))
        if self.bias_N is not None:
            y_MN = y_MN.add_(self.bias_N)
        return y_MN if residual_MO is None else residual_MO.add_(y_MN)

    def with_scaled_bias(self, scale: float) -> "SummedProduct":
        """This product, with its bias multiplied by a number."""
        return self if self.bias_N is None else self._replace(bias_N=self.bias_N * scale)


class GatheredProduct(NamedTuple):
    """The columns of all ranks, in place of a value projection."""

    group: Collectives

    def __call__(self, x_MC: Tensor, *, residual_MO: Tensor | None = None) -> Tensor:
        """Return all columns, or add them to a residual stream in place."""
        y_MO = self.group.gather_columns(x_MC)
        return y_MO if residual_MO is None else residual_MO.add_(y_MO)

    def with_scaled_bias(self, scale: float) -> "GatheredProduct":
        """This product: it has no bias."""
        return self


class GatheredHead(NamedTuple):
    """Logits of all tokens, of which each rank computes some.

    Attributes:
        part: this rank's rows of the head.
        num_own: their number.
        gathered: gets the logits of all ranks.
    """

    part: Product
    num_own: int
    gathered: GatheredLogits

    def __call__(self, x_MK: Tensor, *, norm: Norm, out_MO: Tensor) -> Tensor:
        """Write the fp32 logits ``[M, vocabulary]`` to ``out``."""
        own_MW = out_MO.new_empty(len(x_MK), self.num_own)
        self.part(x_MK, norm=norm, out_MO=own_MW)
        return out_MO.copy_(self.gathered.of_all_ranks(own_MW))


OutputProduct = Product | SummedProduct | GatheredProduct


def output_product(layer: nn.Linear | GroupedLinear | GatheredColumns) -> OutputProduct:
    """The product of a layer whose results are added to the residual stream."""
    if isinstance(layer, GatheredColumns):
        return GatheredProduct(layer.group)
    product = joined(layer)
    if not isinstance(layer, SummedLinear):
        return product
    return SummedProduct(product._replace(bias_N=None), product.bias_N, layer.group)


def head_of(model: Transformer) -> Product | GatheredHead:
    """The product of a model's head."""
    weight_VD, gathered = weight_of(model.head), model.head_product
    if not isinstance(gathered, GatheredLogits):
        return Product(weight_VD)
    assert isinstance(weight_VD, Tensor)
    own_WD = gathered.own_rows(weight_VD)
    return GatheredHead(Product(own_WD), len(own_WD), gathered)
