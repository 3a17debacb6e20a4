"""One replica's part in changes of the row patches: asks for orders, carries them out, reports."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from engine.errors import ConfigError
from server.http.errors import ApiError
from server.http.served_patches import ServedPatches
from server.replicas.patch_fleet import Order, Outcome, Refusal

logger = logging.getLogger(__name__)
# before the next attempt to reach a fleet that does not answer
_PAUSE_S = 1.0


class FleetLostError(Exception):
    """The fleet cannot be reached now."""


class Fleet(Protocol):
    """The fleet as one replica sees it: ``PatchFleet`` without the replica's name.

    Every method raises FleetLostError if the fleet cannot be reached.
    """

    async def join(self, held: Mapping[str, str] | None = None) -> dict[str, str | None]: ...
    async def leave(self) -> None: ...
    async def next_order(self) -> Order | None: ...
    async def report(self, number: int, outcome: Outcome) -> None: ...
    async def load(self, name: str) -> Refusal | None: ...
    async def unload(self, name: str) -> Refusal | None: ...


class FleetMember:
    """The patches of one replica, which follow those of all.

    It takes the place of ``ServedPatches`` in the routes that change patches.
    """

    def __init__(self, patches: ServedPatches, fleet: Fleet) -> None:
        self._patches = patches
        self._fleet = fleet
        self._work: asyncio.Task[None] | None = None

    async def join(self) -> None:
        """Make the changes that other replicas have made, then follow the fleet's orders.

        Raises:
            ApiError: a patch that the others have cannot be loaded.
            ConfigError: a patch has other contents here.
            FleetLostError: the fleet cannot be reached.
        """
        await self._follow(await self._fleet.join())
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
        except FleetLostError:
            headers = {"Retry-After": "5"}
            message = "the replicas cannot agree on row patches now"
            raise ApiError(503, message, "server_error", headers=headers) from None
        if refusal is not None:
            raise refusal.error()

    async def _obey(self) -> None:
        while True:
            try:
                order = await self._fleet.next_order()
                if order is not None:
                    await self._fleet.report(order.number, await self._carry_out(order))
                else:
                    await self._follow(await self._fleet.join(self._held()))
            except (ApiError, ConfigError, FleetLostError) as error:
                logger.warning("row patches: %s; trying again in %g s", error, _PAUSE_S)
                await asyncio.sleep(_PAUSE_S)

    async def _carry_out(self, order: Order) -> Outcome:
        try:
            if order.action == "load":
                return Outcome((await self._patches.load(order.name)).summary.content_hash)
            content_hash = self._held().get(order.name, "")
            await self._patches.unload(order.name)
            return Outcome(content_hash)
        except ApiError as error:
            return Outcome(refusal=Refusal.of(error))

    async def _follow(self, changes: Mapping[str, str | None]) -> None:
        for name, content_hash in changes.items():
            if content_hash is None and name in self._patches:
                await self._patches.unload(name)
            elif content_hash is not None:
                if name not in self._patches:
                    await self._patches.load(name)
                if self._held()[name] != content_hash:
                    raise ConfigError(f"patch: {name}: other replicas have another content")

    def _held(self) -> dict[str, str]:
        """The content hashes of the loaded patches, by name."""
        return {one.name: one.summary.content_hash for one in self._patches.of_key(None)}
