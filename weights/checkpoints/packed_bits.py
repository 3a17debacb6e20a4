"""Bits of a folder's weights after the CPU executor has packed them, to estimate memory."""

from collections.abc import Mapping

from engine.model.config import ModelConfig
from weights.checkpoints.stored_groups import requested_bits, stored_bits
from weights.checkpoints.tensor_files import StoredTensor

# layers that are packed as one product, by their names in the same module
_PRODUCTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
_PRODUCT_OF = {name: product for product in _PRODUCTS for name in product}


def packed_bits(
    config: ModelConfig, stored: Mapping[str, StoredTensor], weight_dtype: str
) -> dict[str, int]:
    """Bits of the layers that stay in groups, by the layer's name.

    ``weight_dtype`` is auto, or the dtype to which weights are rounded at load. The layers of one
    product get the bits of the widest; if one of them is dense, all are.

    Raises:
        ConfigError: as ``requested_bits``.
    """
    if weight_dtype != "auto":
        return requested_bits(config, weight_dtype)
    bits = stored_bits(stored)
    packed = {}
    for name in bits:
        last = name.rpartition(".")[2]
        module = name.removesuffix(last)
        product = [module + other for other in _PRODUCT_OF.get(last, (last,))]
        if all(other in bits for other in product):
            packed[name] = max(bits[other] for other in product)
    return packed
