"""The Ray actor that holds the ``PatchFleet`` of an application, and a replica's proxy to it."""

import asyncio
import contextlib
from collections.abc import Awaitable, Collection, Mapping
from typing import Any, TypeVar

import ray
from ray import serve
from ray.exceptions import RayActorError

from server.replicas.fleet_member import FleetLostError
from server.replicas.patch_fleet import Order, Outcome, PatchFleet, Refusal

Result = TypeVar("Result")
_NAMESPACE = "memplus"
_LOOK_EVERY_S = 1.0
# before the actor ends after its application has been deleted
_IDLE_S = 30.0


class FleetActor:
    """``PatchFleet`` in a process that outlives replicas and rolling updates.

    It notices replicas that die during a change, and ends when the application is gone.
    """

    def __init__(self, application: str) -> None:
        self._application = application
        self._fleet = PatchFleet()
        self._replicas: dict[str, Any] = {}  # Ray's handles
        self._idle = asyncio.get_running_loop().create_task(self._end_when_unused())

    async def join(
        self, replica: str, handle: Any, initial: list[str], held: dict[str, str] | None
    ) -> dict[str, str | None]:
        """As ``PatchFleet.join``; ``handle`` is that of the replica's actor."""
        self._replicas[replica] = handle
        return await self._fleet.join(replica, initial, held)

    async def leave(self, replica: str) -> None:
        """As ``PatchFleet.leave``."""
        self._replicas.pop(replica, None)
        self._fleet.leave(replica)

    async def next_order(self, replica: str) -> Order | None:
        """As ``PatchFleet.next_order``."""
        return await self._fleet.next_order(replica)

    async def report(self, replica: str, number: int, outcome: Outcome) -> None:
        """As ``PatchFleet.report``."""
        self._fleet.report(replica, number, outcome)

    async def load(self, name: str) -> Refusal | None:
        """As ``PatchFleet.load``."""
        return await self._watched(self._fleet.load(name))

    async def unload(self, name: str) -> Refusal | None:
        """As ``PatchFleet.unload``."""
        return await self._watched(self._fleet.unload(name))

    async def _watched(self, change: Awaitable[Result]) -> Result:
        watch = asyncio.create_task(self._drop_the_dead())
        try:
            return await change
        finally:
            watch.cancel()

    async def _drop_the_dead(self) -> None:
        while True:
            for replica, handle in list(self._replicas.items()):
                try:
                    async with asyncio.timeout(_LOOK_EVERY_S):
                        await handle.__ray_ready__.remote()
                except RayActorError:
                    await self.leave(replica)
                except TimeoutError:
                    continue  # it is only busy
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _end_when_unused(self) -> None:
        while True:
            await asyncio.sleep(_IDLE_S)
            applications: Collection[str] = (
                await asyncio.to_thread(serve.status)
            ).applications.keys()
            if self._application not in applications:
                # an exit here would make Ray start it again
                ray.kill(ray.get_runtime_context().current_actor)


class RemoteFleet:
    """The ``Fleet`` of one replica: calls of the actor, which is started if there is none."""

    def __init__(self, application: str, replica: str, initial: Collection[str]) -> None:
        self._application, self._replica, self._initial = application, replica, list(initial)
        self._actor: Any = None
        self._find()

    async def join(self, held: Mapping[str, str] | None = None) -> dict[str, str | None]:
        """As ``PatchFleet.join``."""
        self._find()
        handle = ray.get_runtime_context().current_actor
        held = None if held is None else dict(held)
        return await _call(self._actor.join.remote(self._replica, handle, self._initial, held))

    async def leave(self) -> None:
        """As ``PatchFleet.leave``."""
        with contextlib.suppress(FleetLostError):
            await _call(self._actor.leave.remote(self._replica))

    async def next_order(self) -> Order | None:
        """As ``PatchFleet.next_order``; None if the actor was started again."""
        try:
            return await _call(self._actor.next_order.remote(self._replica))
        except FleetLostError:
            self._find()
            raise

    async def report(self, number: int, outcome: Outcome) -> None:
        """As ``PatchFleet.report``."""
        await _call(self._actor.report.remote(self._replica, number, outcome))

    async def load(self, name: str) -> Refusal | None:
        """As ``PatchFleet.load``."""
        return await _call(self._actor.load.remote(name))

    async def unload(self, name: str) -> Refusal | None:
        """As ``PatchFleet.unload``."""
        return await _call(self._actor.unload.remote(name))

    def _find(self) -> None:
        options = ray.remote(FleetActor).options(
            name=f"patches of {self._application}",
            namespace=_NAMESPACE,
            get_if_exists=True,
            lifetime="detached",
            max_restarts=-1,
            max_concurrency=10_000,  # every replica waits for its next order
            num_cpus=0,
        )
        self._actor = options.remote(self._application)


async def _call(answer: Awaitable[Result]) -> Result:
    try:
        return await answer
    except RayActorError as error:
        raise FleetLostError(str(error)) from None
