"""Tests of the application for Ray Serve; tests/server/replicas/test_with_ray.py runs it."""

import importlib
import sys
import warnings
from pathlib import Path

import pytest

CONFIG = Path(__file__).parents[2] / "docker" / "replicas.yaml"


def test_without_ray_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "server.ray_app", raising=False)
    with pytest.raises(ImportError, match=r"install memplus\[ray\]"):
        importlib.import_module("server.ray_app")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_the_example_configuration_is_valid():
    import yaml
    from ray.serve.schema import ServeDeploySchema

    from server.ray_app import build

    schema = ServeDeploySchema.model_validate(yaml.safe_load(CONFIG.read_text()))
    (application,) = schema.applications
    assert application.import_path == "server.ray_app:build"
    ingress = build(application.args)._bound_deployment
    (replicas,) = [one for one in ingress.init_args if hasattr(one, "_bound_deployment")]
    config = replicas._bound_deployment._deployment_config
    assert config.autoscaling_config.max_replicas == application.args["max_replicas"]
    assert config.graceful_shutdown_timeout_s == 300
    assert ingress._deployment_config.num_replicas == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
@pytest.mark.parametrize("delay_s", [0, 10, 300])
def test_ray_takes_the_settings_without_warnings_and_gives_each_replica_its_gpus(delay_s):
    from server.ray_app import build

    arguments = {"max_replicas": 2, "upscale_delay_s": delay_s, "device": "cuda", "replica_cpus": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ingress = build(arguments | {"replica_gpus": 0.5, "kv_cache_gib": 1.0})._bound_deployment
    (replicas,) = [one for one in ingress.init_args if hasattr(one, "_bound_deployment")]
    resources = replicas._bound_deployment.ray_actor_options
    assert resources["num_gpus"] == 0.5 and resources["num_cpus"] == 3
    assert not ingress.ray_actor_options.get("num_gpus")
