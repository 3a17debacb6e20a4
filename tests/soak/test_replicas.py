"""Two replicas of the default model behind Ray Serve: routing, deaths, updates and patches."""

import json
import os
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.server.test_serve import children, maps
from tests.soak.ray_cluster import Cluster, running_cluster
from tests.weights.patches.made import saved_patch
from weights.models.named_models import find_model
from weights.patches.model_identity import model_identity

pytestmark = pytest.mark.soak
ROUTE = "/v1/memory/patches"
LONG = {"max_tokens": 450, "ignore_eos": True, "temperature": 0}
DIED = "the replica has died"


@pytest.fixture(scope="module")
def patch_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("patches")
    identity = model_identity(find_model("wordnet", folder).folder)
    saved_patch(folder / "law", model=identity, seed=1)
    saved_patch(folder / "tax", model=identity, seed=3)
    saved_patch(folder / "med", model=identity, seed=2)
    (folder / "med" / "patch.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def arguments(patch_dir: Path, chat_template: Path) -> dict[str, object]:
    """The replicas are small: the machine has two cores."""
    return {
        "model": "wordnet",
        "replicas": 2,
        "kv_cache_gib": 0.05,
        "patch_memory_gib": 0.1,
        "max_num_seqs": 8,
        "chat_template": str(chat_template),
        "patch_dir": str(patch_dir),
        "replica_drain_timeout_s": 60.0,
    }


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, arguments) -> Iterator[Cluster]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with running_cluster(tmp_path_factory.mktemp("ray"), port) as cluster:
        cluster.deploy(**arguments)
        yield cluster


def words(seed: int) -> str:
    """A prompt of more than 16 tokens that no other seed begins with."""
    return " ".join(f"{seed * 7 + number} noun" for number in range(40))


def cached_tokens(cluster: Cluster, path: str, **body: object) -> int:
    answer = cluster.http.post(path, json={"max_tokens": 1} | body).json()
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


class Stream:
    """A streamed completion that is read in parts."""

    def __init__(self, stack: ExitStack, http: httpx.Client, seed: int) -> None:
        body = LONG | {"prompt": f"{seed} noun", "stream": True}
        self.response = stack.enter_context(http.stream("POST", "/v1/completions", json=body))
        self._lines = self.response.iter_lines()
        self.events = [next(self._lines)]  # it runs

    def read(self) -> str:
        """Read to the end; returns the finish reason, or the message of the error event."""
        self.events += [line for line in self._lines if line]
        assert self.events[-1] == "data: [DONE]"
        last = json.loads(self.events[-2].removeprefix("data: "))
        return str(last["error"]["message"] if "error" in last else finish_reason(last))


def finish_reason(answer: dict) -> str:
    return str(answer["choices"][0]["finish_reason"])


def test_requests_spread_over_the_replicas(cluster):
    cluster.replicas(2)
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(
                lambda n: cached_tokens(cluster, "/v1/completions", prompt=words(n)), range(16)
            )
        )
    assert len(answers) == 16
    counts = cluster.metric("request_success_total")
    assert len(counts) == 2 and min(counts.values()) >= 4


def test_a_known_prefix_leads_to_its_replica(cluster):
    for seed in range(100, 106):
        prompt = words(seed)
        assert cached_tokens(cluster, "/v1/completions", prompt=prompt) == 0
        for end in (" one", " two", " three"):
            assert cached_tokens(cluster, "/v1/completions", prompt=prompt + end) > 0


