"""A local Ray cluster in a process that reads commands from lines, and its handle for tests.

Run as a program it starts the cluster, and answers each line of JSON on stdin with one on stdout.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

_OBJECT_STORE_BYTES = 100 * 2**20
# replicas load a model, on a machine with two cores
_READY_S = 300.0
# the program's own waits end before
_ANSWER_S = 360.0


@dataclass
class Cluster:
    """A cluster and a client of its one address."""

    process: subprocess.Popen[str]
    http: httpx.Client

    def ask(self, **command: Any) -> Any:
        """Let the program do something, and wait for its answer; after too long, end it."""
        assert self.process.stdin is not None and self.process.stdout is not None
        deadline = threading.Timer(_ANSWER_S, self.process.kill)
        deadline.start()
        try:
            print(json.dumps(command), file=self.process.stdin, flush=True)
            for line in self.process.stdout:
                if line.startswith("answer: "):
                    return json.loads(line.removeprefix("answer: "))
        finally:
            deadline.cancel()
        raise AssertionError(f"the cluster's program has ended, or did not answer: {command}")

    def deploy(self, **arguments: Any) -> None:
        """Deploy the application, or a new version of it, and wait until it is ready."""
        assert self.ask(do="deploy", arguments=arguments) is None

    def replicas(
        self, count: int, without: str = "", deployment: str = "Replica"
    ) -> dict[str, int]:
        """Wait for this number of running replicas, not one of them ``without``; their process
        ids by name. ``deployment`` may be ``Ingress``."""
        found: dict[str, int] = self.ask(
            do="replicas", count=count, without=without, deployment=deployment
        )
        return found

    def running_requests(self, deployment: str) -> dict[str, int]:
        """The requests that each replica of a deployment runs now, by its name."""
        found: dict[str, int] = self.ask(do="running requests", deployment=deployment)
        return found

    def restart_patch_actor(self) -> None:
        """Kill the actor of row patches, and wait until a replica has joined the next one."""
        assert self.ask(do="restart patch actor") is None

    def metric(self, name: str) -> dict[str, float]:
        """A metric by replica, summed over its other labels."""
        found: dict[str, float] = {}
        for line in self.http.get("/metrics").text.splitlines():
            if line.startswith(f"memplus:{name}{{"):
                replica = line.partition('replica="')[2].partition('"')[0]
                found[replica] = found.get(replica, 0.0) + float(line.rpartition(" ")[2])
        return found


@contextlib.contextmanager
def running_cluster(folder: Path, port: int) -> Iterator[Cluster]:
    """A cluster until the block ends; it keeps its files in a new folder."""
    root = Path(__file__).parents[2]
    # Ray keeps a token in the home folder, and its sockets have short paths
    environment = os.environ | {"HOME": str(folder), "PYTHONPATH": str(root)}
    environment |= {"RAY_SERVE_LOG_TO_STDERR": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-m", "tests.soak.ray_cluster", str(folder), str(port)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, cwd=root, env=environment, stdin=pipe, stdout=pipe, text=True
    )
    with process, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as http:
        try:
            cluster = Cluster(process, http)
            cluster.ask(do="wait")
            yield cluster
        finally:
            # it shuts Ray down at the end of its input
            process.communicate(timeout=120)


def _main(port: int) -> None:
    import ray
    from ray import serve

    from server.ray_app import build

    ray.init(num_cpus=8, object_store_memory=_OBJECT_STORE_BYTES, include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        for line in sys.stdin:
            command, answer = json.loads(line), None
            if command["do"] == "deploy":
                serve.run(build(command["arguments"]))
            elif command["do"] == "replicas":
                answer = _wait_for_replicas(
                    command["count"], command["without"], command["deployment"]
                )
            elif command["do"] == "running requests":
                answer = _of_each(command["deployment"], _running_requests)
            elif command["do"] == "restart patch actor":
                _restart_patch_actor()
            print(f"answer: {json.dumps(answer)}", flush=True)
    finally:
        serve.shutdown()
        ray.shutdown()


def _wait_for_replicas(count: int, without: str, deployment: str) -> dict[str, int]:
    from ray import serve

    pause = threading.Event()
    end = time.monotonic() + _READY_S
    alive: dict[str, int] = {}
    while time.monotonic() < end:
        states = serve.status().applications["default"].deployments[deployment].replica_states
        alive = {str(state): number for state, number in states.items() if number}
        if alive == {"RUNNING": count}:
            found = _of_each(deployment, _pid)
            if len(found) == count and without not in found:
                return found
        pause.wait(0.2)
    raise TimeoutError(f"{count} replicas are not ready after {_READY_S:g} s, but {alive}")


def _restart_patch_actor() -> None:
    import ray
    from ray.exceptions import RayActorError

    actor = ray.get_actor("patches of default", namespace="memplus")
    state = actor.__ray_call__
    before, _ = ray.get(state.remote(_pid_and_members))
    ray.kill(actor, no_restart=False)
    pause = threading.Event()
    end = time.monotonic() + _READY_S
    while time.monotonic() < end:
        with contextlib.suppress(RayActorError):
            pid, members = ray.get(state.remote(_pid_and_members))
            if pid != before and members:
                return
        pause.wait(0.2)
    raise TimeoutError(f"no replica has joined the new patch actor after {_READY_S:g} s")


def _pid_and_members(actor: Any) -> tuple[int, int]:
    return os.getpid(), len(actor._fleet.members)


def _pid(replica: Any) -> int:
    return os.getpid()


def _running_requests(replica: Any) -> int:
    return int(replica._replica_impl.get_num_ongoing_requests())


def _of_each(deployment: str, value: Callable[[Any], int]) -> dict[str, int]:
    """A number of each replica by its name, computed in its process."""
    import ray
    from ray.exceptions import RayActorError

    found = {}
    for actor in ray.util.list_named_actors(all_namespaces=True):
        name, namespace = actor["name"], actor["namespace"]
        if f"#{deployment}#" in name:
            with contextlib.suppress(RayActorError, ValueError):
                handle = ray.get_actor(name, namespace=namespace)
                found[name.rpartition("#")[2]] = ray.get(handle.__ray_call__.remote(value))
    return found


if __name__ == "__main__":
    _main(int(sys.argv[2]))
