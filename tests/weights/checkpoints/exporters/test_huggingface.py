"""Export to transformers: the library computes the same logits and generates the same tokens."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils

from engine.errors import ConfigError
from engine.model.rope_scaling import LinearScaling, Llama3Scaling, YarnScaling
from server.cli.main import main
from tests.conftest import TOLERANCE
from tests.models import (
    EOS_ID,
    feed_forward_changes,
    plain_logits,
    random_model,
    save_model,
    tiny_config,
    train_sentencepiece,
)
from weights.checkpoints.checkpoint import load_model, open_checkpoint
from weights.checkpoints.convert import convert
from weights.checkpoints.exporters import huggingface
from weights.checkpoints.exporters.huggingface import export_transformers
from weights.checkpoints.exporters.remote_code.configuration_memplus import MemplusConfig
from weights.checkpoints.exporters.remote_code.memory_memplus import Memory, ValueTables
from weights.checkpoints.exporters.remote_code.modeling_memplus import MemplusForCausalLM
from weights.checkpoints.tokenizer import load_tokenizer
from weights.errors import CheckpointError
from weights.models.named_models import WORDNET
from weights.models.prepare import prepared_folder

MEMORIES = {
    "memory_plus": feed_forward_changes("dense", "memory_plus", "memory_plus"),
    "own_tables": feed_forward_changes("memory_plus", "dense", value_dim=24, share_values=False),
    "qk_norm": feed_forward_changes("memory_plus", "dense", qk_norm=True),
    "output_gate": feed_forward_changes("dense", "pkm", "dense", "pkm", output_gate=True),
    "projected": feed_forward_changes("pkm", "dense", value_projection=True, value_dim=20),
    "peer": feed_forward_changes("peer", "dense", "peer"),
    "peer_own_tables": feed_forward_changes("peer", "pkm", share_values=False, output_gate=True),
    "all_kinds": feed_forward_changes("moe", "peer", "pkm", "memory_plus", "dense", qk_norm=True),
    "biases": feed_forward_changes("dense", "pkm") | {"attention_bias": True, "mlp_bias": True},
    "tied": feed_forward_changes("dense", "pkm") | {"tie_embeddings": True, "head_dim": 16},
    "yarn": feed_forward_changes("dense", "pkm") | {"rope_scaling": YarnScaling(4.0, 64)},
    "qwen2": feed_forward_changes("dense", "pkm") | {"qkv_bias": True},
    "qwen3": feed_forward_changes("dense", "pkm") | {"qk_norm": True, "attention_bias": True},
    "beside": feed_forward_changes("dense", "memory_plus", placement="beside"),
    "gated": feed_forward_changes("peer", "pkm", placement="beside", scalar_gate=True),
    "mixed": feed_forward_changes("dense", "moe"),
    "narrow_experts": feed_forward_changes("moe", "moe"),
}
EXPERTS = feed_forward_changes("moe", "moe")
OWN_KINDS = {
    "dense": {},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True, "head_dim": 16},
    "linear": {"rope_scaling": LinearScaling(2.0), "tie_embeddings": True},
    "llama3": {"rope_scaling": Llama3Scaling(8.0, 1.0, 4.0, 64), "rope_theta": 5e5},
    "yarn": {"rope_scaling": YarnScaling(4.0, 64)},
    "mixtral": EXPERTS | {"intermediate_size": EXPERTS["mixture"].expert_size},
}


@pytest.fixture(scope="module", autouse=True)
def _modules(tmp_path_factory):
    """A folder for the code that transformers copies out of models."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", folder)
        patch.syspath_prepend(folder)
        yield


def loaded(folder: Path, **options):
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, local_files_only=True, **options
    )
    problems = {name: keys for name, keys in report.items() if keys}
    assert not problems
    return model.eval()


def tokenizer_of(folder: Path):
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=True)


def exported(tmp_path: Path, changes: dict):
    """Our model, and transformers' with code that it trusts."""
    model = random_model(tiny_config(**changes))
    export_transformers(save_model(model, tmp_path / "ours"), tmp_path / "out")
    return model, loaded(tmp_path / "out", trust_remote_code=True)


