"""Messages between a replica and the fleet: orders to change a row patch, and answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from server.http.errors import ApiError

Action = Literal["load", "unload"]
# content hashes of patches by name; None for one that is removed
Changes = dict[str, str | None]


@dataclass(frozen=True)
class Refusal:
    """The HTTP error of a change that was not made."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str] | None = None

    @classmethod
    def of(cls, error: ApiError) -> "Refusal":
        """The refusal that an error means."""
        return cls(error.status, error.body, error.headers)

    def error(self) -> ApiError:
        """The error to answer with."""
        fields = self.body["error"]
        return ApiError(
            self.status,
            fields["message"],
            fields["type"],
            fields["param"],
            fields["code"],
            self.headers,
        )


@dataclass(frozen=True)
class Order:
    """A change that a replica must make.

    Attributes:
        number: greater than that of the order before.
        undoes: the number of the order that this one takes back. A replica that did not carry
            out that order has nothing to do.
    """

    number: int
    action: Action
    name: str
    undoes: int | None = None


@dataclass(frozen=True)
class Outcome:
    """A replica's answer to an order.

    Attributes:
        content_hash: the hash of the patch that was loaded or removed.
        refusal: why the order was not carried out; None if it was.
    """

    content_hash: str = ""
    refusal: Refusal | None = None


@dataclass(frozen=True)
class Held:
    """The patches of a replica when it joins.

    Attributes:
        initial: the folders of its ``--patch``, by name.
        hashes: the content hashes of all patches that it has loaded, by name.
    """

    initial: Mapping[str, str]
    hashes: Mapping[str, str]
