"""The process of a rank that loads nothing: it ends with the code that it is sent."""

import sys

from engine.executors.parallel.channel import Channel
from engine.executors.parallel.messages import RankReady
from engine.executors.parallel.ranks import RankSettings


def main(channel: Channel, settings: RankSettings) -> None:
    """Report readiness, and exit with the number of the next message."""
    channel.send(RankReady())
    sys.exit(channel.recv().store_port)
