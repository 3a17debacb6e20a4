"""Tests of the options of replicas."""

import pytest

from engine.errors import ConfigError
from server.replicas.options import ReplicaOptions


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("replicas", 0),
        ("ingresses", 0),
        ("max_replicas", 0),
        ("target_requests", 0.0),
        ("target_requests", 4.0),  # without max_replicas
        ("replica_cpus", -1.0),
        ("replica_gpus", -1.0),
        ("replica_gpus", 1.5),
        ("replica_drain_timeout_s", float("inf")),
        ("upscale_delay_s", float("nan")),
        ("downscale_delay_s", -1.0),
        ("upscale_delay_s", 5.0),  # without max_replicas
        ("downscale_delay_s", 5.0),
        ("prefix_slack", -1),
        ("surge_percent", 101),
    ],
)
def test_values_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=f"^{field}: "):
        ReplicaOptions(**{field: value})


def test_the_defaults_are_valid():
    assert ReplicaOptions() == ReplicaOptions(replicas=1)
    assert ReplicaOptions(max_replicas=3, target_requests=4).target_requests == 4
