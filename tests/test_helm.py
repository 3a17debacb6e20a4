"""The Helm chart: its objects fit Kubernetes' schemas, and its settings are those of the server."""

import argparse

import kubernetes_validate
import pytest
import yaml

from server.cli.environment import apply_environment
from server.cli.main import _SERVED
from server.cli.options import from_options
from server.config import HttpOptions
from tests.helm import CHART, helm, rendered
from tests.test_monitoring import names

pytestmark = pytest.mark.slow
FULL = {
    "image": {"repository": "registry/memplus", "digest": "sha256:" + "0" * 64},
    "imagePullSecrets": [{"name": "registry"}],
    "settings": {
        "model": "/models/my-model",
        "max-patch-rows": 2_000_000,
        "stall_timeout_s": 4.5,
        "verify-tables": True,
        "cors-origin": ["https://a.org", "https://b.org"],
    },
    "apiKeys": {"secretName": "keys"},
    "models": {"persistentVolumeClaim": {"claimName": "models", "readOnly": True}},
    "cache": {"persistentVolumeClaim": {"claimName": "cache"}},
    "resources": {"limits": {"memory": "64Gi", "nvidia.com/gpu": 1}},
    "drainTimeoutSeconds": 60,
    "seccompProfile": "profiles/memplus.json",
    "autoscaling": {"enabled": True, "maxReplicas": 8, "waitingRequests": 2.5},
    "serviceMonitor": {
        "enabled": True,
        "labels": {"release": "prometheus"},
        "apiKey": {"secretName": "scrape"},
    },
    "runtimeClassName": "nvidia",
    "nodeSelector": {"gpu": "true"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
}
EMPTY: dict = {}


@pytest.fixture(scope="module", params=[EMPTY, FULL], ids=["default", "full"])
def objects(request):
    return rendered(request.param)


def pod(objects: dict) -> dict:
    return objects["Deployment"]["spec"]["template"]["spec"]


def environment(objects: dict) -> dict[str, str]:
    entries = pod(objects)["containers"][0]["env"]
    return {one["name"]: one["value"] for one in entries if "value" in one}


def test_helm_finds_nothing_to_say_about_the_chart():
    done = helm("lint", "--strict", str(CHART))
    assert done.returncode == 0 and "0 chart(s) failed" in done.stdout, done


def test_objects_fit_the_schemas_of_kubernetes(objects):
    kinds = {"Deployment", "Service", "PodDisruptionBudget"}
    assert kinds <= objects.keys()
    for kind, one in objects.items():
        if kind != "ServiceMonitor":  # its schema is the operator's
            for version in ("1.25", "1.37"):
                kubernetes_validate.validate(one, version, strict=True)


def test_the_pod_has_no_rights_that_it_does_not_need(objects):
    spec = pod(objects)
    assert not spec["automountServiceAccountToken"] and not spec["enableServiceLinks"]
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"]["type"] in ("RuntimeDefault", "Localhost")
    (container,) = spec["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    mounts = {one["mountPath"]: one.get("readOnly", False) for one in container["volumeMounts"]}
    assert mounts.items() >= {"/tmp": False, "/home/memplus/.cache": False}.items()
    assert mounts.get("/models", True)


def test_probes_and_the_grace_period_fit_the_server(objects):
    spec = pod(objects)
    (container,) = spec["containers"]
    probes = {name: container[f"{name}Probe"] for name in ("startup", "readiness", "liveness")}
    paths = {name: probe["httpGet"]["path"] for name, probe in probes.items()}
    assert paths == {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}
    assert probes["startup"]["failureThreshold"] * probes["startup"]["periodSeconds"] == 600
    drain = int(environment(objects)["MEMPLUS_DRAIN_TIMEOUT_S"])
    delay = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    # a pod that takes no requests has two seconds to end
    assert spec["terminationGracePeriodSeconds"] >= delay + drain + 2


def test_the_server_accepts_the_environment(objects):
    options = argparse.Namespace(config=None)
    apply_environment(environment(objects), options, _SERVED)
    for settings in _SERVED:
        from_options(settings, options)
    assert from_options(HttpOptions, options).drain_timeout_s in (30, 60)


def test_values_reach_their_places():
    objects = rendered(FULL)
    assert environment(objects) == {
        "MEMPLUS_DRAIN_TIMEOUT_S": "60",
        "MEMPLUS_MODEL": "/models/my-model",
        "MEMPLUS_MAX_PATCH_ROWS": "2000000",
        "MEMPLUS_STALL_TIMEOUT_S": "4.5",
        "MEMPLUS_VERIFY_TABLES": "true",
        "MEMPLUS_CORS_ORIGIN": "https://a.org,https://b.org",
    }
    spec = pod(objects)
    (container,) = spec["containers"]
    keys = next(one for one in container["env"] if one["name"] == "MEMPLUS_API_KEYS")
    assert keys["valueFrom"] == {"secretKeyRef": {"name": "keys", "key": "keys"}}
    assert container["image"] == f"registry/memplus@sha256:{'0' * 64}"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    profile = {"type": "Localhost", "localhostProfile": "profiles/memplus.json"}
    assert spec["securityContext"]["seccompProfile"] == profile
    assert "replicas" not in objects["Deployment"]["spec"]
    (endpoint,) = objects["ServiceMonitor"]["spec"]["endpoints"]
    assert endpoint["authorization"] == {"credentials": {"name": "scrape", "key": "key"}}
    assert objects["ServiceMonitor"]["metadata"]["labels"]["release"] == "prometheus"


def test_the_autoscaler_uses_a_metric_that_the_adapter_makes_of_ours():
    adapter = yaml.safe_load((CHART.parent / "prometheus-adapter.yaml").read_text())
    (rule,) = adapter["rules"]["custom"]
    assert rule["seriesQuery"].partition("{")[0] in names()
    (metric,) = rendered(FULL)["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    assert metric["pods"]["target"] == {"type": "AverageValue", "averageValue": "2.5"}


@pytest.mark.parametrize(
    "values",
    [
        {"replica": 2},
        {"settings": {"port": 80}},
        {"settings": {"host": "127.0.0.1"}},
        {"settings": {"api-key": "secret"}},
        {"settings": {"drain_timeout_s": 5}},
        {"settings": {"model": None, "Model": "x"}},
        {"image": {"repository": "memplus", "digest": "abc"}},
        {"cache": {"emptyDir": {}, "hostPath": {"path": "/cache"}}},
        {"loadTimeoutSeconds": 0},
        {"autoscaling": {"waitingRequests": 0}},
    ],
    ids=str,
)
def test_wrong_values_are_refused(values):
    done = helm("template", "memplus", str(CHART), values=values)
    assert done.returncode != 0 and "schema" in done.stderr, done


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"autoscaling": {"enabled": True}, "settings": {"metrics-prefix": "vllm:"}},
            "settings.metrics-prefix",
        ),
        (
            {"autoscaling": {"enabled": True, "minReplicas": 5, "maxReplicas": 4}},
            "autoscaling.minReplicas: 5 is more than maxReplicas, 4",
        ),
        (
            {"serviceMonitor": {"enabled": True}, "apiKeys": {"secretName": "keys"}},
            "serviceMonitor.apiKey.secretName",
        ),
    ],
    ids=str,
)
def test_values_that_do_not_fit_each_other_are_refused(values, message):
    done = helm("template", "memplus", str(CHART), values=values)
    assert done.returncode != 0 and message in done.stderr, done
