"""One replica in a real Ray cluster: the ingress, the router, patches and metrics."""

import json
import socket

import pytest

from tests.soak.ray_cluster import running_cluster
from tests.weights.patches.made import saved_patch
from weights.patches.model_identity import model_identity

pytestmark = pytest.mark.slow
COMPLETIONS = "/v1/completions"
PATCHES = "/v1/memory/patches"


def test_a_replica_completes_streams_and_changes_patches(memory_plus_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("patches")
    saved_patch(folder / "law", model=model_identity(memory_plus_folder))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = {"model": str(memory_plus_folder), "patch_dir": str(folder)}
    arguments |= {"kv_cache_gib": 0.05, "patch_memory_gib": 0.1}
    with running_cluster(tmp_path_factory.mktemp("ray"), port) as cluster:
        cluster.deploy(**arguments)
        (replica,) = cluster.replicas(1)
        body = {"prompt": "memory", "max_tokens": 4, "ignore_eos": True}
        whole = cluster.http.post(COMPLETIONS, json=body).json()
        assert whole["usage"]["completion_tokens"] == 4
        events = cluster.http.post(COMPLETIONS, json=body | {"stream": True}).text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        assert json.loads(events[0].removeprefix("data: "))["object"] == "text_completion"
        assert cluster.http.post(PATCHES, json={"name": "law"}).json()["name"] == "law"
        assert cluster.http.post(PATCHES, json={"name": "law"}).status_code == 409
        patched = cluster.http.post(COMPLETIONS, json=body | {"memory_patches": ["law"]})
        assert patched.status_code == 200
        assert cluster.metric("patch_rows").keys() == {replica}
        assert cluster.metric("request_success_total") == {replica: 3.0}
        # an actor that was started again knows the changes
        cluster.restart_patch_actor()
        assert cluster.http.delete(f"{PATCHES}/law").json()["deleted"]
        assert not cluster.metric("patch_rows")
