"""Runs of facebookresearch/memory: the reference's logits and rows, and errors that name the field.

``tests/golden/lingua_*`` has models under the repository's names, and what its formulas give.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from engine.errors import ConfigError
from engine.model.layout import TokenLayout
from server.cli.main import main
from tests.models import train_sentencepiece
from tests.weights.checkpoints.importers.sharded_files import write_shards
from weights.checkpoints.checkpoint import load_model
from weights.checkpoints.config_json import read_config
from weights.checkpoints.convert import convert
from weights.checkpoints.importers.lingua_files import weights_folder
from weights.checkpoints.tensor_files import list_tensors, read_mapped
from weights.errors import CheckpointError, ModelNotFoundError
from weights.models.named_models import find_model

GOLDEN = Path(__file__).parents[3] / "golden"
VARIANTS = ["memory_plus", "own_gated_wide", "peer", "plain"]
FIRST, SECOND = "layers.1.feed_forward.", "layers.3.feed_forward."


def golden(variant: str) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors of a run's model, and its settings."""
    folder = GOLDEN / f"lingua_{variant}"
    return load_file(folder / "model.safetensors"), json.loads((folder / "params.json").read_text())


def write_run(folder: Path, tensors: dict, params: dict) -> Path:
    """The folder that the repository's consolidation leaves."""
    (folder / "consolidated").mkdir(parents=True)
    optim = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3}]}
    torch.save({"model": tensors, "optim": optim}, folder / "consolidated" / "consolidated.pth")
    (folder / "consolidated" / "params.json").write_text(json.dumps(params))
    return folder


def write_step(folder: Path, tensors: dict, params: dict, num_files: int) -> Path:
    """Write a step's folder with one file per rank."""
    named = {f"model.{name}": one for name, one in tensors.items()}
    write_shards(folder, named | {"optim.state.norm.weight.exp_avg": torch.ones(48)}, num_files)
    (folder / "params.json").write_text(json.dumps(params))
    return folder


@pytest.fixture
def run(tmp_path, tokenizer):
    """Writes a run with changes and converts it; returns the new folder."""

    def converted(variant="memory_plus", *, remove=(), tensors=None, model=None, memory=None):
        stored, params = golden(variant)
        stored = {name: one for name, one in stored.items() if name not in remove}
        params["model"] |= model or {}
        params["model"]["productkey_args"] |= memory or {}
        write_run(tmp_path / "run", stored | (tensors or {}), params)
        convert(tmp_path / "run", tmp_path / "out", tokenizer=tokenizer)
        return tmp_path / "out"

    return converted


def forward(folder: Path, ids: torch.Tensor):
    model, _ = load_model(folder)
    positions = torch.arange(len(ids))
    return model(ids, TokenLayout(positions, (0, len(ids))), positions, with_trace=True)


