"""Orders replicas for a request: by known prefix while loads are balanced, else by load."""

import hashlib
from collections.abc import Iterable
from itertools import count

from server.replicas.prefix_index import PrefixIndex
from server.replicas.relayed_request import RoutingText

# a shorter known prefix saves too little to be worth a longer queue
_LEAST_SHARE = 0.1


class ReplicaChoice:
    """Chooses replicas for requests, and learns from the choices that were carried out.

    It counts the requests that each replica has from here. One object belongs to one event loop.
    """

    def __init__(self, slack: int) -> None:
        """``slack``: requests that a replica with a longer known prefix may have more than the
        least loaded one."""
        self._slack = slack
        self._index = PrefixIndex()
        self._loads: dict[str, int] = {}
        self._numbers = count()

    def ranked(self, replicas: Iterable[str], text: RoutingText | None) -> list[str]:
        """The replicas, the best one for a request first."""
        names = list(replicas)
        loads = {name: self._loads.get(name, 0) for name in names}
        least = min(loads.values(), default=0)
        shares = self._index.shares(text.scope, text.prompt) if text is not None else {}
        seed = f"{next(self._numbers)}" if text is None else f"{text.scope}{text.prompt[:64]}"

        def rank(name: str) -> tuple[float, int, bytes]:
            share = shares.get(name, 0.0)
            is_preferred = share >= _LEAST_SHARE and loads[name] <= least + self._slack
            # several ingresses agree on a new prefix, because the checksum is the same in all
            return (-share if is_preferred else 0.0, loads[name], _checksum(seed, name))

        return sorted(names, key=rank)

    def began(self, replica: str, text: RoutingText | None) -> None:
        """Record that a replica got a request."""
        self._loads[replica] = self._loads.get(replica, 0) + 1
        if text is not None:
            self._index.record(text.scope, text.prompt, replica)

    def ended(self, replica: str) -> None:
        """Record that a request of a replica has ended."""
        self._loads[replica] = max(0, self._loads.get(replica, 0) - 1)

    def keep_only(self, replicas: Iterable[str]) -> None:
        """Forget all other replicas, of which requests may still end."""
        kept = set(replicas)
        for name in self._loads.keys() - kept:
            del self._loads[name]
            self._index.forget(name)


def _checksum(seed: str, name: str) -> bytes:
    return hashlib.blake2b(f"{seed}\0{name}".encode(errors="surrogatepass"), digest_size=8).digest()
