"""Changes the loaded row patches of all replicas together: on every one, or on none."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from itertools import count

from server.http.errors import error_body
from server.replicas.patch_orders import Action, Changes, Held, Order, Outcome, Refusal

logger = logging.getLogger(__name__)
# a replica's own load ends after 120 s
ORDER_TIMEOUT_S = 150.0
# replicas of a fleet that has died join the next one within a few seconds
REJOIN_TIMEOUT_S = 15.0


@dataclass(frozen=True)
class FleetState:
    """The part of a fleet that the next one needs if its process dies.

    Attributes:
        changes: as ``PatchFleet.changes``.
        replicas: those that have joined or are joining. Some of them may have left since.
    """

    changes: Changes = field(default_factory=dict)
    replicas: tuple[str, ...] = ()


@dataclass
class _Member:
    held: Held
    orders: asyncio.Queue[Order | None] = field(default_factory=asyncio.Queue)
    answers: dict[int, "asyncio.Future[Outcome | None]"] = field(default_factory=dict)

    def initial_hash(self, name: str, folder: str) -> str | None:
        """The content hash of its ``--patch`` of this name and folder, if it was loaded."""
        is_equal = self.held.initial.get(name) == folder
        return self.held.hashes.get(name) if is_equal else None


_NEW = FleetState()


async def _keep_nowhere(state: FleetState) -> None:
    """For a fleet whose changes end with it."""


class PatchFleet:
    """The replicas of one application, and how their patches differ from those of ``--patch``.

    Replicas ask for orders and report on them. A replica joins before it answers requests, so it
    misses no change. Changes are made one after another.

    Attributes:
        changes: content hashes of the patches that were loaded later; None for those of
            ``--patch`` that were removed.
    """

    def __init__(
        self,
        before: FleetState = _NEW,
        keep: Callable[[FleetState], Awaitable[None]] = _keep_nowhere,
        order_timeout_s: float = ORDER_TIMEOUT_S,
        rejoin_timeout_s: float = REJOIN_TIMEOUT_S,
    ) -> None:
        """``before``: the state of a fleet that has died; ``keep`` stores it for the next one."""
        self._order_timeout_s = order_timeout_s
        self._rejoin_timeout_s = rejoin_timeout_s
        self._keep = keep
        self._members: dict[str, _Member] = {}
        self._joining: dict[str, _Member] = {}
        self._missing = set(before.replicas)  # they have not joined again yet
        self._is_complete = asyncio.Event()
        self._lock = asyncio.Lock()
        self._numbers = count()
        self.changes: Changes = dict(before.changes)

    @property
    def members(self) -> Collection[str]:
        """The replicas that take part in changes."""
        return tuple(self._members)

    async def join(self, replica: str, held: Held) -> Changes:
        """Add a replica, or add it again.

        Returns:
            The content hashes of patches that it must have, and None for those that it must not
            have. A patch of ``--patch`` from the same folder as in another replica must have the
            same content.
        """
        self.leave(replica)  # at once, so that no change waits for it
        member = self._joining[replica] = _Member(held)
        try:
            async with self._lock:
                wanted = self._wanted(held)
                await self._keep(self._state(self.changes))
                # it may have died, or joined once more, while a change was made
                if self._joining.get(replica) is member:
                    self._members[replica] = member
                    self._missing.discard(replica)
                    if not self._missing:
                        self._is_complete.set()
                return wanted
        finally:
            if self._joining.get(replica) is member:
                del self._joining[replica]

    def _wanted(self, held: Held) -> Changes:
        wanted = dict(self.changes)
        for name, content_hash in held.hashes.items():
            if name in wanted:
                continue
            folder = held.initial.get(name)
            if folder is None:
                wanted[name] = None  # a change that was not finished
            else:
                wanted[name] = self._initial_hash(name, folder) or content_hash
        return wanted

    def _state(self, changes: Changes) -> FleetState:
        replicas = {*self._members, *self._missing, *self._joining}
        return FleetState(changes, tuple(sorted(replicas)))

    def _initial_hash(self, name: str, folder: str) -> str | None:
        found = (member.initial_hash(name, folder) for member in self._members.values())
        return next((one for one in found if one is not None), None)

    def leave(self, replica: str) -> None:
        """Remove a replica; no change waits for it any longer. If it still runs, its next order
        is to join again."""
        self._joining.pop(replica, None)
        member = self._members.pop(replica, None)
        if member is None:
            return
        member.orders.put_nowait(None)
        for answer in member.answers.values():
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
        it. An error of ``keep`` is raised, after which none has it either."""
        await self._wait_for_missing()
        async with self._lock:
            number = next(self._numbers)
            outcomes = await self._order(Order(number, "load", name), self.members)
            refusal = _first_refusal(outcomes)
            hashes = {one.content_hash for one in outcomes.values() if one.refusal is None}
            if refusal is None and len(hashes) > 1:
                message = f"name: patch {name!r} has other contents on other machines"
                refusal = Refusal(500, error_body(message, "server_error", "name"))
            if refusal is None and not hashes:
                refusal = _unavailable("no replica is ready")
            is_kept = False
            try:
                if refusal is None:
                    await self._set_changes(self.changes | {name: hashes.pop()})
                    is_kept = True
            finally:
                if not is_kept:
                    await self._undo(number, "unload", name, outcomes)
            return refusal

    async def unload(self, name: str) -> Refusal | None:
        """Remove a patch from all replicas; the refusal if one of them did not, after which all
        have it as before. An error of ``keep`` is raised, after which they have it, too."""
        await self._wait_for_missing()
        async with self._lock:
            before = self.changes
            # stored first: after the death of this process, replicas finish the removal
            await self._set_changes(self._without(name))
            number = next(self._numbers)
            outcomes = await self._order(Order(number, "unload", name), self.members)
            # a replica may have lost the patch before
            missing = {
                r for r, one in outcomes.items() if one.refusal and one.refusal.status == 404
            }
            others = {r: one for r, one in outcomes.items() if r not in missing}
            refusal = _first_refusal(others or outcomes)
            if not outcomes:
                refusal = _unavailable("no replica is ready")
            if refusal is not None:
                try:
                    await self._set_changes(before)
                finally:
                    self.changes = before  # also if it is not stored: the replicas have it again
                    await self._undo(number, "load", name, outcomes)
            return refusal

    async def _wait_for_missing(self) -> None:
        """Wait until the replicas of the previous fleet have joined: a change must reach all of
        them. Those that do not come in time have died, or make all changes when they join."""
        if self._missing:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._rejoin_timeout_s):
                    await self._is_complete.wait()
            self._missing.clear()
            self._is_complete.set()  # for other changes that wait

    def _without(self, name: str) -> Changes:
        changes = {other: content for other, content in self.changes.items() if other != name}
        if any(name in member.held.initial for member in self._members.values()):
            changes[name] = None
        return changes

    async def _set_changes(self, changes: Changes) -> None:
        if changes != self.changes:
            await self._keep(self._state(changes))
            self.changes = changes

    async def _order(self, order: Order, replicas: Collection[str]) -> dict[str, Outcome]:
        """Give an order; the answers of the replicas that have not ended."""
        answers: dict[str, asyncio.Future[Outcome | None]] = {}
        for replica in replicas:
            member = self._members[replica]
            answers[replica] = asyncio.get_running_loop().create_future()
            member.answers[order.number] = answers[replica]
            member.orders.put_nowait(order)
        if answers:
            await asyncio.wait(answers.values(), timeout=self._order_timeout_s)
        found: dict[str, Outcome] = {}
        for replica, answer in answers.items():
            if replica in self._members:
                self._members[replica].answers.pop(order.number, None)
            outcome = answer.result() if answer.done() else Outcome(refusal=_late(order.name))
            if outcome is not None:
                found[replica] = outcome
        return found

    async def _undo(
        self, number: int, action: Action, name: str, outcomes: Mapping[str, Outcome]
    ) -> None:
        """Take back an order from the replicas that did it, or that may do it yet.

        A replica that cannot take it back leaves the fleet. Then it ends, or it joins again and
        gets the list of patches that it must have.
        """
        changed = [
            replica
            for replica, outcome in outcomes.items()
            if replica in self._members
            and (outcome.refusal is None or outcome.refusal.status == _LATE_STATUS)
        ]
        order = Order(next(self._numbers), action, name, undoes=number)
        for replica, outcome in (await self._order(order, changed)).items():
            if outcome.refusal is not None:
                reason = outcome.refusal.body["error"]["message"]
                logger.error("replica %s did not take back a change: %s", replica, reason)
                self.leave(replica)


_LATE_STATUS = 504


def _first_refusal(outcomes: Mapping[str, Outcome]) -> Refusal | None:
    refusals = [outcome.refusal for outcome in outcomes.values() if outcome.refusal is not None]
    return refusals[0] if refusals else None


def _late(name: str) -> Refusal:
    message = f"name: patch {name!r}: a replica did not answer in time"
    return Refusal(_LATE_STATUS, error_body(message, "timeout_error", "name"))


def _unavailable(message: str) -> Refusal:
    return Refusal(503, error_body(message, "server_error"), {"Retry-After": "5"})
