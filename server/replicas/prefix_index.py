"""Remembers which replicas have seen which prompt prefixes, in bounded memory."""

from collections import OrderedDict
from collections.abc import Iterator

# in characters; the engine shares KV blocks of 16 tokens by default, about as much English text
_BLOCK = 64
# characters of a prompt that count
MOST_CHARACTERS = 1024 * _BLOCK


class PrefixIndex:
    """Maps the prefixes of prompts, in blocks of characters, to the replicas that got them.

    The blocks that were used least recently are forgotten.
    """

    def __init__(self, max_blocks: int = 65536) -> None:
        self._max_blocks = max_blocks
        # a block's hash covers the blocks before it
        self._replicas: OrderedDict[int, set[str]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._replicas)

    def record(self, scope: str, prompt: str, replica: str) -> None:
        """Remember that a replica got a prompt. Prompts of different scopes share nothing."""
        for block in _blocks(scope, prompt):
            self._replicas.setdefault(block, set()).add(replica)
            self._replicas.move_to_end(block)
        while len(self._replicas) > self._max_blocks:
            self._replicas.popitem(last=False)

    def forget(self, replica: str) -> None:
        """Forget a replica that has ended."""
        for block, replicas in list(self._replicas.items()):
            replicas.discard(replica)
            if not replicas:
                del self._replicas[block]

    def shares(self, scope: str, prompt: str) -> dict[str, float]:
        """The fraction of the prompt that each replica has seen as a prefix, if it has any."""
        seen: dict[str, int] = {}
        number = 0
        for number, block in enumerate(_blocks(scope, prompt), 1):
            for replica in self._replicas.get(block, ()):
                if seen.get(replica, 0) == number - 1:
                    seen[replica] = number
        return {replica: count / number for replica, count in seen.items()}


def _blocks(scope: str, prompt: str) -> Iterator[int]:
    """Hashes of the prompt's blocks; the last one may be shorter."""
    before = hash(scope)
    for start in range(0, min(len(prompt), MOST_CHARACTERS), _BLOCK):
        before = hash((before, prompt[start : start + _BLOCK]))
        yield before
