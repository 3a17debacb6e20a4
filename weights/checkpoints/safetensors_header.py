"""The header of a safetensors file: JSON of a checked form."""

import json
import re
from typing import Any

from weights.text_files import unique_keys

# a tensor takes about 150 bytes; models with the most experts have 70,000 tensors
MAX_HEADER_BYTES = 2**24
_MAX_DIMS, _MAX_SIZE, _MAX_NAME = 8, 2**63 - 1, 500
_METADATA = "__metadata__"


def parse_header(content: bytes) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The entries of a header by tensor name, and its metadata; names are printable.

    Each entry has a ``dtype``, a ``shape`` and two ``data_offsets``. Only safetensors checks that
    the tensors have the bytes of their shapes, and fill the file.

    Raises:
        ValueError: the header is not JSON of that form, or gives a name twice.
        RecursionError: its JSON is nested deeply.
    """
    header = json.loads(content.decode(), object_pairs_hook=unique_keys)
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"{_METADATA} is not an object of texts")
    for name, entry in header.items():
        _check_entry(name, entry)
    return header, metadata


def _check_entry(name: str, entry: object) -> None:
    if not name.isprintable() or len(name) > _MAX_NAME:
        raise ValueError(
            f"the tensor name {name[:80]!a} is not printable or longer than {_MAX_NAME} characters"
        )
    if not isinstance(entry, dict) or not (
        re.fullmatch("[A-Z0-9_]{1,16}", str(entry.get("dtype")))
        and _are_sizes(entry.get("shape"), _MAX_DIMS)
        and _are_sizes(entry.get("data_offsets"), 2)
        and len(entry["data_offsets"]) == 2
    ):
        raise ValueError(f"tensor {name} has no valid dtype, shape and data_offsets")


def _are_sizes(values: object, most: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= most
        and all(type(one) is int and 0 <= one <= _MAX_SIZE for one in values)
    )
