"""Orders replicas for a request: by known prefix while loads are balanced, else by load."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from itertools import count

from server.replicas.prefix_index import PrefixIndex
from server.replicas.relayed_request import RoutingText

# a shorter known prefix saves too little to be worth a longer queue
_LEAST_SHARE = 0.1
# requests that ended before they began here; their callbacks run within milliseconds
_MOST_EARLY = 1024


class ReplicaChoice:
    """Chooses replicas for requests, and learns from the choices that were carried out.

    It counts the requests that each replica has from here. One object belongs to one event loop.
    """

    def __init__(self, slack: int) -> None:
        """``slack``: requests that a replica with a longer known prefix may have more than the
        least loaded one."""
        self._slack = slack
        self._index = PrefixIndex()
        self._running: dict[str, set[str]] = {}  # ids of requests by replica
        self._ended_early: OrderedDict[str, None] = OrderedDict()
        self._numbers = count()

    def ranked(self, replicas: Iterable[str], text: RoutingText | None) -> list[str]:
        """The replicas, the best one for a request first."""
        names = list(replicas)
        loads = {name: len(self._running.get(name, ())) for name in names}
        least = min(loads.values(), default=0)
        shares = self._index.shares(text.scope, text.prompt) if text is not None else {}
        seed = f"{next(self._numbers)}" if text is None else f"{text.scope}{text.prompt[:64]}"

        def rank(name: str) -> tuple[float, int, bytes]:
            share = shares.get(name, 0.0)
            is_preferred = share >= _LEAST_SHARE and loads[name] <= least + self._slack
            # several ingresses agree on a new prefix, because the checksum is the same in all
            return (-share if is_preferred else 0.0, loads[name], _checksum(seed, name))

        return sorted(names, key=rank)

    def began(self, replica: str, request_id: str, text: RoutingText | None) -> None:
        """Record that a replica got a request."""
        running = self._running.setdefault(replica, set())
        if request_id in self._ended_early:
            del self._ended_early[request_id]
        else:
            running.add(request_id)
        if text is not None:
            self._index.record(text.scope, text.prompt, replica)

    def ended(self, replica: str, request_id: str) -> None:
        """Record that a request has ended: perhaps before ``began``, or refused and without it."""
        running = self._running.get(replica, set())
        if request_id in running:
            running.remove(request_id)
            return
        self._ended_early[request_id] = None
        if len(self._ended_early) > _MOST_EARLY:
            self._ended_early.popitem(last=False)

    def keep_only(self, replicas: Iterable[str]) -> None:
        """Forget all other replicas, of which requests may still end."""
        for name in self._running.keys() - set(replicas):
            del self._running[name]
            self._index.forget(name)


def _checksum(seed: str, name: str) -> bytes:
    return hashlib.blake2b(f"{seed}\0{name}".encode(errors="surrogatepass"), digest_size=8).digest()