def assert_close_logits(found: torch.Tensor, expected: torch.Tensor) -> None:
    # rounding errors of several layers add up
    rtol, atol = (10 * one for one in TOLERANCE[expected.dtype])
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@torch.inference_mode()
def assert_close_answers(ours, theirs) -> None:
    ids = torch.randint(0, 250, (1, 19))
    expected = plain_logits(ours, ids[0].tolist())
    assert_close_logits(theirs(ids).logits[0], expected)
    assert_close_logits(theirs(ids, logits_to_keep=2).logits[0], expected[-2:])
    # in two steps with a cache
    first = theirs(ids[:, :7], use_cache=True)
    second = theirs(ids[:, 7:], past_key_values=first.past_key_values, use_cache=True)
    assert_close_logits(torch.cat((first.logits, second.logits), 1)[0], expected)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    made = theirs.generate(ids, **options)[0].tolist()
    for other in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert theirs.generate(ids, **options, **other)[0].tolist() == made
    for end in range(19, 27):
        assert made[end] == int(plain_logits(ours, made[:end])[-1].argmax())


@pytest.mark.parametrize("kind", MEMORIES)
def test_models_with_code_have_the_same_logits_and_tokens(tmp_path, kind):
    ours, theirs = exported(tmp_path, MEMORIES[kind])
    assert type(theirs).__name__ == "MemplusForCausalLM"
    assert_close_answers(ours, theirs)


@pytest.mark.parametrize("kind", OWN_KINDS)
def test_llama_and_mixtral_need_no_code(tmp_path, kind):
    model = random_model(tiny_config(**OWN_KINDS[kind]))
    folder = save_model(model, tmp_path / "ours")
    assert main(["export", str(folder), str(tmp_path / "out"), "--to", "transformers"]) == 0
    assert not list((tmp_path / "out").glob("*.py"))
    theirs = loaded(tmp_path / "out")
    assert type(theirs).__module__.startswith("transformers.models.")
    assert_close_answers(model, theirs)
    assert open_checkpoint(tmp_path / "out")[0].model == model.config


def test_padding_changes_no_answer(tmp_path):
    _, theirs = exported(tmp_path, MEMORIES["memory_plus"])
    long, short = torch.randint(0, 250, (9,)), torch.randint(0, 250, (4,))
    ids = torch.stack((long, torch.cat((torch.full((5,), 258), short))))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    both = theirs.generate(ids, attention_mask=mask, pad_token_id=258, **options)
    for row, alone in ((0, long), (1, short)):
        made = theirs.generate(alone[None], **options)[0]
        assert both[row, 9:].tolist() == made[len(alone) :].tolist()
    padded = theirs(ids, attention_mask=mask).logits[1, 5:]
    assert_close_logits(padded, theirs(short[None]).logits[0])


def test_the_loss_is_that_of_the_next_tokens(tmp_path):
    _, theirs = exported(tmp_path, MEMORIES["peer"])
    ids = torch.randint(0, 250, (2, 9))
    labels = ids.clone()
    labels[0, :4] = -100
    out = theirs(ids, labels=labels, output_hidden_states=True)
    expected = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )
    assert_close_logits(out.loss, expected)
    assert len(out.hidden_states) == 4 and out.hidden_states[-1].shape == (2, 9, 32)
    with pytest.raises(ValueError, match="^labels: "):
        theirs(ids, labels=labels, logits_to_keep=1)


def test_arguments_that_the_code_lacks_are_refused(tmp_path):
    _, theirs = exported(tmp_path, MEMORIES["memory_plus"])
    ids = torch.randint(0, 250, (1, 4))
    with pytest.raises(ValueError, match="^output_attentions: "):
        theirs(ids, output_attentions=True)
    with pytest.raises(ValueError, match=r"^attention_mask: .*\(1, 4\), not \(1, 3\)"):
        theirs(ids, attention_mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match="^token_type_ids: is not supported"):
        theirs(ids, token_type_ids=ids)
    with pytest.raises(ValueError, match="^return_dict: "):
        theirs(ids, return_dict=False)
    with pytest.raises(ValueError, match="^input_ids, inputs_embeds: "):
        theirs()


