"""The description of a row patch: the content of its patch.json, validated."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from weights.checkpoints.table_origin import HASH_PATTERN
from weights.errors import PatchError
from weights.patches.opened_folder import OpenedFile
from weights.text_files import unique_keys

FORMAT_VERSION = 1
_VERSION = "memplus_patch"
_MAX_BYTES = 2**20
_MAX_ROWS, _MAX_VALUE_DIM = 2**40, 2**24
_MAX_NAME = 256
_KEYS = ("origins", "row_choice", "shapes", "data", "settings", "scores")


@dataclass(frozen=True)
class PatchDescription:
    """The model that a patch belongs to, and the settings that made it.

    Attributes:
        origins: origin of each table, by table name; see ``weights.checkpoints.table_origin``.
        row_choice: hash of the dense weights, which choose the rows that a token reads.
        shapes: R and V of each table, by table name.
        base_patches: content hashes of the patches that tables held already, by table name: the
            deltas were made for their rows with these.
        data: hash of the data that the patch was learned from; None if there is none.
        settings: settings of the command that made the patch; any JSON.
        scores: results that were measured when the patch was made; any JSON.
    """

    origins: Mapping[str, str]
    row_choice: str
    shapes: Mapping[str, tuple[int, int]]
    base_patches: Mapping[str, Sequence[str]] = field(default_factory=dict)
    data: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """The content of a ``patch.json`` that ``read_description`` reads back.

        Raises:
            PatchError: the content is larger than 1 MiB, which readers refuse.
        """
        text = json.dumps({_VERSION: FORMAT_VERSION, **asdict(self)}, indent=2, allow_nan=False)
        content = f"{text}\n".encode()
        if len(content) > _MAX_BYTES:
            raise PatchError(f"patch.json: has {len(content)} bytes, but at most {_MAX_BYTES} fit")
        return content


def read_description(file: OpenedFile) -> PatchDescription:
    """Read a ``patch.json`` of at most 1 MiB.

    Raises:
        PatchError: the file cannot be read, or a key is unknown, missing or has an invalid value.
    """
    path, content = file.path, file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise PatchError(f"{path}: is larger than {_MAX_BYTES} bytes")
    try:
        return _parse(
            json.loads(
                content,
                parse_constant=_refuse_constant,
                parse_float=_finite,
                object_pairs_hook=unique_keys,
            )
        )
    except RecursionError:
        raise PatchError(f"{path}: not valid JSON: nested too deeply") from None
    except ValueError as error:
        raise PatchError(f"{path}: {error}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"not valid JSON: {name}")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"not valid JSON: the number {text[:80]} is out of range")
    return value


def _parse(raw: object) -> PatchDescription:
    given = _object("patch.json", raw)
    version = given.pop(_VERSION, None)
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(f"{_VERSION}: must be {FORMAT_VERSION}, not {_shown(version)}")
    base_patches = _object("base_patches", given.pop("base_patches", {}))
    for key in (*_KEYS, *given):
        if key not in given:
            raise ValueError(f"{key}: missing")
        if key not in _KEYS:
            raise ValueError(f"{key[:80]!a}: unknown key")
    origins, shapes = _object("origins", given["origins"]), _object("shapes", given["shapes"])
    if not shapes:
        raise ValueError("shapes: names no table")
    for name in (*shapes, *origins, *base_patches):
        if not name.isprintable() or len(name) > _MAX_NAME:
            raise ValueError(
                f"origins: table name {name[:80]!a} is not printable or has more than {_MAX_NAME}"
                " characters"
            )
    if set(shapes) != set(origins):
        name = min(set(shapes) ^ set(origins))
        raise ValueError(f"origins: table {name} is only in one of origins and shapes")
    for name in base_patches:
        if name not in shapes:
            raise ValueError(f"base_patches: table {name} is not in shapes")
    return PatchDescription(
        origins={name: _hash(f"origins.{name}", value) for name, value in origins.items()},
        row_choice=_hash("row_choice", given["row_choice"]),
        shapes={name: _shape(f"shapes.{name}", value) for name, value in shapes.items()},
        base_patches={
            name: _hashes(f"base_patches.{name}", value) for name, value in base_patches.items()
        },
        data=None if given["data"] is None else _hash("data", given["data"]),
        settings=_object("settings", given["settings"]),
        scores=_object("scores", given["scores"]),
    )


def _object(key: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{key}: expected a JSON object")
    return dict(value)


def _hash(key: str, value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(HASH_PATTERN, value):
        raise ValueError(f"{key}: expected 64 hexadecimal digits, got {_shown(value)}")
    return value


def _hashes(key: str, values: object) -> list[str]:
    if not isinstance(values, list):
        raise ValueError(f"{key}: expected a list of hashes")
    return [_hash(key, value) for value in values]


def _shape(key: str, value: object) -> tuple[int, int]:
    if isinstance(value, list) and [type(one) for one in value] == [int, int]:
        num_rows, value_dim = value
        if 1 <= num_rows <= _MAX_ROWS and 1 <= value_dim <= _MAX_VALUE_DIM:
            return num_rows, value_dim
    raise ValueError(f"{key}: expected [rows, values], got {_shown(value)}")


def _shown(value: object) -> str:
    """A value in an error message, shortened, without control characters or lone surrogates."""
    return ascii(value)[:80]
