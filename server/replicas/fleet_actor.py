"""The Ray actor that holds the ``PatchFleet`` of an application, and a replica's proxy to it."""

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Coroutine
from dataclasses import asdict
from itertools import starmap
from typing import Any, TypeVar

import ray
from ray import serve
from ray.exceptions import ActorDiedError, RayError
from ray.experimental import internal_kv

from server.replicas.fleet_member import FleetLostError
from server.replicas.patch_fleet import FleetState, PatchFleet
from server.replicas.patch_orders import Changes, Held, Order, Outcome, Refusal

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
_NAMESPACE = "memplus"
_LOOK_EVERY_S = 1.0
# before the actor ends after its application has been deleted
_IDLE_S = 30.0


class FleetActor:
    """``PatchFleet`` in a process that outlives replicas and rolling updates.

    It notices replicas that die during a change, and ends when the application is gone. Ray's
    store keeps the changes and the names of replicas for an actor that was started again.
    """

    def __init__(self, application: str) -> None:
        self._application = application
        self._key = f"changes of {application}"
        self._fleet = PatchFleet(_kept_state(self._key), self._keep)
        self._replicas: dict[str, Any] = {}  # Ray's handles
        self._changing: set[asyncio.Task[Any]] = set()
        self._idle = asyncio.get_running_loop().create_task(self._end_when_unused())

    async def join(self, replica: str, handle: Any, held: Held) -> Changes:
        """As ``PatchFleet.join``; ``handle`` is that of the replica's actor."""
        await self._drop_the_dead()  # their patches do not count
        self._replicas[replica] = handle
        return await self._fleet.join(replica, held)

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
        return await self._whole(self._fleet.load(name))

    async def unload(self, name: str) -> Refusal | None:
        """As ``PatchFleet.unload``."""
        return await self._whole(self._fleet.unload(name))

    async def _keep(self, state: FleetState) -> None:
        text = json.dumps(asdict(state))
        await asyncio.to_thread(
            internal_kv._internal_kv_put, self._key, text, True, namespace=_NAMESPACE
        )

    async def _whole(self, change: Coroutine[Any, Any, Result]) -> Result:
        """The result of a change, which goes on if the client leaves and Ray cancels the call."""
        task = asyncio.create_task(self._watched(change))
        self._changing.add(task)
        task.add_done_callback(self._changing.discard)
        return await asyncio.shield(task)

    async def _watched(self, change: Awaitable[Result]) -> Result:
        watch = asyncio.create_task(self._watch())
        try:
            return await change
        finally:
            watch.cancel()

    async def _watch(self) -> None:
        while True:
            await self._drop_the_dead()
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _drop_the_dead(self) -> None:
        await asyncio.gather(*starmap(self._drop_if_dead, list(self._replicas.items())))

    async def _drop_if_dead(self, replica: str, handle: Any) -> None:
        try:
            async with asyncio.timeout(_LOOK_EVERY_S):
                await handle.__ray_ready__.remote()
        except ActorDiedError:
            await self.leave(replica)
        except (RayError, TimeoutError):
            return  # it is only busy, or cannot be reached now

    async def _end_when_unused(self) -> None:
        while True:
            await asyncio.sleep(_IDLE_S)
            try:
                status = await asyncio.to_thread(serve.status)
            except Exception as error:  # whatever it is, replicas may still need this actor
                logger.warning("the applications are unknown now: %s", error)
                continue
            if self._application not in status.applications:
                internal_kv._internal_kv_del(self._key, namespace=_NAMESPACE)
                # an exit here would make Ray start it again
                ray.kill(ray.get_runtime_context().current_actor)


def _kept_state(key: str) -> FleetState:
    """The state in Ray's store; an empty one if there is none, or if its format is unknown: with
    an error, no start of the actor would succeed."""
    kept = internal_kv._internal_kv_get(key, namespace=_NAMESPACE)
    match json.loads(kept) if kept else {"changes": {}, "replicas": []}:
        case {"changes": dict(changes), "replicas": list(replicas)}:
            return FleetState(changes, tuple(replicas))
    logger.error("row patches: %r in Ray's store has an unknown format, so no change is known", key)
    return FleetState()


class RemoteFleet:
    """The ``Fleet`` of one replica: calls of the actor, which ``join`` starts if there is none."""

    def __init__(self, application: str, replica: str) -> None:
        self._application, self._replica = application, replica
        self._actor: Any = None

    async def join(self, held: Held) -> Changes:
        """As ``PatchFleet.join``."""
        self._find()
        handle = ray.get_runtime_context().current_actor
        return await _call(self._actor.join.remote(self._replica, handle, held))

    async def leave(self) -> None:
        """As ``PatchFleet.leave``."""
        with contextlib.suppress(FleetLostError):
            await _call(self._actor.leave.remote(self._replica))

    async def next_order(self) -> Order | None:
        """As ``PatchFleet.next_order``; None if the actor was started again."""
        return await _call(self._actor.next_order.remote(self._replica))

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
        try:
            self._actor = options.remote(self._application)
        except (RayError, ValueError) as error:
            raise FleetLostError(str(error)) from None


async def _call(answer: Awaitable[Result]) -> Result:
    try:
        return await answer
    except RayError as error:
        raise FleetLostError(str(error)) from None
