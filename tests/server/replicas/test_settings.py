"""Tests of the settings of an application of replicas."""

import pytest

from engine.errors import ConfigError
from server.replicas.settings import application_settings


def test_texts_and_values_give_the_same_settings():
    texts = {
        "model": "m",
        "replicas": "2",
        "kv_cache_gib": "0.5",
        "ui": "false",
        "patch": "a=x,b=y",
    }
    values = {
        "model": "m",
        "replicas": 2,
        "kv-cache-gib": 0.5,
        "ui": False,
        "patch": ["a=x", "b=y"],
    }
    settings = application_settings(texts, "")
    assert settings.options.replicas == 2 and settings.replica.engine.kv_cache_gib == 0.5
    assert not settings.replica.http.ui and len(settings.replica.patches.patch) == 2
    assert application_settings(values, "").replica == settings.replica


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modle": "x"}, "modle: unknown option; did you mean model?"),
        ({"port": "8000"}, "port: is an option of Ray's proxy"),
        ({"uds": "x"}, "uds: has no counterpart in Ray's proxy"),
        ({"drain-timeout-s": "8"}, "drain-timeout-s: use replica_drain_timeout_s"),
        ({"replicas": "two"}, "replicas: expected int, got 'two'"),
        ({"replicas": "1.5"}, "replicas: expected int"),
        ({"replicas": "-1"}, "replicas: must be at least 1"),
        ({"table_tier": "tape"}, "table_tier: 'tape' is not one of"),
        ({"max-num-seqs": 4, "max_num_seqs": 4}, "max_num_seqs: is given twice"),
        ({"max_body_mib": 300}, "max_bodies_mib: must be at least max_body_mib"),
        ({"device": "cuda"}, "replica_gpus: must be above 0 with device cuda"),
        ({"device": "cuda:1", "replica_gpus": 1}, "device: Ray chooses the GPUs"),
        (
            {"device": "cpu", "replica_gpus": 0.5},
            "replica_gpus: must be 0 with device cpu, not 0.5",
        ),
        (
            {"replica_gpus": 0.5},
            "kv_cache_gib: must be set if replicas share a GPU (replica_gpus 0.5)",
        ),
        ({"patch": 3}, "patch: expected a list of strings"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(ConfigError) as raised:
        application_settings(arguments, "")
    assert message in str(raised.value)


def test_a_replica_has_as_many_threads_as_cpus():
    assert application_settings({}, "").replica.threads.threads == 1
    assert application_settings({"replica_cpus": 4}, "").replica.threads.threads == 4
    settings = application_settings({"threads": 3}, "")
    assert settings.replica.threads.threads == settings.replica_cpus == 3


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_replica_has_gpus(device):
    arguments = {"device": device, "replica_gpus": "0.5", "kv_cache_gib": "1"}
    settings = application_settings(arguments, "")
    assert settings.options.replica_gpus == 0.5 and settings.replica.model.device == device


def test_ray_sends_a_replica_more_than_its_queue_holds():
    """So the replica refuses requests itself, with the answers of a server."""
    settings = application_settings({"max_num_seqs": 8, "max_queued_requests": 4}, "")
    assert settings.max_requests > 12


def test_keys_travel_as_hashes_only():
    settings = application_settings({"api_key": "secret"}, "other name")
    assert settings.ingress.access.api_key == ()
    assert settings.ingress.keys.find(b"secret") and settings.ingress.keys.find(b"other")
