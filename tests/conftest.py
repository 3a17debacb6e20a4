"""Seeds, the one tolerance table, poisoned memory, and the models that tests share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch loads OpenMP: several test processes share the cores, and a thread that spins while
# it waits takes the time of the thread that it waits for. Servers that tests start inherit this.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from hypothesis import settings

from engine.model.config import MemoryConfig
from server.config import cache_folder
from tests.models import random_model, save_model, tiny_config
from tests.server.running import Running, running
from weights.models.named_models import SMOLLM2
from weights.models.prepare import prepared_folder

# The same examples in every run, without a time limit on a busy machine. `make test` runs the
# profile "few"; `make test-slow` runs every property-based test again with the profile "many".
settings.register_profile("few", deadline=None, derandomize=True, max_examples=25)
settings.register_profile("many", settings.get_profile("few"), max_examples=100)
settings.load_profile("few")

# (relative, absolute) by the dtype that is computed in, from torch's own defaults
TOLERANCE = {
    torch.float64: (1e-7, 1e-7),
    torch.float32: (1.3e-6, 1e-5),
    torch.float16: (1e-3, 1e-3),
    torch.bfloat16: (1.6e-2, 1e-2),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty and its kin return with NaN: whoever forgets to write is seen."""
    for name in ("empty", "empty_like"):
        plain = getattr(torch, name)

        def poisoned(*args, _plain=plain, **kwargs):
            tensor = _plain(*args, **kwargs)
            if tensor.is_floating_point() and tensor.device.type != "meta":
                tensor.detach().fill_(float("nan"))
            return tensor

        monkeypatch.setattr(torch, name, poisoned)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2, prepared as the server does it."""
    return prepared_folder(SMOLLM2, cache_folder())


@pytest.fixture(scope="session")
def memory_plus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Memory+ model with one table shared by two of its four layers, fp32."""
    torch.manual_seed(7)
    memory = MemoryConfig(num_heads=2, num_subkeys=8, top_k=3, query_dim=8, value_dim=24)
    kinds = ("dense", "memory_plus", "dense", "memory_plus")
    model = random_model(tiny_config(num_layers=4, feed_forward=kinds, memory=memory))
    return save_model(model, tmp_path_factory.mktemp("models") / "tiny-memory")


@pytest.fixture(scope="session")
def slow_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model of many thin layers, whose 3000 tokens take longer than any test waits."""
    torch.manual_seed(8)
    model = random_model(tiny_config(num_layers=24, max_positions=4096))
    return save_model(model, tmp_path_factory.mktemp("models") / "slow")


@pytest.fixture(scope="session")
def memory_server(memory_plus_folder: Path) -> Iterator[Running]:
    """The tiny Memory+ model behind a real server."""
    with running(memory_plus_folder) as server:
        yield server
