"""Models whose weights are in groups: loaded or rounded by the executor, in any company."""

import pytest
import torch

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.executors import executor
from engine.executors.batch import prompt_batch
from engine.executors.executor import make_executor
from engine.model.config import MEMORY_KINDS
from engine.model.grouped_layers import group_formats, groupable
from engine.model.grouped_weights import GroupFormat, group_weights
from engine.model.transformer import converted, with_tables
from tests.engine.test_company import prompts, step_all
from tests.grouped_models import in_groups, with_groups
from tests.models import engine_of, feed_forward_changes, greedy, random_model, tiny_config

CONFIG = EngineConfig(kv_cache_gib=0.001, block_size=16)
each_dtype = pytest.mark.parametrize("dtype", ["int8", "int4"])
each_kind = pytest.mark.parametrize("kind", ["dense", "moe", "memory_plus", "pkm", "peer"])


def model_of(kind="dense", *, tied=True):
    options = {"qk_norm": True, "output_gate": True} if kind == "pkm" else {}
    memory = {"value_dim": 40, **options} if kind in MEMORY_KINDS else {}
    changes = feed_forward_changes("dense", kind, **memory)
    return random_model(tiny_config(hidden_size=40, tie_embeddings=tied, **changes))


def logits(made):
    return made.logits(prompt_batch(range(20), CONFIG.block_size))


@each_kind
@each_dtype
@pytest.mark.parametrize("tied", [True, False])
def test_an_executor_rounds_weights_to_the_groups_of_a_folder(kind, dtype, tied):
    model = model_of(kind, tied=tied)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = logits(make_executor(in_groups(model, dtype), CONFIG))
    assert torch.equal(logits(make_executor(model, CONFIG, weight_dtype=dtype)), wanted)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@each_dtype
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_logits_are_near_those_of_the_dense_weights(dtype, compute):
    grouped = in_groups(model_of(tied=False), dtype)
    found = logits(make_executor(grouped, CONFIG, dtype=compute)).double()
    wanted = logits(make_executor(converted(grouped, torch.float32), CONFIG)).double()
    # the kernels round activations to 8 bits, and these random layers amplify every error
    assert (found - wanted).norm() < 0.08 * wanted.norm()


def test_groups_with_minimums_and_mixed_formats_are_served():
    model = model_of(tied=False)
    groups = {}
    for number, name in enumerate(sorted(groupable(model))):
        made = group_weights(model.get_submodule(name).weight, 8 if number % 3 else 4)
        if made.bits == 4:
            made = made._replace(minimums_OG=made.scales_OG * -7.5)
        groups[name] = made
    grouped = with_groups(model, groups)
    formats = set(group_formats(grouped).values())
    assert formats == {GroupFormat(8), GroupFormat(4, has_minimums=True)}
    found = logits(make_executor(grouped, CONFIG)).double()
    wanted = logits(make_executor(converted(grouped, torch.float32), CONFIG)).double()
    assert (found - wanted).norm() < 0.08 * wanted.norm()


@each_kind
@each_dtype
def test_the_eager_executor_runs_the_dense_weights(kind, dtype, monkeypatch):
    monkeypatch.setattr(executor, "cpu_kernels", lambda device, dtype: None)
    grouped = in_groups(model_of(kind), dtype)
    wanted = logits(make_executor(converted(grouped, torch.float32), CONFIG))
    assert torch.equal(logits(make_executor(grouped, CONFIG)), wanted)
    with pytest.raises(ConfigError, match=f"weight_dtype: {dtype} needs memplus's native library"):
        make_executor(model_of(kind), CONFIG, weight_dtype=dtype)


def test_a_model_with_other_tables_keeps_its_groups():
    grouped = in_groups(model_of("pkm"), "int8")
    other = with_tables(grouped, grouped.tables)
    assert torch.equal(logits(make_executor(other, CONFIG)), logits(make_executor(grouped, CONFIG)))


def test_weights_in_groups_are_not_rounded_again():
    grouped = in_groups(model_of(), "int4")
    with pytest.raises(ConfigError, match="weight_dtype: the model's weights have 4 bits already"):
        make_executor(grouped, CONFIG, weight_dtype="int8")


@each_dtype
@pytest.mark.parametrize("kind", ["dense", "memory_plus"])
def test_answers_are_the_same_in_any_company_and_any_chunks(kind, dtype):
    grouped = in_groups(model_of(kind), dtype)
    requests = [
        greedy(str(i), prompt, 12, logprobs=1, prompt_logprobs=1)
        for i, prompt in enumerate(prompts(8))
    ]

    def answers(some, **limits):
        engine = engine_of(grouped, EngineConfig(kv_cache_gib=0.01, **limits))
        for request in some:
            engine.add(request)
        outputs = step_all(engine)
        assert not any(output.error for found in outputs.values() for output in found)
        return {
            name: [
                [one for output in found for one in output.prompt_logprobs],
                [one for output in found for one in output.logprobs],
            ]
            for name, found in outputs.items()
        }

    alone = {name: found for one in requests for name, found in answers([one]).items()}
    assert {len(answer) for _, answer in alone.values()} == {12}
    assert answers(requests) == alone
    assert answers(requests, max_batched_tokens=11, max_num_seqs=5) == alone
