"""Admission control: bounds the prompts, tokens and body bytes of all requests in flight."""

import time
from collections.abc import Callable
from typing import Literal

from engine.errors import RequestError
from server.http.errors import OverloadedError

Resource = Literal["prompts", "tokens", "body_bytes"]
# a request whose body has been arriving for this long gives way to others
GRACE_S = 1.0
_REASONS = {"prompts": "queue_full", "tokens": "too_many_tokens", "body_bytes": "too_many_bytes"}
_UNITS = {
    "prompts": "prompts (with samples)",
    "tokens": "tokens (prompts and max_tokens, with samples)",
    "body_bytes": "bytes",
}


class Admission:
    """Lends each HTTP request its part of the limits, and rejects requests beyond them.

    A place is taken when the headers of a request have arrived, before its body is read. If places
    are missing, requests whose bodies arrive slowly lose theirs.
    """

    def __init__(
        self,
        limits: dict[Resource, int],
        on_rejected: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``on_rejected`` gets the reason of a rejection; ``clock`` returns seconds."""
        self._limits = limits
        self._on_rejected = on_rejected
        self._clock = clock
        self._arriving: dict[Place, float] = {}  # by the start of the arrival, the oldest first
        self.used: dict[Resource, int] = dict.fromkeys(limits, 0)

    def open(self, on_evicted: Callable[[], None]) -> "Place":
        """A place for a request whose body is to arrive; it holds nothing yet.

        ``on_evicted`` must end the arrival: the place was given to another request.
        """
        place = Place(self, on_evicted)
        self._arriving[place] = self._clock()
        return place

    def arrived(self, place: "Place") -> None:
        """Let a place be kept from now on: its request's body is whole."""
        self._arriving.pop(place, None)

    def take(self, place: "Place", resource: Resource, count: int, held: int) -> None:
        """Enlarge a place's part of a limit from ``held`` to ``count``.

        Raises:
            OverloadedError: less is left.
            RequestError: the whole limit is less than ``count``.
        """
        limit = self._limits[resource]
        if count > limit:
            message = f"at most {limit} {_UNITS[resource]} per request, not {count}"
            raise RequestError("prompt", message)
        while self.used[resource] + count - held > limit:
            if not self._evict(place):
                self._on_rejected(_REASONS[resource])
                raise OverloadedError
        self.used[resource] += count - held

    def give_back(self, resource: Resource, count: int) -> None:
        """Release a part of a limit."""
        self.used[resource] -= count
        assert self.used[resource] >= 0

    def _evict(self, asking: "Place") -> bool:
        """End the oldest arrival if it is slow and not the asking one; return whether."""
        place, began = next(iter(self._arriving.items()), (None, 0.0))
        if place is None or place is asking or self._clock() - began < GRACE_S:
            return False
        place.close()
        place.on_evicted()
        return True


class Place:
    """The part of the limits that one HTTP request holds."""

    def __init__(self, admission: Admission, on_evicted: Callable[[], None]) -> None:
        self.on_evicted = on_evicted
        self._admission = admission
        self._held: dict[Resource, int] = {}

    def enlarge(self, resource: Resource, count: int) -> None:
        """Hold at least ``count`` of a resource.

        Raises:
            OverloadedError, RequestError: as ``Admission.take``.
        """
        held = self._held.get(resource, 0)
        if count > held:
            self._admission.take(self, resource, count, held)
            self._held[resource] = count

    def reduce(self, resource: Resource, count: int) -> None:
        """Give back ``count`` of a resource, at most all that is held."""
        given = min(count, self._held.get(resource, 0))
        if given:
            self._held[resource] -= given
            self._admission.give_back(resource, given)

    def keep(self) -> None:
        """Hold the place until it is closed: the body is whole, and nobody can evict it."""
        self._admission.arrived(self)

    def close(self) -> None:
        """Give back everything."""
        self._admission.arrived(self)
        for resource in list(self._held):
            self.reduce(resource, self._held[resource])
