"""Formats of a folder's weights in an executor, to estimate memory."""

from collections.abc import Mapping

from engine.model.config import ModelConfig
from engine.model.grouped_weights import GroupFormat
from weights.checkpoints.stored_groups import requested_formats, stored_formats
from weights.checkpoints.tensor_files import StoredTensor

# layers that are packed as one product, by their names in the same module
_PRODUCTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
_PRODUCT_OF = {name: product for product in _PRODUCTS for name in product}


def packed_formats(
    config: ModelConfig, stored: Mapping[str, StoredTensor], weight_dtype: str
) -> dict[str, GroupFormat]:
    """Formats of the layers that stay in groups, by the layer's name.

    ``weight_dtype`` is auto, or the dtype to which weights are rounded at load. The layers of one
    product get 8 bits if their formats differ; if one of them is dense, all are.

    Raises:
        ConfigError: as ``requested_formats``.
    """
    if weight_dtype != "auto":
        return requested_formats(config, weight_dtype)
    formats = stored_formats(stored)
    packed = {}
    for name, one in formats.items():
        last = name.rpartition(".")[2]
        module = name.removesuffix(last)
        product = [module + other for other in _PRODUCT_OF.get(last, (last,))]
        if all(other in formats for other in product):
            is_alike = all(formats[other] == one for other in product)
            packed[name] = one if is_alike else GroupFormat(8)
    return packed
