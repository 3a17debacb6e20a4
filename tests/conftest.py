"""Shared fixtures: seeds, tolerances, poisoned memory, models and servers."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Set before torch loads OpenMP. Several test processes share the cores, and a spinning thread takes
# time from the thread that it waits for. Servers that tests start inherit this setting.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from hypothesis import settings

from engine.model.config import MemoryConfig
from server.config import cache_folder
from tests.models import HERMES_TEMPLATE, random_model, save_model, tiny_config
from tests.server.running import Running, running
from weights.models.named_models import SMOLLM2
from weights.models.prepare import prepared_folder

# Every run uses the same examples, without a time limit for busy machines. `make test` runs the
# profile "few"; `make test-slow` runs every property-based test again with the profile "many".
settings.register_profile("few", deadline=None, derandomize=True, max_examples=25)
settings.register_profile("many", settings.get_profile("few"), max_examples=100)
# in the interpreter of Triton, where an example takes a second
settings.register_profile("some", settings.get_profile("few"), max_examples=40)
settings.load_profile("few")

# (relative, absolute) by compute dtype: the defaults of torch.testing
TOLERANCE = {
    torch.float64: (1e-7, 1e-7),
    torch.float32: (1.3e-6, 1e-5),
    torch.float16: (1e-3, 1e-3),
    torch.bfloat16: (1.6e-2, 1e-2),
}

# torch caches its list of the functions that a device context affects: cache it before a test
# replaces one of them, or ``with torch.device("meta")`` allocates memory
with torch.device("meta"):
    torch.empty(0)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20)


@pytest.fixture(autouse=True)
def _logs_of_one_test() -> Iterator[None]:
    """Remove the command's log handlers: they keep the stderr of this test, closed after it."""
    yield
    root = logging.getLogger()
    for logger in (root, *root.manager.loggerDict.values()):
        if isinstance(logger, logging.Logger):  # others are only parts of names
            for handler in [one for one in logger.handlers if type(one) is logging.StreamHandler]:
                logger.removeHandler(handler)
    root.setLevel(logging.WARNING)
    logging.captureWarnings(False)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill the results of torch.empty and empty_like with NaN to expose missing writes."""
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
    """The folder of SmolLM2, prepared like the server prepares it."""
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
    """A dense model of many thin layers: 3000 tokens take longer than any test waits."""
    torch.manual_seed(8)
    model = random_model(tiny_config(num_layers=24, max_positions=4096))
    return save_model(model, tmp_path_factory.mktemp("models") / "slow")


@pytest.fixture(scope="session")
def memory_server(
    memory_plus_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """The tiny Memory+ model behind a real server, with a chat template that shows tools."""
    template = tmp_path_factory.mktemp("templates") / "hermes.jinja"
    template.write_text(HERMES_TEMPLATE)
    with running(memory_plus_folder, "--chat-template", str(template)) as server:
        yield server