@pytest.mark.parametrize("is_repeated", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_rows_are_those_of_the_reference(run, variant, is_repeated):
    stored, params = golden(variant)
    repeats = {}
    if is_repeated and params["model"]["productkey_args"]["mem_share_values"]:
        tables = {name for name in stored if name.startswith(f"{FIRST}values")}
        repeats = {name.replace(FIRST, SECOND): stored[name].clone() for name in tables}
        assert repeats
    out = run(variant, tensors=repeats)
    expected = load_file(GOLDEN / f"lingua_{variant}" / "expected.safetensors")
    with torch.inference_mode():
        found = forward(out, expected["ids"])
    torch.testing.assert_close(found.logits_LV.double(), expected["logits"], rtol=1e-4, atol=1e-4)
    for trace, rows_THK in zip(found.memory.values(), expected["rows"], strict=True):
        assert torch.equal(trace.rows_THK.sort(-1).values, rows_THK.sort(-1).values)


@pytest.mark.parametrize(
    ("place", "given"),
    [
        *((name, "") for name in ("", "consolidated", "10", "10/consolidated")),
        *((f"checkpoints/10{name}", "") for name in ("", "/consolidated")),
        ("checkpoints/10/consolidated", "checkpoints"),
    ],
)
def test_the_last_weights_of_a_run_are_found(tmp_path, place, given):
    for folder in (place, "9", "checkpoints/9"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / "checkpoints" / "9" / ".metadata").touch()
    (tmp_path / place / "consolidated.pth").touch()
    assert weights_folder(tmp_path / given) == tmp_path / place
    (tmp_path / given / "config.json").touch()  # a checkpoint folder
    assert weights_folder(tmp_path / given) is None


@pytest.mark.parametrize("num_files", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_shards_give_the_same_folder_as_the_consolidated_file(
    run, tmp_path, tokenizer, variant, num_files
):
    wanted = {name: read_mapped(one) for name, one in list_tensors(run(variant)).items()}
    step = write_step(tmp_path / "steps" / "0000000010", *golden(variant), num_files)
    write_step(tmp_path / "steps" / "0000000009", {}, {}, 1)
    for source in (step, step.parent):  # the last step is read
        target = tmp_path / f"from-{source.name}"
        convert(source, target, tokenizer=tokenizer)
        tensors = list_tensors(target)
        assert tensors.keys() == wanted.keys()
        for name, tensor in tensors.items():
            assert torch.equal(read_mapped(tensor), wanted[name])


def test_tables_are_carried_bit_for_bit(run):
    stored, _ = golden("own_gated_wide")
    tensors = list_tensors(run("own_gated_wide"))
    for layer, prefix in ((1, FIRST), (3, SECOND)):
        table = read_mapped(tensors[f"model.layers.{layer}.memory.table"])
        assert torch.equal(table, stored[f"{prefix}values.weight"])


def test_the_tokenizer_and_its_end_token_are_carried(run, tokenizer):
    out = run()
    config = read_config(out)
    assert (config.bos_id, config.eos_ids, config.dtype) == (90, {91}, "float32")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (tokenizer / name).read_bytes()


def test_a_sentencepiece_model_names_its_end_token_itself(run, tokenizer, tmp_path):
    train_sentencepiece(tmp_path, [f"a line of words, number {i}" for i in range(50)])
    shutil.rmtree(tokenizer)
    tokenizer.mkdir()
    (tmp_path / "spm.model").rename(tokenizer / "tokenizer.model")
    config = read_config(run())
    assert (config.bos_id, config.eos_ids) == (1, {2})


def test_a_tokenizer_of_another_model_is_refused(run, tokenizer):
    made = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    made.add_special_tokens([f"<{i}>" for i in range(9)])
    made.save(str(tokenizer / "tokenizer.json"))
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<8>"}))
    with pytest.raises(CheckpointError, match="token 100 is outside the model's vocabulary, 96"):
        run()


def test_weights_and_tables_get_the_dtypes_asked_for(tmp_path, tokenizer):
    write_run(tmp_path / "run", *golden("plain"))
    options = ["--dtype", "bfloat16", "--table-dtype", "float16"]
    command = ["convert", str(tmp_path / "run" / "consolidated"), str(tmp_path / "out"), *options]
    assert main([*command, "--tokenizer", str(tokenizer)]) == 0
    tensors = list_tensors(tmp_path / "out")
    assert {one.dtype for name, one in tensors.items() if name != "memory.table"} == {"BF16"}
    assert tensors["memory.table"].dtype == "F16"


@pytest.mark.parametrize("name", ["output.weight", "output.tied_module.weight"])
def test_a_tied_head_may_be_stored_if_it_is_the_same(run, name):
    stored, _ = golden("plain")
    same = stored["tok_embeddings.weight"]
    out = run("plain", tensors={name: same.clone()})
    assert "lm_head.weight" not in list_tensors(out)


def test_a_run_without_memory_layers(run):
    stored, _ = golden("plain")
    memory = [name for name in stored if name.startswith((FIRST, SECOND))]
    dense = {
        name.replace("layers.0.", f"layers.{layer}."): one
        for name, one in stored.items()
        if name.startswith("layers.0.feed_forward.")
        for layer in (1, 3)
    }
    out = run("plain", remove=memory, tensors=dense, memory={"is_enabled": False})
    assert read_config(out).model.memory is None


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("peer", {"tensors": {f"{SECOND}values_v.weight": torch.zeros(169, 48)}}, "repeats"),
        ("plain", {"tensors": {"output.weight": torch.zeros(96, 48)}}, "repeats"),
        ("plain", {"tensors": {"output.tied_module.weight": torch.zeros(96, 48)}}, "repeats"),
        ("peer", {"tensors": {"output.tied_module.weight": torch.zeros(96, 48)}}, "not part of"),
        ("plain", {"tensors": {f"{FIRST}keys": torch.zeros(12, 78)}}, "subkeys: expected"),
        ("plain", {"tensors": {"a\nb\x1b[": torch.zeros(2)}}, r"a\\nb\\x1b"),
        ("plain", {"remove": ["norm.weight"]}, "model.norm.weight: expected .* found nothing"),
        ("plain", {"remove": ["layers.2.attention_norm.weight"]}, "layers.2.*is missing"),
        ("plain", {"model": {"n_layers": 99}}, "layers.4.attention_norm.weight is missing"),
        ("plain", {"model": {"n_layers": 2**20}}, "n_layers: 1048576 is more than 4096"),
        ("plain", {"tensors": {"layers.1.lora.weight": torch.zeros(2)}}, "lora.weight': is not"),
        ("plain", {"tensors": {"layers.7.attention.wq.weight": torch.zeros(2)}}, "layers.7"),
        ("plain", {"tensors": {f"{FIRST}keys": torch.zeros(77, 12)}}, "subkeys: expected"),
        ("plain", {"tensors": {f"{FIRST}keys": torch.zeros(78, 12).int()}}, "tensor of floats"),
        ("plain", {"tensors": {f"{FIRST}keys": torch.zeros(12, 78).T}}, "tensor of floats"),
        ("plain", {"tensors": {f"{FIRST}keys": [1, 2]}}, "keys': is not a contiguous"),
        ("plain", {"tensors": {f"{FIRST}values.weight": torch.zeros(168, 48)}}, "memory.table: ex"),
        ("plain", {"tensors": {f"{FIRST}values.weight": torch.zeros(169, 47)}}, "memory.table: ex"),
        ("plain", {"tensors": {f"{FIRST}values.weight": torch.zeros(169)}}, "memory.table: ex"),
        ("plain", {"tensors": {"layers.0.attention.wq.weight": torch.tensor(1.0)}}, "q_proj"),
        ("plain", {"model": {"n_heads": 0}}, "n_heads: 0 is not positive"),
        ("plain", {"model": {"n_heads": None, "head_dim": 0}}, "head_dim: 0 is not positive"),
        ("plain", {"model": {"ffn_dim_multiplier": 1e299}}, "ffn_dim_multiplier: 1e.299 is not"),
        ("plain", {"model": {"norm_eps": 10**400}}, "norm_eps: .*out of range"),
        ("plain", {"model": {"ffn_dim_multiplier": 1.5}}, "down_proj.weight: expected .48, 192."),
        ("plain", {"model": {"sliding_window": 8}}, "sliding_window: 8 is not supported"),
        ("plain", {"model": {"surprise": 1}}, "surprise: unknown key"),
        ("plain", {"model": {"n_heads": None, "head_dim": None}}, "n_heads: missing"),
        ("plain", {"model": {"dim": "48"}}, "dim: expected int"),
        ("plain", {"model": {"norm_eps": None}}, "norm_eps: missing"),
        ("plain", {"model": {"multiple_of": 0}}, "multiple_of: no feed-forward"),
        ("plain", {"memory": {"layers": "1,4"}}, "layers: '4' is not one of the 4 layers"),
        ("plain", {"memory": {"mem_heads": None}}, "mem_heads: missing"),
        ("plain", {"memory": {"mem_knn": 99}}, "top_k: 99 exceeds"),
        ("plain", {"memory": {"mem_v_dim": 0}}, "value_dim"),
        ("plain", {"memory": {"mem_hash": True}}, "mem_hash: unknown key"),
    ],
)
def test_what_does_not_fit_is_named(run, variant, changes, message):
    with pytest.raises(CheckpointError, match=message):
        run(variant, **changes)


