"""Base class of request bodies: strict JSON objects whose unknown fields are refused."""

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class RequestBody(BaseModel):
    """A JSON object: unknown fields are refused, and a null means that a field is not given."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: Any) -> Any:
        if isinstance(values, bytes):
            raise ValueError("the body needs the header Content-Type: application/json")
        if not isinstance(values, dict):
            raise ValueError("the body must be a JSON object")
        return {name: value for name, value in values.items() if value is not None}


def drop_neutral(values: Any, neutral: dict[str, Any]) -> Any:
    """``values`` without fields that have no effect here.

    Raises:
        ValueError: such a field has another value than its neutral one.
    """
    if not isinstance(values, dict):
        return values
    kept = dict(values)
    for name, allowed in neutral.items():
        value = kept.pop(name, None)
        same_type = isinstance(value, bool) == isinstance(allowed, bool)
        if value is not None and (value != allowed or not same_type):
            raise ValueError(f"{name}: only {allowed!r} is supported")
    return kept
