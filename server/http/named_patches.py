"""The row patches that a request names, with their scales, as a checked field."""

import re
from typing import Annotated, Any, NamedTuple

from pydantic import PlainValidator, WithJsonSchema

from engine.request import MAX_PATCH_SCALE, MAX_PATCH_USES
from server.patch_options import NAME_RULE, PATCH_NAME


class NamedPatch(NamedTuple):
    """A row patch by its name, and the scale of its deltas."""

    name: str
    scale: float = 1.0


def _check_patches(patches: Any) -> Any:
    if not isinstance(patches, list):
        raise ValueError('must be a list of names or of objects {"name", "scale"}')
    if len(patches) > MAX_PATCH_USES:
        raise ValueError(f"at most {MAX_PATCH_USES} patches, not {len(patches)}")
    return [_named(patch) for patch in patches]


def _named(patch: Any) -> NamedPatch:
    given = {"name": patch} if isinstance(patch, str) else patch
    if not isinstance(given, dict) or not given.keys() <= {"name", "scale"}:
        raise ValueError("each patch must be a name or an object with name and scale")
    name, scale = given.get("name"), given.get("scale")
    if not isinstance(name, str) or not re.fullmatch(PATCH_NAME, name):
        raise ValueError(f"a name must have {NAME_RULE}")
    if scale is None:
        return NamedPatch(name)
    # this is false for NaN too
    if type(scale) not in (int, float) or not abs(scale) <= MAX_PATCH_SCALE:
        raise ValueError(f"scale must be a number from -{MAX_PATCH_SCALE} to {MAX_PATCH_SCALE}")
    return NamedPatch(name, float(scale))


# pydantic's own schema would not know the checks above
_NAME = {"type": "string", "pattern": f"^{PATCH_NAME}$", "description": "the patch's name"}
_SCALE = {
    "type": "number",
    "minimum": -MAX_PATCH_SCALE,
    "maximum": MAX_PATCH_SCALE,
    "default": 1,
    "description": "multiplies its deltas",
}
_SCALED = {
    "type": "object",
    "properties": {"name": _NAME, "scale": _SCALE},
    "required": ["name"],
    "additionalProperties": False,
}
_PATCHES = {"type": "array", "items": {"anyOf": [_NAME, _SCALED]}, "maxItems": MAX_PATCH_USES}

NamedPatches = Annotated[list[NamedPatch], PlainValidator(_check_patches), WithJsonSchema(_PATCHES)]
