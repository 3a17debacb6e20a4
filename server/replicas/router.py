"""Ray Serve's request router that prefers the replica with the longest known prompt prefix."""

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from server.replicas.relayed_request import RelayedRequest, RoutingText
from server.replicas.replica_choice import ReplicaChoice


class PrefixRouter(RequestRouter):
    """Ray's own router of this kind (``ray.serve.llm``) cannot be imported without vLLM or SGLang.

    Ray Serve makes one in every ingress, and passes ``RequestRouterConfig``'s arguments to
    ``initialize_state``.
    """

    def initialize_state(self, slack: int) -> None:
        """``slack``: as ``ReplicaChoice``."""
        self._choice = ReplicaChoice(slack)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The replicas one by one, the best first; Ray skips those that are full."""
        text = None
        if pending_request is not None:
            # full replicas are asked again after a pause
            pending_request.routing_context.should_backoff = True
            text = _text(pending_request)
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        return [[by_name[name]] for name in self._choice.ranked(by_name, text)]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Take the replicas that can be routed to."""
        super().update_replicas(replicas)
        self._choice.keep_only(replica.replica_id.unique_id for replica in replicas)

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """Learn where a request went."""
        request_id = pending_request.metadata.internal_request_id
        self._choice.began(replica_id.unique_id, request_id, _text(pending_request))

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Learn that a request has ended."""
        self._choice.ended(replica_id.unique_id, internal_request_id)


def _text(request: PendingRequest) -> RoutingText | None:
    first = request.args[0] if request.args else None
    return first.text if isinstance(first, RelayedRequest) else None
