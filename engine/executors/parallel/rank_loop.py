"""Runs the forwards of a tensor-parallel rank other than 0, as rank 0 sends them."""

from collections.abc import Callable, Mapping

import torch

from engine.executors.eager import EagerExecutor
from engine.executors.parallel.channel import Channel
from engine.executors.parallel.messages import (
    AddPatch,
    CaptureStep,
    MeetOthers,
    RankMessage,
    RunForward,
    RunStep,
)
from engine.model.row_patches import RowPatch

Work = RunForward | RunStep | CaptureStep


def run_rank(executor: EagerExecutor, connection: Channel) -> None:
    """Run each batch in the order of the messages, until rank 0 closes the connection.

    An error ends it, since the other ranks wait for this one in the middle of a forward.

    Raises:
        RankLostError: another rank has ended.
    """

    def run(message: Work, patches: Mapping[int, RowPatch]) -> None:
        assert isinstance(message, RunForward)
        executor.logits(message.batch(patches))

    follow(connection, executor.device, run)


def follow(
    connection: Channel,
    device: torch.device,
    run: Callable[[Work, Mapping[int, RowPatch]], None],
) -> None:
    """Call ``run`` with each message and the patches by number, until the connection closes.

    The patches are on ``device``. Errors are those of ``run``.
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
            patches[message.number] = message.patch().to(device)
        else:
            run(message, patches)
