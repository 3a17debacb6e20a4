"""A replica in a fleet of patches, with answers that a test chooses."""

import asyncio

from server.http.errors import ApiError
from server.replicas.patch_orders import Held, Outcome, Refusal

REFUSED = Refusal.of(ApiError(400, "name: bad", param="name"))


class Member:
    """A replica with patches; ``answers`` replaces its answer to an action."""

    def __init__(self, fleet, name, **answers):
        self.fleet, self.name, self.answers = fleet, name, answers
        self.patches = set()

    async def start(self, *initial):
        self.patches = set(initial)
        wanted = await self.fleet.join(self.name, held(*initial))
        for name, content in wanted.items():
            if content is None:
                self.patches.discard(name)
            else:
                self.patches.add(name)
        self.work = asyncio.create_task(self.obey())
        return self

    async def obey(self):
        self.done = None
        while (order := await self.fleet.next_order(self.name)) is not None:
            answer = self.answers.get(order.action, Outcome(f"hash of {order.name}"))
            if answer is None:
                self.fleet.leave(self.name)  # it dies
                return
            if answer == "silent":
                continue
            if order.undoes is not None and order.undoes != self.done:
                answer = Outcome()
            elif answer.refusal is None:
                self.done = order.number
                change = self.patches.add if order.action == "load" else self.patches.discard
                change(order.name)
            self.fleet.report(self.name, order.number, answer)


def held(*initial, **others):
    """Patches of ``--patch``, and others with their hashes."""
    hashes = {name: f"hash of {name}" for name in initial} | others
    return Held({name: f"/{name}" for name in initial}, hashes)


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario(), 60))
