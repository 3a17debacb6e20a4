"""Options of a model that runs on several machines, and the settings that follow from them."""

from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import ConfigError
from engine.sampling.params import option

_MOST_NODES = 64
_PORT = 29500
_KEY_VARIABLE = "MEMPLUS_NODE_KEY"
_LEAST_KEY_BYTES, _MOST_KEY_BYTES = 16, 4096


@dataclass(frozen=True)
class NodeSettings:
    """The machines of a tensor-parallel model.

    Attributes:
        count: the number of machines.
        node: the number of this one.
        ranks_per_node: the number of ranks on each.
        address, port: those at which node 0 waits for the others.
        key: the secret that all of them have.
    """

    count: int
    node: int
    ranks_per_node: int
    address: str
    port: int
    key: bytes = field(repr=False)

    def ranks(self, node: int) -> range:
        """The ranks of one machine."""
        return range(node * self.ranks_per_node, (node + 1) * self.ranks_per_node)


@dataclass(frozen=True)
class NodeOptions:
    """The machines of a tensor-parallel model.

    Raises:
        ConfigError: a field is out of range, or needs ``nnodes`` above 1.
    """

    nnodes: int = option(
        1,
        "machines that share the model with --tensor-parallel",
        group=("several machines", "--nnodes 2 --node-rank 1 --master-addr 10.0.0.1"),
        metavar="M",
    )
    node_rank: int = option(0, "number of this machine; 0 serves", metavar="K")
    master_addr: str | None = option(
        None, "address of machine 0 for the others (default: none)", metavar="HOST"
    )
    master_port: int = option(_PORT, "port of machine 0 for the others", metavar="PORT")
    node_key_file: str | None = option(
        None, f"file with their secret (default: the text of {_KEY_VARIABLE})", metavar="FILE"
    )

    def __post_init__(self) -> None:
        if not 1 <= self.nnodes <= _MOST_NODES:
            raise ConfigError(f"nnodes: {self.nnodes} is outside [1, {_MOST_NODES}]")
        if self.nnodes == 1:
            for name, default in (("node_rank", 0), ("master_port", _PORT)):
                if getattr(self, name) != default:
                    raise ConfigError(f"{name}: needs --nnodes above 1")
            for name in ("master_addr", "node_key_file"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"{name}: needs --nnodes above 1")
            return
        if not 0 <= self.node_rank < self.nnodes:
            raise ConfigError(f"node_rank: {self.node_rank} is outside [0, {self.nnodes - 1}]")
        if self.master_addr is None:
            raise ConfigError("master_addr: --nnodes above 1 needs it")
        if not 1 <= self.master_port < 65536:
            raise ConfigError(f"master_port: {self.master_port} is outside [1, 65535]")

    def settings(self, tensor_parallel: int, environment_key: str) -> NodeSettings | None:
        """The settings of this machine; None if the model runs on one machine.

        Args:
            tensor_parallel: the number of ranks on all machines.
            environment_key: the value of MEMPLUS_NODE_KEY; empty if it is not set.

        Raises:
            ConfigError: the ranks cannot be divided evenly, or there is no valid secret.
        """
        if self.nnodes == 1:
            return None
        if tensor_parallel % self.nnodes:
            raise ConfigError(
                f"nnodes: {self.nnodes} does not divide tensor_parallel {tensor_parallel}, and each"
                " machine runs as many ranks as the others"
            )
        assert self.master_addr is not None
        ranks, key = tensor_parallel // self.nnodes, self._key(environment_key)
        address = self.master_addr, self.master_port
        return NodeSettings(self.nnodes, self.node_rank, ranks, *address, key)

    def _key(self, environment_key: str) -> bytes:
        if self.node_key_file is None:
            if not environment_key:
                raise ConfigError(
                    f"node_key_file: machines need a secret: give the file, or set {_KEY_VARIABLE}"
                )
            return _checked_key(environment_key.encode(), _KEY_VARIABLE)
        if environment_key:
            raise ConfigError(f"node_key_file: replaces {_KEY_VARIABLE}; give one or the other")
        try:
            with open(Path(self.node_key_file), "rb") as file:
                content = file.read(_MOST_KEY_BYTES + 1)
        except OSError as error:
            problem = f"{self.node_key_file}: {error.strerror}"
            raise ConfigError(f"node_key_file: {problem}") from None
        return _checked_key(content, f"node_key_file: {self.node_key_file}")


def _checked_key(text: bytes, source: str) -> bytes:
    """The key without white space around it; ConfigError names ``source`` and never the key."""
    key = text.strip()
    if not _LEAST_KEY_BYTES <= len(key) <= _MOST_KEY_BYTES:
        allowed = f"{_LEAST_KEY_BYTES} to {_MOST_KEY_BYTES} bytes"
        raise ConfigError(
            f"{source}: a node key must have {allowed}; make one with `openssl rand -hex 32`"
        )
    return key
