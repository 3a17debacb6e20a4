"""One replica's part in changes of the row patches: asks for orders, carries them out, reports."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Protocol

from engine.errors import ConfigError
from server.http.errors import ApiError, EngineError
from server.http.served_patches import ServedPatches
from server.replicas.patch_orders import Changes, Held, Order, Outcome, Refusal

logger = logging.getLogger(__name__)
# before the next attempt to reach a fleet that does not answer
_PAUSE_S = 1.0


class FleetLostError(Exception):
    """The fleet cannot be reached now."""


class Fleet(Protocol):
    """The fleet as one replica sees it: ``PatchFleet`` without the replica's name.

    Every method but ``leave`` raises FleetLostError if the fleet cannot be reached.
    """

    async def join(self, held: Held) -> Changes: ...
    async def leave(self) -> None: ...
    async def next_order(self) -> Order | None: ...
    async def report(self, number: int, outcome: Outcome) -> None: ...
    async def load(self, name: str) -> Refusal | None: ...
    async def unload(self, name: str) -> Refusal | None: ...


class FleetMember:
    """The patches of one replica, which follow those of all.

    It takes the place of ``ServedPatches`` in the routes that change patches.
    """

    def __init__(
        self, patches: ServedPatches, fleet: Fleet, initial: Mapping[str, Path | str]
    ) -> None:
        """``initial``: the folders of ``--patch``, by name."""
        self._patches = patches
        self._fleet = fleet
        self._initial = {name: str(folder) for name, folder in initial.items()}
        self._work: asyncio.Task[None] | None = None
        self._last_done: tuple[int, str] | None = None  # an order's number, the patch's hash

    @property
    def is_lost(self) -> bool:
        """Whether this replica follows no orders any longer, so that only a new one helps."""
        return self._work is not None and self._work.done() and not self._work.cancelled()

    async def join(self) -> None:
        """Make the changes that other replicas have made, then follow the fleet's orders.

        Raises:
            ApiError: a patch that the others have cannot be loaded.
            ConfigError: a patch has other contents here.
            FleetLostError: the fleet cannot be reached.
        """
        try:
            await self._follow()
        except Exception:
            await self._fleet.leave()
            raise
        self._work = asyncio.create_task(self._obey())

    async def leave(self) -> None:
        """Take part in no further change."""
        if self._work is not None:
            self._work.cancel()
            await asyncio.gather(self._work, return_exceptions=True)
        await self._fleet.leave()

    async def load(self, name: str) -> None:
        """Load a patch in all replicas, or in none.

        Raises:
            ApiError: as ``ServedPatches.load`` of any replica.
        """
        await self._change(self._fleet.load, name)

    async def unload(self, name: str) -> None:
        """Remove a patch from all replicas, or from none.

        Raises:
            ApiError: as ``ServedPatches.unload`` of any replica.
        """
        await self._change(self._fleet.unload, name)

    async def _change(self, change: Callable[[str], Awaitable[Refusal | None]], name: str) -> None:
        try:
            refusal = await change(name)
        except FleetLostError as error:
            logger.error("row patches: a change of %s was not made: %s", name, error)
            headers = {"Retry-After": "5"}
            message = "the replicas cannot agree on row patches now"
            raise ApiError(503, message, "server_error", headers=headers) from None
        if refusal is not None:
            raise refusal.error()

    async def _obey(self) -> None:
        try:
            must_join = False
            while True:
                try:
                    if must_join:
                        await self._follow()
                    must_join = not await self._next()
                except (ApiError, FleetLostError) as error:
                    must_join = True
                    logger.warning("row patches: %s; trying again in %g s", error, _PAUSE_S)
                    await self._fleet.leave()  # so that no change waits for this replica
                    await asyncio.sleep(_PAUSE_S)
        except Exception:
            logger.exception("row patches: this replica cannot follow the others; it ends")
            raise

    async def _next(self) -> bool:
        """Carry out the next order; False if this replica must join again."""
        order = await self._fleet.next_order()
        if order is None:
            return False
        outcome = await self._carry_out(order)
        await self._fleet.report(order.number, outcome)
        if order.undoes is not None and outcome.refusal is not None:
            raise RuntimeError(f"patch {order.name!r}: a change could not be taken back")
        return True

    async def _carry_out(self, order: Order) -> Outcome:
        last, self._last_done = self._last_done, None
        if order.undoes is not None and (last is None or last[0] != order.undoes):
            return Outcome()  # it did not do what is taken back
        try:
            content_hash = await self._change_own(order)
            if order.undoes is not None and last is not None and last[1] != content_hash:
                message = f"name: patch {order.name!r} has changed since it was loaded"
                return Outcome(refusal=Refusal.of(EngineError(message)))
        except ApiError as error:
            return Outcome(refusal=Refusal.of(error))
        except Exception:
            logger.exception("patch %s: the %s failed", order.name, order.action)
            message = f"name: patch {order.name!r}: the {order.action} failed; the log says why"
            return Outcome(refusal=Refusal.of(EngineError(message)))
        self._last_done = (order.number, content_hash)
        return Outcome(content_hash)

    async def _change_own(self, order: Order) -> str:
        """Load or remove a patch of this replica; its content hash."""
        if order.action == "load":
            return (await self._patches.load(order.name)).summary.content_hash
        content_hash = self._hashes().get(order.name, "")
        await self._patches.unload(order.name)
        return content_hash

    async def _follow(self) -> None:
        """Join the fleet, and make the patches of this replica those of the others."""
        self._last_done = None
        wanted = await self._fleet.join(Held(self._initial, self._hashes()))
        for name, content_hash in wanted.items():
            if content_hash is None and name in self._patches:
                await self._patches.unload(name)
            elif content_hash is not None:
                if name not in self._patches:
                    await self._patches.load(name)
                if self._hashes().get(name) != content_hash:
                    raise ConfigError(f"patch: {name}: other replicas have another content")

    def _hashes(self) -> dict[str, str]:
        """The content hashes of the loaded patches, by name."""
        return {one.name: one.summary.content_hash for one in self._patches.of_key(None)}
