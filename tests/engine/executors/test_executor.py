"""The choice of an executor, and executors in another dtype than a model's weights."""

import copy
import logging

import pytest
import torch

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.executors import executor
from engine.executors.batch import prompt_batch
from engine.executors.eager import EagerExecutor
from engine.executors.executor import make_executor
from tests.models import feed_forward_changes, random_model, tiny_config

CONFIG = EngineConfig(kv_cache_gib=0.001, block_size=16)


def logits(made):
    return made.logits(prompt_batch(range(20), CONFIG.block_size))


@pytest.mark.parametrize("kind", ["dense", "moe", "memory_plus", "pkm", "peer"])
@pytest.mark.parametrize("is_native", [True, False])
def test_weights_of_another_dtype_are_converted_and_the_model_stays(kind, is_native, monkeypatch):
    if not is_native:
        monkeypatch.setattr(executor, "cpu_kernels", lambda device, dtype: None)
    is_pkm = kind == "pkm"
    options = {"qk_norm": is_pkm, "output_gate": is_pkm} if kind not in ("dense", "moe") else {}
    model = random_model(tiny_config(**feed_forward_changes("dense", kind, **options)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    narrow = copy.deepcopy(model).bfloat16()
    narrow.attach_tables(model.tables)
    found = logits(make_executor(model, CONFIG, dtype=torch.bfloat16))
    assert found.dtype is torch.bfloat16
    assert torch.equal(found, logits(make_executor(narrow, CONFIG)))
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_dtype_without_kernels_is_served_eagerly_and_the_log_says_so(caplog):
    caplog.set_level(logging.INFO)
    made = make_executor(random_model(tiny_config()), CONFIG, dtype=torch.float16)
    assert isinstance(made, EagerExecutor) and logits(made).dtype is torch.float16
    assert "eager, plain torch on cpu in torch.float16" in caplog.text


def test_kv_memory_that_the_machine_has_not_is_refused():
    with pytest.raises(ConfigError, match="kv_cache_gib: the machine cannot give 1e\\+0?6 GiB"):
        make_executor(random_model(tiny_config()), EngineConfig(kv_cache_gib=1e6))


def test_a_block_size_that_the_kernels_do_not_support_is_refused():
    config = EngineConfig(kv_cache_gib=0.001, block_size=6)
    with pytest.raises(ConfigError, match="block_size: must be a multiple of 4 on a CPU, not 6"):
        make_executor(random_model(tiny_config()), config)
