"""A node other than the first one of a tensor-parallel model: joins node 0 and runs its ranks."""

import contextlib
import signal
import threading
from dataclasses import replace
from types import FrameType

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.executors.parallel.channel import Channel
from engine.executors.parallel.group import RankLostError
from engine.executors.parallel.message_codec import MessageError
from engine.executors.parallel.messages import (
    JoinAnswer,
    JoinRefused,
    NodeJoin,
    RankReady,
    RankRefused,
)
from engine.executors.parallel.network_store import NetworkPlace
from engine.executors.parallel.node_connection import connect
from engine.executors.parallel.node_handshake import HandshakeError, WrongKeyError
from engine.executors.parallel.ranks import Ranks
from engine.process import EngineFailedError, EngineLostError
from server.config import cache_folder
from server.device import chosen_device
from server.logs import say
from server.model_options import ModelOptions
from server.monitoring import MonitoringOptions
from server.node_options import NodeSettings
from server.parallel_engine import JOIN_TIMEOUT_S, RANK_ENTRY, ShareSettings, planned, traits_of
from server.patch_options import PatchOptions
from weights.models.adapted_model import find_served
from weights.models.prepare import prepare

# of a step's batch; row patches come on top
_MOST_STEP_BYTES = 2**28
# for node 0 to end after it has heard that a rank died
_GRACE_S = 5.0
_LOST = "node 0 has ended, restarts its engine, or cannot be reached; start this node again"


def run_node(
    model: ModelOptions,
    engine: EngineConfig,
    patches: PatchOptions,
    nodes: NodeSettings,
    monitoring: MonitoringOptions,
) -> None:
    """Run this machine's ranks until node 0 or one of them ends, or SIGTERM or SIGINT arrives.

    Raises:
        CheckpointError: the model cannot be served.
        ConfigError: a setting does not fit the model or a CPU, a rank cannot load its share, or
            node 0 refuses this node.
        EngineFailedError: node 0 does not answer.
        EngineLostError: node 0 or a rank has ended, also while it loaded.
    """
    signal.signal(signal.SIGTERM, _exit)
    config = patches.engine_config(engine)
    chosen_device(model, config, on_several_machines=True)
    folder = prepare(find_served(model.model, model.memory_adapter, cache_folder()))
    share, settings = planned(model, folder, config, monitoring.log_format, nodes.ranks(nodes.node))
    join = NodeJoin(nodes.node, traits_of(share, settings, config, nodes), settings.num_blocks)
    channel, place = _connected(nodes, config.patch_bytes + _MOST_STEP_BYTES)
    with contextlib.closing(channel):
        settings = _joined(channel, join, settings)
        started = nodes.ranks(nodes.node)
        ranks = Ranks(RANK_ENTRY, share.size, settings, started=started, place=place)
        with contextlib.closing(ranks):
            ranks.delete_store()
            _run(channel, ranks, f"node {nodes.node} of {nodes.count}")


def _connected(nodes: NodeSettings, most_bytes: int) -> tuple[Channel, NetworkPlace]:
    try:
        connection = connect(nodes.address, nodes.port, nodes.key, JOIN_TIMEOUT_S)
    except HandshakeError as error:
        where = f"{nodes.address} port {nodes.port}"
        option = "node_key_file" if isinstance(error, WrongKeyError) else "master_addr"
        raise ConfigError(f"{option}: node 0 at {where} was not accepted: {error}") from None
    except TimeoutError as error:
        raise EngineFailedError(str(error)) from None
    place = NetworkPlace(connection.getpeername()[0], connection.getsockname()[0])
    return Channel(connection, JoinAnswer, most_bytes), place


def _joined(channel: Channel, join: NodeJoin, settings: ShareSettings) -> ShareSettings:
    """The settings that fit all nodes, when all have joined."""
    try:
        channel.send(join)
        say(f"node {join.node} has asked to join; waiting for the other nodes")
        answer = channel.recv()
    except (EOFError, MessageError, OSError):
        raise EngineLostError(_LOST) from None
    if isinstance(answer, JoinRefused):
        raise ConfigError(f"node 0 refuses node {join.node}: {answer.message}")
    return replace(settings, num_blocks=answer.num_blocks)


def _run(channel: Channel, ranks: Ranks, name: str) -> None:
    """Load the ranks and pass on what node 0 sends, until it or one of them ends."""
    ended = threading.Event()

    def follow_node_0() -> None:
        channel.wait_for_end()
        ended.set()
        # the main thread may wait for a rank that hangs
        ranks.close()

    def report() -> None:
        assert ranks.died is not None
        with contextlib.suppress(OSError):
            channel.send(ranks.died)
            ended.wait(_GRACE_S)
        channel.end()

    threading.Thread(target=follow_node_0, daemon=True).start()
    try:
        ranks.wait_until_ready()
        channel.send(RankReady())
        ranks.watch(report)
        say(f"{name} runs its ranks")
        while True:
            ranks.pass_on(*channel.recv_frame())
    except ConfigError as error:
        with contextlib.suppress(OSError):
            channel.send(RankRefused(str(error)))
        raise
    except (EOFError, MessageError, OSError, RankLostError) as error:
        if isinstance(error, RankLostError):
            ranks.await_report()
        if ranks.died is not None:
            reason = f"tensor-parallel rank {ranks.died.rank} died (exit {ranks.died.code})"
        elif ended.is_set() or isinstance(error, EOFError | OSError):
            reason = _LOST
        else:
            reason = str(error)
        raise EngineLostError(reason) from None


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)