def test_unknown_widths_of_unused_projections_do_not_matter(run):
    # a PEER layer stores these two, whatever its options, and never uses them
    out = run("peer", tensors={f"{FIRST}value_proj.weight": torch.zeros(3, 3)})
    assert "model.layers.1.memory.value_proj.weight" not in list_tensors(out)


def test_files_that_are_missing_are_named(tmp_path, tokenizer):
    folder = write_run(tmp_path / "run", *golden("plain"))
    with pytest.raises(ConfigError, match="tokenizer: .*run has none"):
        convert(folder, tmp_path / "out")
    with pytest.raises(ConfigError, match="table_dtype: 'int8' .*memplus quantize"):
        convert(folder, tmp_path / "out", table_dtype="int8", tokenizer=tokenizer)
    (tokenizer / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match="eos_token in tokenizer_config.json"):
        convert(folder, tmp_path / "out", tokenizer=tokenizer)
    (folder / "consolidated" / "params.json").unlink()
    with pytest.raises(CheckpointError, match="params.json: No such file"):
        convert(folder, tmp_path / "out", tokenizer=tokenizer)
    assert not (tmp_path / "out").exists()


def test_a_run_is_not_served_but_converted(tmp_path):
    folder = write_run(tmp_path / "run", *golden("plain"))
    for place in (folder, folder / "consolidated"):
        with pytest.raises(ModelNotFoundError, match="training run; .*memplus convert"):
            find_model(str(place), tmp_path)


def test_other_sources_take_no_tokenizer(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match="tokenizer: .* is not a training run's folder"):
        convert(tokenizer, tmp_path / "out", tokenizer=tokenizer)