def test_a_conversation_stays_on_its_replica(cluster):
    for seed in range(200, 206):
        messages = [{"role": "user", "content": words(seed)}]
        path = "/v1/chat/completions"
        assert cached_tokens(cluster, path, messages=messages) < 32
        messages += [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
        assert cached_tokens(cluster, path, messages=messages) > 64


def test_a_killed_replica_loses_only_its_running_streams(cluster):
    pids = cluster.replicas(2)
    with ExitStack() as stack, ThreadPoolExecutor(8) as pool:
        streams = [Stream(stack, cluster.http, seed) for seed in range(6)]
        whole = [pool.submit(complete, cluster, seed) for seed in range(50, 56)]
        victim = next(iter(pids))
        running = cluster.metric("num_requests_running")
        os.kill(pids[victim], signal.SIGKILL)
        ends = [stream.read() for stream in streams]
        assert set(ends) - {"length"} and all(end == "length" or DIED in end for end in ends)
        assert 0 < sum(DIED in end for end in ends) <= running[victim]
        assert "length" in ends
        assert {future.result() for future in whole} == {"length"}
    # Ray Serve starts another one
    assert len(cluster.replicas(2, without=victim)) == 2
    assert complete(cluster, 60) == "length"


def complete(cluster: Cluster, seed: int) -> str:
    answer = cluster.http.post("/v1/completions", json=LONG | {"prompt": f"{seed} verb"})
    return finish_reason(answer.json())


def test_a_replica_whose_engine_dies_is_replaced(cluster):
    pids = cluster.replicas(2)
    victim = next(iter(pids))
    (engine,) = [child for child in children(pids[victim]) if "libtorch" in maps(child)]
    with ExitStack() as stack:
        streams = [Stream(stack, cluster.http, seed) for seed in range(6)]
        os.kill(engine, signal.SIGKILL)
        ends = [stream.read() for stream in streams]
        # the replica that is about to end has no engine, and others answer
        with ThreadPoolExecutor(4) as pool:
            answers = pool.map(lambda seed: complete(cluster, seed), range(70, 74))
            assert set(answers) == {"length"}
    assert {"length"} < {end if end == "length" else "error" for end in ends}
    assert len(cluster.replicas(2, without=victim)) == 2


def test_a_patch_is_loaded_in_all_replicas_or_in_none(cluster):
    pids = cluster.replicas(2)
    refused = cluster.http.post(ROUTE, json={"name": "med"})
    assert refused.status_code == 400 and "patch 'med'" in refused.json()["error"]["message"]
    assert cluster.http.post(ROUTE, json={"name": "law"}).json()["name"] == "law"
    assert cluster.metric("patch_rows").keys() == pids.keys()
    again = cluster.http.post(ROUTE, json={"name": "law"})
    assert again.status_code == 409
    # a new replica has it before it answers
    victim, pid = pids.popitem()
    os.kill(pid, signal.SIGKILL)
    new = cluster.replicas(2, without=victim)
    assert cluster.metric("patch_rows").keys() == new.keys()
    assert cluster.http.delete(f"{ROUTE}/law").json()["deleted"]
    assert not cluster.metric("patch_rows")


def load_patch(cluster: Cluster, name: str) -> int:
    """Load a patch; the number of its rows."""
    rows = int(cluster.http.post(ROUTE, json={"name": name}).raise_for_status().json()["rows"])
    assert rows > 0
    return rows


def test_a_change_right_after_the_death_of_the_patch_actor_reaches_all_replicas(cluster):
    pids = cluster.replicas(2)
    rows = load_patch(cluster, "law")
    cluster.restart_patch_actor()
    rows += load_patch(cluster, "tax")
    body = {"prompt": "a", "max_tokens": 1, "memory_patches": ["law", "tax"]}
    for _ in range(8):
        assert cluster.http.post("/v1/completions", json=body).status_code == 200
    assert cluster.metric("patch_rows") == dict.fromkeys(pids, rows)
    for name in ("law", "tax"):
        cluster.http.delete(f"{ROUTE}/{name}").raise_for_status()
    assert not cluster.metric("patch_rows")


def test_a_rolling_update_loses_nothing(cluster, arguments):
    old = cluster.replicas(2)
    cluster.http.post(ROUTE, json={"name": "law"}).raise_for_status()
    is_over: list[bool] = []

    def load(seed: int) -> int:
        count = 0
        while not is_over:
            assert complete(cluster, seed) == "length"
            with ExitStack() as stack:
                assert Stream(stack, cluster.http, seed).read() == "length"
            count += 2
        return count

    with ThreadPoolExecutor(3) as pool:
        loads: list[Future[int]] = [pool.submit(load, seed) for seed in range(3)]
        cluster.deploy(**arguments, served_model_name="new")
        new = cluster.replicas(2)
        is_over.append(True)
        assert all(future.result() > 2 for future in loads)
    assert not old.keys() & new.keys()
    models = cluster.http.get("/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["new", "new+law"]
    assert cluster.metric("patch_rows").keys() == new.keys()


def end_or_none(stream: Stream) -> str | None:
    """As ``read``; None if the connection is cut off."""
    try:
        return stream.read()
    except (httpx.RemoteProtocolError, httpx.ReadError):
        return None


def test_the_death_of_one_of_two_ingresses_loses_only_its_requests(cluster, arguments):
    cluster.deploy(**arguments, ingresses=2)
    ingresses = cluster.replicas(2, deployment="Ingress")
    cluster.replicas(2)
    # either ingress gets each request by chance: they agree on the replica of every prompt
    for seed in range(300, 324):
        cached_tokens(cluster, "/v1/completions", prompt=words(seed))
        assert cached_tokens(cluster, "/v1/completions", prompt=words(seed) + " end") > 0
    assert cluster.http.post(ROUTE, json={"name": "tax"}).status_code == 200
    for _ in range(8):
        assert cluster.http.post(ROUTE, json={"name": "tax"}).status_code == 409
    cluster.http.delete(f"{ROUTE}/tax").raise_for_status()
    with ExitStack() as stack:
        streams = [Stream(stack, cluster.http, seed) for seed in range(12)]
        running = cluster.running_requests("Ingress")
        assert running.keys() == ingresses.keys() and min(running.values()) > 0
        victim, pid = ingresses.popitem()
        os.kill(pid, signal.SIGKILL)
        ends = [end_or_none(stream) for stream in streams]
    assert set(ends) == {"length", None}
    assert ends.count(None) <= running[victim]
    assert complete(cluster, 80) == "length"
    assert len(cluster.replicas(2, without=victim, deployment="Ingress")) == 2


def test_a_queue_adds_a_replica(cluster, arguments):
    scaled = {"replicas": 1, "max_replicas": 2, "target_requests": 2.0, "upscale_delay_s": 0.0}
    scaled["downscale_delay_s"] = 5.0
    cluster.deploy(**arguments | scaled)
    cluster.replicas(1)
    is_over: list[bool] = []

    def load(seed: int) -> None:
        while not is_over:
            assert complete(cluster, seed) == "length"

    with ThreadPoolExecutor(8) as pool:
        loads = [pool.submit(load, seed) for seed in range(8)]
        assert len(cluster.replicas(2)) == 2
        is_over.append(True)
        for future in loads:
            future.result()
