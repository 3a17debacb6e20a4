"""Changes the loaded row patches of all replicas together: on every one, or on none."""

import asyncio
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

from server.http.errors import ApiError, error_body

Action = Literal["load", "unload"]
# a replica's own load ends after 120 s
ORDER_TIMEOUT_S = 150.0


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
    """A change that a replica must make; its number grows."""

    number: int
    action: Action
    name: str


@dataclass(frozen=True)
class Outcome:
    """A replica's answer to an order.

    Attributes:
        content_hash: the hash of the patch that was loaded or removed.
        refusal: why the order was not carried out; None if it was.
    """

    content_hash: str = ""
    refusal: Refusal | None = None


@dataclass
class _Member:
    orders: asyncio.Queue[Order] = field(default_factory=asyncio.Queue)
    answers: dict[int, "asyncio.Future[Outcome | None]"] = field(default_factory=dict)


class PatchFleet:
    """The replicas of one application, and how their patches differ from those of ``--patch``.

    Replicas ask for orders and report on them. A replica joins before it loads patches, so it
    misses no change. Changes are made one after another.

    Attributes:
        changes: content hashes of the patches that were loaded later; None for those of
            ``--patch`` that were removed.
    """

    def __init__(self, order_timeout_s: float = ORDER_TIMEOUT_S) -> None:
        self._order_timeout_s = order_timeout_s
        self._members: dict[str, _Member] = {}
        self._lock = asyncio.Lock()
        self._numbers = count()
        self._initial: set[str] = set()
        self.changes: dict[str, str | None] = {}

    @property
    def members(self) -> Collection[str]:
        """The replicas that take part in changes."""
        return tuple(self._members)

    async def join(
        self, replica: str, initial: Collection[str], held: Mapping[str, str] | None = None
    ) -> dict[str, str | None]:
        """Add a replica; returns ``changes``, which it must make before it answers requests.

        Args:
            replica: a unique name.
            initial: the names of its ``--patch``.
            held: the patches of a replica that has answered requests already. The first such
                replica of a new fleet decides the changes: an earlier fleet was lost.
        """
        async with self._lock:
            if held is not None and not self._members and not self.changes:
                self.changes = {n: content for n, content in held.items() if n not in initial}
                self.changes |= {name: None for name in initial if name not in held}
            self._initial.update(initial)
            self._members[replica] = _Member()
            return dict(self.changes)

    def leave(self, replica: str) -> None:
        """Remove a replica that has ended; nobody waits for its answers any longer."""
        member = self._members.pop(replica, None)
        for answer in member.answers.values() if member is not None else ():
            if not answer.done():
                answer.set_result(None)

    async def next_order(self, replica: str) -> Order | None:
        """Wait for a replica's next order; None if it must join again."""
        member = self._members.get(replica)
        return None if member is None else await member.orders.get()

    def report(self, replica: str, number: int, outcome: Outcome) -> None:
        """Take a replica's answer to an order."""
        member = self._members.get(replica)
        answer = None if member is None else member.answers.get(number)
        if answer is not None and not answer.done():
            answer.set_result(outcome)

    async def load(self, name: str) -> Refusal | None:
        """Load a patch in all replicas; the refusal if one of them did not, after which none has
        it."""
        async with self._lock:
            outcomes = await self._order("load", name)
            refusal = _first_refusal(outcomes)
            hashes = {one.content_hash for one in outcomes.values() if one.refusal is None}
            if refusal is None and len(hashes) > 1:
                message = f"name: patch {name!r} has other contents on other machines"
                refusal = Refusal(500, error_body(message, "server_error", "name"))
            if refusal is None and not hashes:
                refusal = _unavailable("no replica is ready")
            if refusal is None:
                self.changes[name] = hashes.pop()
            else:
                await self._undo("unload", name, outcomes)
            return refusal

    async def unload(self, name: str) -> Refusal | None:
        """Remove a patch from all replicas; the refusal if one of them did not, after which all
        have it as before."""
        async with self._lock:
            outcomes = await self._order("unload", name)
            # a replica may have lost the patch before
            missing = {
                r for r, one in outcomes.items() if one.refusal and one.refusal.status == 404
            }
            others = {r: one for r, one in outcomes.items() if r not in missing}
            refusal = _first_refusal(others or outcomes)
            if not outcomes:
                refusal = _unavailable("no replica is ready")
            if refusal is not None:
                await self._undo("load", name, outcomes)
            elif name in self._initial:
                self.changes[name] = None
            else:
                self.changes.pop(name, None)
            return refusal

    async def _order(
        self, action: Action, name: str, replicas: Collection[str] | None = None
    ) -> dict[str, Outcome]:
        """Give an order, by default to all replicas; the answers of those that have not ended."""
        number = next(self._numbers)
        chosen = self._members if replicas is None else {r: self._members[r] for r in replicas}
        answers: dict[str, asyncio.Future[Outcome | None]] = {}
        for replica, member in chosen.items():
            answers[replica] = asyncio.get_running_loop().create_future()
            member.answers[number] = answers[replica]
            member.orders.put_nowait(Order(number, action, name))
        if answers:
            await asyncio.wait(answers.values(), timeout=self._order_timeout_s)
        found: dict[str, Outcome] = {}
        for replica, answer in answers.items():
            if replica in self._members:
                self._members[replica].answers.pop(number, None)
            outcome = answer.result() if answer.done() else Outcome(refusal=_late(name))
            if outcome is not None:
                found[replica] = outcome
        return found

    async def _undo(self, action: Action, name: str, outcomes: Mapping[str, Outcome]) -> None:
        """Take back an order from the replicas that did it, or that may do it yet."""
        changed = [
            replica
            for replica, outcome in outcomes.items()
            if replica in self._members
            and (outcome.refusal is None or outcome.refusal.status == _LATE_STATUS)
        ]
        await self._order(action, name, changed)


_LATE_STATUS = 504


def _first_refusal(outcomes: Mapping[str, Outcome]) -> Refusal | None:
    refusals = [outcome.refusal for outcome in outcomes.values() if outcome.refusal is not None]
    return refusals[0] if refusals else None


def _late(name: str) -> Refusal:
    message = f"name: patch {name!r}: a replica did not answer in time"
    return Refusal(_LATE_STATUS, error_body(message, "timeout_error", "name"))


def _unavailable(message: str) -> Refusal:
    return Refusal(503, error_body(message, "server_error"), {"Retry-After": "5"})
