"""New memories of a finished model add 0 at first, and a run can train only them."""

import json
import shutil

import pytest
import torch

from engine.config import EngineConfig
from engine.errors import ConfigError
from tests.models import (
    engine_of,
    feed_forward_changes,
    greedy,
    plain_logits,
    random_model,
    run,
    save_model,
    served_logits,
    tiny_config,
)
from weights.adapters.memory_adapter import link_adapter
from weights.checkpoints.checkpoint import load_model
from weights.errors import TrainingError
from weights.training.new_model import model_config, new_model
from weights.training.run_folder import saved_states
from weights.training.run_record import resumed_settings
from weights.training.train_config import read_train_config
from weights.training.trainer import Trainer

LAYERS = {"0": "memory_plus", "1": "memory_plus"}
MEMORY = {"num_heads": 2, "num_subkeys": 8, "top_k": 3, "query_dim": 8, "value_dim": 32}
BESIDE = {"layers": LAYERS, **MEMORY, "placement": "beside"}
OPTIONS = [
    {},
    {"scalar_gate": True},
    {"output_gate": True},
    {"layers": {"1": "pkm"}, "scalar_gate": True},
    {"layers": {"1": "pkm"}, "value_projection": True},
    {"layers": {"0": "peer"}, "scalar_gate": True},
]
IDS = list(range(5, 30))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A finished dense model and its folder."""
    torch.manual_seed(5)
    model = random_model(tiny_config())
    return model, save_model(model, tmp_path_factory.mktemp("base") / "model")


def grown(folder, options, **changes):
    """The base with new memories that are added to its feed-forwards."""
    config = model_config({"memory": BESIDE | options}, 260, str(folder))
    return new_model(config, 0, str(folder), **changes)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_finished_model_starts_as_it_was(base, options, dtype):
    model, folder = base
    with torch.no_grad():
        started = grown(folder, options)
        assert torch.equal(plain_logits(started, IDS), plain_logits(model, IDS))
        started.to(dtype)
        before = random_model(model.config, dtype)
        before.load_state_dict(model.state_dict())
        assert torch.equal(served_logits(started, IDS), served_logits(before, IDS))


def test_only_memories_require_gradients(base):
    started = grown(base[1], {"scalar_gate": True}, is_dense_frozen=True)
    trained = {name for name, one in started.named_parameters() if one.requires_grad}
    assert trained == {name for name, _ in started.named_parameters() if ".memory." in name}


@pytest.mark.parametrize("options", [{"layers": {"1": "pkm"}}, {"layers": {"0": "peer"}}])
def test_a_memory_that_cannot_start_at_0_is_refused(base, options):
    with pytest.raises(ConfigError, match=r"^model\.memory\.placement: layer . has no value"):
        grown(base[1], options)


def test_a_model_without_memories_cannot_be_frozen(base):
    config = model_config({}, 260, str(base[1]))
    with pytest.raises(ConfigError, match="^run.freeze: the model has no memory layers"):
        new_model(config, 0, str(base[1]), is_dense_frozen=True)


@pytest.fixture
def settings(base, tmp_path):
    """Settings of a run that adds memories to the base."""
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "one.txt").write_text("red and green make brown, blue and red purple. " * 40)
    (texts / "other.txt").write_text("two and two make four, two and three five. " * 40)
    config = tmp_path / "train.toml"
    memory = ", ".join(f"{name} = {value}" for name, value in MEMORY.items())
    config.write_text(
        f"""
        [model]
        memory = {{{memory}, placement = "beside", layers = {{"1" = "memory_plus"}}}}
        [data]
        train = ["{texts / "other.txt"}"]
        validation = ["{texts / "one.txt"}"]
        sequence_length = 24
        [optimizer]
        lr = 1e-2
        table_lr = 1e-1
        warmup_steps = 1
        [run]
        steps = 8
        tokens_per_step = 128
        dtype = "float32"
        checkpoint_every = 4
        init_from = "{base[1]}"
        freeze = ["dense"]
        """
    )
    return lambda *changes: read_train_config(config, changes)


@pytest.mark.parametrize("gate", ["false", "true"])
def test_memories_alone_are_trained(base, settings, tmp_path, gate):
    config = settings(f"model.memory.scalar_gate={gate}")
    losses = []
    Trainer(config, tmp_path / "run", resume=False).run(lambda one: losses.append(one) or True)
    assert losses[-1].loss < losses[0].loss - 0.1
    model, trained = base[0], saved_states(tmp_path / "run" / "checkpoints")[-1]
    loaded, _ = load_model(trained)
    frozen, found = model.state_dict(), loaded.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in frozen.items())
    memory = loaded.layers[1].memory
    changed = memory.scalar_gate if gate == "true" else memory.value_proj.weight
    assert changed.count_nonzero()
    assert not torch.allclose(plain_logits(loaded, IDS), plain_logits(model, IDS))
    found = served_logits(loaded, IDS)
    torch.testing.assert_close(found, plain_logits(loaded, IDS), rtol=1e-3, atol=1e-3)
    link_adapter(base[1], tmp_path / "run" / "adapter", tmp_path / "both")
    both, _ = load_model(tmp_path / "both")
    assert torch.equal(plain_logits(both, IDS), plain_logits(loaded, IDS))
    engine = engine_of(loaded, EngineConfig(kv_cache_gib=0.001))
    assert len(run(engine, {0: [greedy("a", IDS, 4)]})["a"]) == 4


def test_a_resumed_run_is_equal_bit_for_bit(settings, tmp_path):
    def trained(folder, *parts):
        for resume, until in parts:
            made = Trainer(settings(), folder, resume=resume)
            made.run(lambda report, until=until: report.step != until)
        return load_model(saved_states(folder / "checkpoints")[-1])[0]

    whole = trained(tmp_path / "whole", (False, None))
    cut = trained(tmp_path / "cut", (False, 5), (True, None))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(cut.state_dict()[name], tensor)
    tables = whole.layers[1].memory.table.rows, cut.layers[1].memory.table.rows
    assert torch.equal(*tables)


def test_another_part_cannot_be_frozen(settings):
    with pytest.raises(ConfigError, match="^run.freeze: 'memory' is not supported"):
        settings("run.freeze=['memory']")


def test_experts_have_no_memory_beside_them():
    with pytest.raises(
        ValueError, match="^memory.placement: beside cannot be combined with experts"
    ):
        tiny_config(**feed_forward_changes("memory_plus", "moe", placement="beside"))


def test_a_complete_run_writes_an_adapter_that_is_missing(base, settings, tmp_path):
    Trainer(settings(), tmp_path / "run", resume=False).run(lambda report: True)
    adapter = tmp_path / "run" / "adapter"
    first = (adapter / "model.safetensors").read_bytes()
    shutil.rmtree(adapter)
    Trainer(settings(), tmp_path / "run", resume=True).run(lambda report: True)
    assert (adapter / "model.safetensors").read_bytes() == first
    Trainer(settings("run.steps=9"), tmp_path / "run", resume=True).run(lambda report: True)
    assert (adapter / "model.safetensors").read_bytes() != first
    assert [one.name for one in (tmp_path / "run").glob("*adapter*")] == ["adapter"]


@pytest.mark.parametrize("change", ["model.rope_theta=500.0", "run.freeze=[]"])
def test_a_run_that_changes_its_base_writes_no_adapter(settings, tmp_path, change):
    Trainer(settings(change, "run.steps=1"), tmp_path / "run", resume=False).run(lambda _: True)
    assert not (tmp_path / "run" / "adapter").exists()


def test_recomputed_activations_change_nothing(settings, tmp_path):
    for name in ("false", "true"):
        config = settings(f"run.checkpoint_activations={name}")
        Trainer(config, tmp_path / name, resume=False).run(lambda report: True)
    found, wanted = (
        tmp_path / name / "adapter" / "model.safetensors" for name in ("true", "false")
    )
    assert found.read_bytes() == wanted.read_bytes()


def test_a_moved_base_must_have_the_same_weights(base, settings, tmp_path):
    Trainer(settings("run.steps=1"), tmp_path / "run", resume=False).run(lambda report: True)
    other = shutil.copytree(base[1], tmp_path / "other")
    moved = settings("run.steps=1", f"run.init_from={other}")
    Trainer(moved, tmp_path / "run", resume=True).run(lambda report: True)
    shutil.rmtree(other)
    save_model(random_model(tiny_config()), other)
    for changed in (moved, settings("run.steps=1", "run.init_from=")):
        with pytest.raises(TrainingError, match="run.init_from: must be .* to resume"):
            Trainer(changed, tmp_path / "run", resume=True)


def test_a_run_of_an_earlier_version_resumes(settings, tmp_path):
    config = settings("run.freeze=[]", "run.steps=1")
    Trainer(config, tmp_path / "run", resume=False).run(lambda report: True)
    file = tmp_path / "run" / "settings.json"
    saved = json.loads(file.read_text())
    del saved["run"]["freeze"], saved["run"]["table_tier"]
    file.write_text(json.dumps(saved))
    assert resumed_settings(tmp_path / "run", config).changes == ()
    assert Trainer(config, tmp_path / "run", resume=True).step == 1
