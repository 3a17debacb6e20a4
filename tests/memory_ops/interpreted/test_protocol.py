"""All tiers have the methods and signatures of the ValueTable protocol."""

import inspect

import pytest

from memory_ops.tables.device import DeviceTable
from memory_ops.tables.disk import DiskTable
from memory_ops.tables.host import HostTable
from memory_ops.tables.trained import TrainedTable
from memory_ops.tables.trained_host import TrainedHostTable
from memory_ops.tables.value_table import ValueTable

METHODS = [
    name
    for name, method in vars(ValueTable).items()
    if inspect.isfunction(method) and not name.startswith("_")
]
TIERS = {
    DeviceTable: "device",
    TrainedTable: "device",
    HostTable: "host",
    TrainedHostTable: "host",
    DiskTable: "disk",
}


def parameters(function):
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("kind", TIERS)
def test_a_tier_has_the_signatures_of_the_protocol(kind):
    assert kind.tier == TIERS[kind]
    assert {"row_source", "start", "start_dots", "hint", "watch", "statistics"} <= set(METHODS)
    assert hasattr(kind, "fetched_capacity")
    for name in METHODS:
        assert parameters(getattr(kind, name)) == parameters(getattr(ValueTable, name)), name
