"""Runs the forwards of a tensor-parallel rank other than 0, as rank 0 sends them."""

from engine.executors.eager import EagerExecutor
from engine.executors.parallel.channel import Channel
from engine.executors.parallel.messages import AddPatch, MeetOthers, RankMessage
from engine.model.row_patches import RowPatch


def run_rank(executor: EagerExecutor, connection: Channel) -> None:
    """Run each batch in the order of the messages, until rank 0 closes the connection.

    An error ends it, since the other ranks wait for this one in the middle of a forward.

    Raises:
        RankLostError: another rank has ended.
    """
    patches: dict[int, RowPatch] = {}
    while True:
        try:
            message: RankMessage = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        assert not isinstance(message, MeetOthers), "the ranks have met"
        for number in message.freed:
            patches.pop(number, None)
        if isinstance(message, AddPatch):
            patches[message.number] = message.patch().to(executor.device)
        else:
            executor.logits(message.batch(patches))