def test_lookups_in_parts_give_the_same_sums(tmp_path, monkeypatch):
    ours, theirs = exported(tmp_path, MEMORIES["peer"])
    module = sys.modules[type(theirs.memory).__module__]
    monkeypatch.setattr(module, "_LOOKUP_SIZE", 1)
    assert_close_answers(ours, theirs)


def test_code_named_by_the_tokenizer_is_not_carried_over(tmp_path):
    model = random_model(tiny_config(**MEMORIES["memory_plus"]))
    folder = save_model(model, tmp_path / "ours")
    named = {"auto_map": {"AutoTokenizer": [None, "somebody/else--code.Tokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    export_transformers(folder, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert "auto_map" not in written
    assert tokenizer_of(tmp_path / "out")("ab").input_ids == load_tokenizer(folder).encode("ab")


@pytest.mark.parametrize("kind", ["memory_plus", "mixed", "gated", "qwen3"])
def test_a_narrow_model_computes_in_its_dtype(tmp_path, kind):
    model = random_model(tiny_config(**MEMORIES[kind]), torch.bfloat16)
    export_transformers(save_model(model, tmp_path / "ours"), tmp_path / "out")
    theirs = loaded(tmp_path / "out", trust_remote_code=True)
    assert theirs.dtype is torch.bfloat16
    ids = torch.randint(0, 250, (1, 9))
    expected = plain_logits(model, ids[0].tolist())
    with torch.inference_mode():
        found = theirs(ids).logits[0]
    rtol, atol = TOLERANCE[torch.bfloat16]
    torch.testing.assert_close(found, expected, rtol=rtol, atol=4 * atol)


def test_a_saved_copy_is_loaded_again(tmp_path):
    ours, theirs = exported(tmp_path, MEMORIES["tied"])
    theirs.save_pretrained(tmp_path / "again")
    assert_close_answers(ours, loaded(tmp_path / "again", trust_remote_code=True))


@pytest.mark.parametrize("row_format", ["int8", "fp8", "int4", "int4_row"])
def test_rows_and_weights_of_few_bits_become_floating(tmp_path, row_format):
    config = tiny_config(**MEMORIES["own_tables"])
    folder = save_model(random_model(config), tmp_path / "ours")
    bits = "int4" if row_format == "int4" else "int8"
    convert(folder, tmp_path / "few", table_dtype=row_format, weight_dtype=bits)
    export_transformers(tmp_path / "few", tmp_path / "out")
    theirs = loaded(tmp_path / "out", trust_remote_code=True)
    assert theirs.dtype is torch.float32
    assert_close_answers(load_model(tmp_path / "few")[0], theirs)


def test_tables_have_their_own_shards(tmp_path):
    config = tiny_config(**MEMORIES["peer_own_tables"])
    export_transformers(save_model(random_model(config), tmp_path / "ours"), tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = {index["weight_map"][name] for name in config.table_names}
    assert len(files) == 3 and all(
        name in config.table_names for name, file in index["weight_map"].items() if file in files
    )
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors")} == set(
        index["weight_map"].values()
    )


def test_the_tokenizer_is_loaded_without_a_class_in_the_folder(tmp_path):
    folder = save_model(random_model(tiny_config(**MEMORIES["peer"])), tmp_path / "ours")
    export_transformers(folder, tmp_path / "out")
    tokenizer = tokenizer_of(tmp_path / "out")
    inputs = tokenizer("ab <eos>é", return_tensors="pt")
    assert inputs.keys() == {"input_ids", "attention_mask"} and tokenizer.eos_token == "<eos>"
    assert inputs["input_ids"][0].tolist() == load_tokenizer(folder).encode("ab <eos>é")
    model = loaded(tmp_path / "out", trust_remote_code=True)
    assert model.generate(**inputs, max_new_tokens=2).shape[1] <= inputs["input_ids"].shape[1] + 2
    assert model.generation_config.eos_token_id == [EOS_ID]


def test_a_vocabulary_that_json_cannot_express_stays_as_it_is(tmp_path):
    folder = save_model(random_model(tiny_config(vocab_size=400)), tmp_path / "ours")
    (folder / "tokenizer.json").unlink()
    vocabulary = train_sentencepiece(tmp_path, ["the fox by the river"] * 30)
    (folder / "tokenizer.model").write_bytes(vocabulary)
    (folder / "tokenizer_config.json").write_text('{"legacy": false}')
    export_transformers(folder, tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == vocabulary
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "LlamaTokenizer" and settings["legacy"] is False


def test_a_model_without_a_tokenizer_is_exported(tmp_path):
    folder = save_model(random_model(tiny_config()), tmp_path / "ours")
    (folder / "tokenizer.json").unlink()
    export_transformers(folder, tmp_path / "out")
    assert not list((tmp_path / "out").glob("tokenizer*"))


def test_the_default_model_is_exported(tmp_path):
    command = ["export", WORDNET, str(tmp_path / "out"), "--dtype", "float32", "--to"]
    assert main([*command, "lingua"]) == 2
    assert main([*command, "transformers"]) == 0
    folder = prepared_folder(WORDNET, tmp_path)
    theirs = loaded(tmp_path / "out", trust_remote_code=True)
    assert theirs.dtype is torch.float32
    tokenizer = tokenizer_of(tmp_path / "out")
    text = "memory (noun): the  power of\nretaining é"
    ids = load_tokenizer(folder).encode(text)
    assert tokenizer(text)["input_ids"] == ids
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    expected = plain_logits(load_model(folder, "float32")[0], ids)
    with torch.inference_mode():
        found = theirs(torch.tensor([ids])).logits[0]
    assert_close_logits(found, expected)


def test_features_that_the_code_does_not_know_are_refused_by_name(tmp_path, monkeypatch):
    # as if these two features were newer than the exporter
    new = {"attention_bias", "qk_norm"}
    known = {part: names - new for part, names in huggingface._KNOWN.items()}
    monkeypatch.setattr(huggingface, "_KNOWN", known)
    newer = {"attention_bias": {"attention_bias": True}, "memory.qk_norm": MEMORIES["qk_norm"]}
    for field, changes in newer.items():
        folder = save_model(random_model(tiny_config(**changes)), tmp_path / field)
        with pytest.raises(ConfigError, match=f"^{re.escape(field)}: cannot be exported"):
            export_transformers(folder, tmp_path / "out")
    plain = save_model(random_model(tiny_config()), tmp_path / "plain")
    export_transformers(plain, tmp_path / "out")


def test_a_folder_that_exists_is_not_replaced(tmp_path):
    folder = save_model(random_model(tiny_config()), tmp_path / "ours")
    with pytest.raises(CheckpointError, match="exists already"):
        export_transformers(folder, folder)


def test_the_code_has_usable_defaults():
    model = MemplusForCausalLM(MemplusConfig())
    assert model(torch.tensor([[1, 0]])).logits.shape == (1, 2, 2)
    shape = {"num_heads": 1, "num_subkeys": 2, "top_k": 1, "query_dim": 2, "value_dim": 2}
    flags = "share_values", "qk_norm", "value_projection", "output_gate", "scalar_gate"
    shape |= dict.fromkeys(flags, False) | {"placement": "replace"}
    layer = Memory(MemplusConfig(memory=shape), "pkm")
    assert layer(torch.ones(3, 2), None).tolist() == [[0, 0]] * 3
    assert dict(ValueTables(shape, True).named_parameters()).keys() == {"table", "down_table"}


@pytest.mark.slow
def test_a_program_loads_the_folder_without_memplus(tmp_path):
    model = random_model(tiny_config(**MEMORIES["memory_plus"]))
    export_transformers(save_model(model, tmp_path / "ours"), tmp_path / "out")
    program = (
        "import sys, torch, transformers\n"
        "load = transformers.AutoModelForCausalLM.from_pretrained\n"
        "model = load('out', trust_remote_code=True)\n"
        "print(model(torch.tensor([[1, 2, 3]])).logits[0, -1].argmax().item())\n"
        "assert not {'engine', 'weights'} & set(sys.modules)\n"
    )
    variables = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == int(plain_logits(model, [1, 2, 3])[-1].argmax())
