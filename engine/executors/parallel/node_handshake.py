"""Proves to both ends of a new connection that the other one has the key of the nodes."""

import hmac
import secrets
import socket
import time

from engine.executors.parallel.channel import read_exactly

# the name and the version of what follows
_GREETING = b"memplus nodes 1\n"
_CHALLENGE_BYTES, _PROOF_BYTES = 32, 32
# instead of node 0's proof; a connection that only ends says nothing about the key
_REFUSAL = bytes(_PROOF_BYTES)
# the two proofs differ, so that neither end can send back what it got
_NODE, _MASTER = b"node", b"master"


class HandshakeError(Exception):
    """The other end is no node of this version of memplus."""


class WrongKeyError(HandshakeError):
    """The two ends have different keys."""


def welcome(connection: socket.socket, key: bytes, timeout_s: float) -> None:
    """Check a connection that node 0 accepted; reads 80 bytes at most, within ``timeout_s``.

    The other end learns nothing from which it could guess the key before it proves that it has it.

    Raises:
        HandshakeError: the other end did not prove that it has the key; WrongKeyError: it has
            another one.
        OSError: the connection was lost, or the time is over.
    """
    deadline = time.monotonic() + timeout_s
    connection.settimeout(timeout_s)
    own = secrets.token_bytes(_CHALLENGE_BYTES)
    connection.sendall(_GREETING + own)
    try:
        if read_exactly(connection, len(_GREETING), deadline).tobytes() != _GREETING:
            raise HandshakeError("it is no node of this version of memplus")
        other = read_exactly(connection, _CHALLENGE_BYTES, deadline).tobytes()
        proof = read_exactly(connection, _PROOF_BYTES, deadline).tobytes()
    except EOFError:
        raise HandshakeError("it closed the connection before it gave a proof of the key") from None
    if not hmac.compare_digest(proof, _proof(key, _NODE, own, other)):
        connection.sendall(_REFUSAL)
        raise WrongKeyError("it has another node key")
    connection.sendall(_proof(key, _MASTER, own, other))
    connection.settimeout(None)


def introduce(connection: socket.socket, key: bytes, timeout_s: float) -> None:
    """Prove the key to node 0, and check that it has the key too.

    Raises:
        EOFError: the other end closed the connection; it may be busy, or it has ended.
        HandshakeError: the other end is not node 0; WrongKeyError: it has another key.
        OSError: the connection was lost, or the time is over.
    """
    deadline = time.monotonic() + timeout_s
    if read_exactly(connection, len(_GREETING), deadline).tobytes() != _GREETING:
        raise HandshakeError("it does not run this version of memplus")
    other = read_exactly(connection, _CHALLENGE_BYTES, deadline).tobytes()
    own = secrets.token_bytes(_CHALLENGE_BYTES)
    connection.sendall(_GREETING + own + _proof(key, _NODE, other, own))
    proof = read_exactly(connection, _PROOF_BYTES, deadline).tobytes()
    if proof == _REFUSAL:
        raise WrongKeyError("it refused the node key")
    if not hmac.compare_digest(proof, _proof(key, _MASTER, other, own)):
        raise WrongKeyError("it has another node key")
    connection.settimeout(None)


def _proof(key: bytes, role: bytes, masters: bytes, nodes: bytes) -> bytes:
    """The HMAC of both challenges by the owner of a role."""
    return hmac.digest(key, _GREETING + role + b"\n" + masters + nodes, "sha256")
