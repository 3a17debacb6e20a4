"""Models of sparse-memory-lm: the formulas' logits and rows, exact tables, and refusals.

``tests/golden/sparse_memory_lm*`` has models under the repository's names, and what its formulas
give.
"""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer

from engine.errors import ConfigError
from memory_ops.native import disk_rows
from memory_ops.row_formats import RowRecords, dequantize_rows
from memory_ops.tables.disk import row_cache_bytes
from server.cli.main import main
from tests.server.running import running
from tests.weights.checkpoints.importers.test_lingua import forward
from weights.checkpoints import tensor_files
from weights.checkpoints.checkpoint import load_model
from weights.checkpoints.config_json import read_config
from weights.checkpoints.convert import convert
from weights.checkpoints.hot_rows import HOT_ROWS_FILE
from weights.checkpoints.table_files import stored_layout
from weights.checkpoints.tensor_files import list_tensors, read_mapped
from weights.errors import CheckpointError, ModelNotFoundError
from weights.models.named_models import find_model

GOLDEN = Path(__file__).parents[3] / "golden"
VARIANTS = ["sparse_memory_lm", "sparse_memory_lm_plain"]
TABLES = ["layers.1.ffn.values.weight", "layers.3.ffn.values.weight"]
QUERY, SCALE = "layers.1.ffn.query_proj.weight", "layers.1.ffn.log_score_scale"


def golden(variant: str = VARIANTS[0]) -> tuple[dict[str, torch.Tensor], dict]:
    """A model's tensors, table included, and its settings."""
    tensors = load_file(GOLDEN / variant / "model.safetensors")
    tensors |= {"lm_head.weight": tensors["tok_emb.weight"], TABLES[1]: tensors[TABLES[0]]}
    return tensors, json.loads((GOLDEN / variant / "model_config.json").read_text())


def write_training(folder: Path, tensors: dict, config: dict) -> Path:
    """A training checkpoint: the table is stored once, under each layer's name."""
    folder.mkdir()
    torch.save({"model_config": config, "state_dict": tensors, "step": 7}, folder / "model.pt")
    return folder


def write_published(
    folder: Path,
    tensors: dict,
    config: dict,
    files: dict[str, bytes],
    meta: dict | None = None,
    shape: tuple[int, int] = (256, 48),
) -> Path:
    """A published folder; ``meta`` changes ``meta.json``, and None removes one of its keys."""
    folder.mkdir()
    rest = {"model_config": config, "table_keys": TABLES, "table_shape": list(shape)}
    rest["state_dict"] = {name: one for name, one in tensors.items() if name not in TABLES}
    torch.save(rest, folder / "rest.pt")
    for name, content in files.items():
        (folder / name).write_bytes(content)
    sha = {one.name: hashlib.sha256(one.read_bytes()).hexdigest() for one in folder.iterdir()}
    whole = {"source": "tiny", "rows": shape[0], "dim": shape[1], "sha256": sha} | (meta or {})
    whole = {key: value for key, value in whole.items() if value is not None}
    (folder / "meta.json").write_text(json.dumps(whole))
    return folder


def table_files(variant: str = VARIANTS[0], *names: str) -> dict[str, bytes]:
    """The files of a golden table, all or those of these names."""
    names = names or ("values_q4.bin", "scales_q4.bin", "values_bf16.bin", "hot_rows.npy")
    return {name: (GOLDEN / variant / name).read_bytes() for name in names}


@pytest.fixture
def published(tmp_path, tokenizer):
    """Converts a golden model, published with changes; returns the new folder."""

    def converted(
        variant=VARIANTS[0], *, tensors=None, config=None, files=None, meta=None, **options
    ):
        stored, settings = golden(variant)
        stored = {name: one for name, one in (stored | (tensors or {})).items() if one is not None}
        content = table_files(variant) | (files or {})
        content = {name: one for name, one in content.items() if one is not None}
        write_published(tmp_path / "source", stored, settings | (config or {}), content, meta)
        convert(tmp_path / "source", tmp_path / "out", tokenizer=tokenizer, **options)
        return tmp_path / "out"

    return converted


def check(variant: str, table: str, out: Path) -> None:
    """Assert that logits, and the rows if the file has them, are those of the formulas."""
    expected = load_file(GOLDEN / variant / "expected.safetensors")
    with torch.inference_mode():
        found = forward(out, expected["ids"])
    logits = expected[f"logits_{table}_table"]
    torch.testing.assert_close(found.logits_LV.double(), logits, rtol=1e-4, atol=1e-4)
    rows = expected.get(f"rows_{table}_table")
    if rows is None:
        return
    for trace, rows_THK in zip(found.memory.values(), rows, strict=True):
        assert torch.equal(trace.rows_THK.sort(-1).values, rows_THK.sort(-1).values)


@pytest.mark.parametrize(("table", "table_dtype"), [("q4", None), ("bf16", "bfloat16")])
@pytest.mark.parametrize("variant", VARIANTS)
def test_published_models_have_the_logits_and_rows_of_the_formulas(
    published, variant, table, table_dtype
):
    check(variant, table, published(variant, table_dtype=table_dtype))


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_checkpoints_have_the_logits_of_the_formulas(tmp_path, tokenizer, variant):
    tensors, config = golden(variant)
    convert(
        write_training(tmp_path / "run", tensors, config), tmp_path / "out", tokenizer=tokenizer
    )
    check(variant, "fp32", tmp_path / "out")
    table = read_mapped(list_tensors(tmp_path / "out")["memory.table"])
    assert torch.equal(table, tensors[TABLES[0]])


@pytest.mark.parametrize("part_bytes", [24 * 10, 2**22])
def test_the_values_of_4_bit_codes_are_exact(published, monkeypatch, part_bytes):
    monkeypatch.setattr(tensor_files, "PART_BYTES", part_bytes)
    stored = list_tensors(published())["memory.table"]
    layout = stored_layout(stored)
    assert layout.name == "int4_row" and stored.shape == (256, 128)
    found = dequantize_rows(RowRecords(read_mapped(stored), "int4_row", 48))
    files = table_files()
    packed = torch.frombuffer(bytearray(files["values_q4.bin"]), dtype=torch.uint8).view(256, 24)
    scale = torch.frombuffer(bytearray(files["scales_q4.bin"]), dtype=torch.float16)
    for row in range(256):
        for column in range(48):
            byte = int(packed[row, column % 24])
            code = byte & 15 if column < 24 else byte >> 4
            assert found[row, column] == (code - 8) * scale[row].float()


@pytest.mark.parametrize(
    ("options", "files", "code"),
    [
        ({}, {}, "int4_row"),
        ({"dtype": "float16"}, {}, "int4_row"),
        ({"table_dtype": "int4_row"}, {}, "int4_row"),
        ({"table_dtype": "bfloat16"}, {}, "bfloat16"),
        ({"table_dtype": "int8"}, {}, "int8"),
        ({}, {"values_q4.bin": None, "scales_q4.bin": None}, "bfloat16"),
        ({"dtype": "float16"}, {"values_q4.bin": None}, "float16"),
        ({"table_dtype": "int4_row"}, {"values_q4.bin": None}, "int4_row"),
        ({}, {"values_bf16.bin": None}, "int4_row"),
    ],
)
def test_the_table_is_made_of_the_codes_or_of_the_bf16_values(published, options, files, code):
    tensors = list_tensors(published(files=files, **options))
    assert stored_layout(tensors["memory.table"]).name == code
    dense = "F16" if options.get("dtype") else "F32"
    assert {one.dtype for name, one in tensors.items() if name != "memory.table"} == {dense}
    if code == "bfloat16":
        table = read_mapped(tensors["memory.table"]).view(torch.uint8)
        assert bytes(table.numpy()) == table_files()["values_bf16.bin"]


@pytest.mark.skipif(not disk_rows.is_available(), reason="built without a compiler")
def test_the_rows_that_are_read_most_begin_the_cache(published):
    out = published()
    listed = np.load(GOLDEN / VARIANTS[0] / "hot_rows.npy")
    model, _ = load_model(out, table_cache=row_cache_bytes(40, 128, 256))
    table = model.tables["memory.table"]
    rows = torch.from_numpy(listed[:50]).view(1, 1, 50)
    table.start(rows[..., :40], torch.ones(1, 1, 40)).finish()
    assert (table.statistics()[0].hits, table.statistics()[0].misses) == (40, 0)
    table.start(rows[..., 40:], torch.ones(1, 1, 10)).finish()
    assert table.statistics()[0].misses == 10


def test_a_list_of_hot_rows_is_not_needed(published):
    out = published(files={"hot_rows.npy": None})
    assert not (out / HOT_ROWS_FILE).exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.array([1, 256]), r"row 256 is outside \[0, 256\)"),
        (np.array([-1]), r"row -1 is outside \[0, 256\)"),
        (np.array([1], dtype=np.int32), "is not one list of int64 row ids"),
        (np.array([[1]]), "is not one list of int64 row ids"),
        (np.array([{}]), "[Pp]ickle"),
        (np.zeros(1000, dtype=np.int64), r"hot_rows.npy: has \d+ bytes, more than"),
        (b"", "hot_rows.npy: "),
        (b"\x93NUMPY\x01\x00v\x00{" + b"(" * 117, "hot_rows.npy: "),
    ],
)
def test_lists_of_hot_rows_that_do_not_fit_are_refused(published, tmp_path, rows, message):
    content = io.BytesIO(rows if isinstance(rows, bytes) else b"")
    if not isinstance(rows, bytes):
        np.save(content, rows, allow_pickle=True)
    with pytest.raises(CheckpointError, match=rf"hot_rows.npy: .*{message}|{message}"):
        published(files={"hot_rows.npy": content.getvalue()})
    assert not (tmp_path / "out").exists()


def test_a_table_of_codes_alone_is_not_rounded_again(published):
    with pytest.raises(ConfigError, match=r"table_dtype: .* int4_row rows only; values_bf16.bin"):
        published(files={"values_bf16.bin": None}, table_dtype="bfloat16")


def test_the_command_converts_a_folder(tmp_path, tokenizer):
    folder = write_training(tmp_path / "run", *golden())
    options = ["--tokenizer", str(tokenizer), "--dtype", "bfloat16", "--table-dtype", "int4_row"]
    assert main(["convert", str(folder), str(tmp_path / "out"), *options]) == 0
    config = read_config(tmp_path / "out")
    assert (config.bos_id, config.eos_ids, config.dtype) == (90, {91}, "bfloat16")
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_the_end_token_of_gpt_2_needs_no_name(published, tokenizer):
    made = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    made.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    made.save(str(tokenizer / "tokenizer.json"))
    (tokenizer / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    config = read_config(published())
    assert (config.bos_id, config.eos_ids) == (None, {92})


def test_a_model_without_memory_layers(tmp_path, tokenizer):
    tensors, config = golden()
    kept = {name: one for name, one in tensors.items() if not name.startswith("layers.1.ffn.")}
    kept = {name: one for name, one in kept.items() if not name.startswith("layers.3.ffn.")}
    for layer in (1, 3):
        for name in ("ffn.w13.weight", "ffn.w2.weight"):
            kept[f"layers.{layer}.{name}"] = tensors[f"layers.0.{name}"]
    folder = write_training(tmp_path / "run", kept, config | {"mem_layers": []})
    with pytest.raises(ConfigError, match=r"table_dtype: .* has no tables"):
        convert(folder, tmp_path / "out", table_dtype="int8", tokenizer=tokenizer)
    convert(folder, tmp_path / "out", tokenizer=tokenizer)
    assert read_config(tmp_path / "out").model.memory is None


def test_values_of_a_width_of_their_own_are_projected(tmp_path, tokenizer):
    tensors, config = golden(VARIANTS[1])
    for layer, name in ((1, TABLES[0]), (3, TABLES[1])):
        tensors[name] = torch.ones(256, 20)
        tensors[f"layers.{layer}.ffn.value_proj.weight"] = torch.ones(48, 20)
        tensors[f"layers.{layer}.ffn.value_proj.bias"] = torch.ones(48)
    folder = write_training(tmp_path / "run", tensors, config | {"mem_v_dim": 20})
    convert(folder, tmp_path / "out", tokenizer=tokenizer)
    memory = read_config(tmp_path / "out").model.memory
    assert memory is not None and (memory.value_dim, memory.value_projection) == (20, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {"surprise": 1}}, "model_config: surprise: unknown key; it may change"),
        ({"config": {"mem_n_keys": -16}}, "num_subkeys: must be"),
        ({"config": {"mem_n_keys": 2**20}}, "num_subkeys: 1048576 is more than"),
        ({"config": {"mem_n_keys": 17}}, r"rows, dim: \(256, 48\) is not \(289, 48\)"),
        ({"config": {"mem_v_dim": 0}}, "value_dim"),
        ({"config": {"d_model": -48}}, "n_heads: 6 does not divide d_model -48"),
        ({"config": {"n_heads": 0}}, "n_heads: 0 does not divide d_model 48"),
        ({"config": {"n_heads": 5}}, "n_heads: 5 does not divide d_model 48"),
        ({"config": {"n_layers": 2**20}}, "n_layers: 1048576 is more than 4096"),
        ({"config": {"n_layers": 4096}}, "layers.4.attn_norm.weight is missing"),
        ({"config": {"n_layers": "4"}}, "n_layers: expected int"),
        ({"config": {"mem_layers": [1, 4]}}, "mem_layers: 4 is not one of the 4 layers"),
        ({"config": {"mem_layers": [True]}}, "mem_layers: True is not one"),
        ({"config": {"mem_query_norm": "rms"}}, "mem_query_norm: 'rms' is neither none nor batch"),
        ({"config": {"mem_score_scale": "x"}}, "mem_score_scale: 'x' is neither none nor learned"),
        ({"config": {"mem_share_values": False}}, "mem_share_values: false is not supported"),
        ({"config": {"mem_query_norm": "none"}}, "query_norm.* is not part of this model"),
        ({"config": {"mem_score_scale": "none"}}, "log_score_scale': is not part of this model"),
        ({"config": {"mem_swilu": False}}, "swilu_proj.* is not part of this model"),
        ({"tensors": {SCALE: None}}, f"tensor {SCALE} is missing"),
        ({"tensors": {SCALE: torch.zeros(3)}}, r"log_score_scale: expected \(4,\), found \(3,\)"),
        ({"tensors": {SCALE: torch.full((4,), 1e3)}}, f"{QUERY}: is not finite with its norm"),
        ({"tensors": {QUERY: torch.zeros(95, 48)}}, r"query_proj.weight: expected \(96, 48\)"),
        ({"tensors": {QUERY: torch.zeros(96, 48).int()}}, "is not a contiguous tensor of floats"),
        ({"tensors": {"layers.0.attn.wqkv.weight": torch.zeros(143, 48)}}, "no 3 equal parts"),
        ({"tensors": {"layers.0.attn.wqkv.weight": torch.tensor(1.0)}}, "no 3 equal parts"),
        ({"tensors": {"layers.0.attn.wqkv.weight": torch.zeros(141, 48)}}, "k_proj.weight: exp"),
        ({"tensors": {"layers.1.ffn.keys": torch.zeros(4, 2, 15, 12)}}, "subkeys: expected"),
        ({"tensors": {"lm_head.weight": torch.zeros(96, 48)}}, "differs from tok_emb.weight"),
        ({"tensors": {"a\nb\x1b[": torch.zeros(2)}}, r"a\\nb\\x1b"),
        ({"files": {"values_q4.bin": b"x" * 6143}}, "has 6143 bytes, but .256, 24. values take"),
        ({"files": {"values_q4.bin": b"x" * 6145}}, "has 6145 bytes"),
        ({"files": {"scales_q4.bin": b"x" * 511}}, "has 511 bytes, but .256. values take 512"),
        ({"files": {"scales_q4.bin": b"\x00\x7c" * 256}}, "scales_q4.bin: has a scale that is not"),
        ({"files": {"scales_q4.bin": None}}, "scales_q4.bin: No such file"),
        ({"files": {"values_q4.bin": None, "values_bf16.bin": None}}, "has neither values_q4.bin"),
        ({"meta": {"rows": None}}, r"rows, dim: \(None, 48\) is not \(256, 48\)"),
        ({"meta": {"dim": -48}}, r"rows, dim: \(256, -48\) is not \(256, 48\)"),
        ({"meta": {"rows": "9" * 999}}, "rows, dim: "),
        ({"meta": {"sha256": None}}, "meta.json: sha256: missing"),
        ({"meta": {"sha256": {}}}, "sha256: has no valid entry for rest.pt"),
        ({"meta": {"sha256": {"rest.pt": "0" * 64}}}, r"rest.pt: does not match its SHA-256"),
        ({"meta": {"sha256": {"rest.pt": 7}}}, "sha256: has no valid entry for rest.pt"),
    ],
)
def test_what_does_not_fit_is_named(published, tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        published(**changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "table_dtype"),
    [("values_q4.bin", None), ("scales_q4.bin", None), ("values_bf16.bin", "bfloat16")],
)
def test_damaged_files_leave_no_folder(tmp_path, tokenizer, name, table_dtype):
    folder = write_published(tmp_path / "source", *golden(), table_files())
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name}: .* do not match its checksum"):
        convert(folder, tmp_path / "out", table_dtype=table_dtype, tokenizer=tokenizer)
    assert not (tmp_path / "out").exists()


def test_layers_that_store_other_tables_are_refused(tmp_path, tokenizer):
    tensors, config = golden()
    tensors[TABLES[1]] = tensors[TABLES[0]].clone()
    same = write_training(tmp_path / "same", tensors, config)
    convert(same, tmp_path / "out", tokenizer=tokenizer)
    tensors[TABLES[1]][255, 47] += 1
    other = write_training(tmp_path / "other", tensors, config)
    with pytest.raises(CheckpointError, match=rf"{TABLES[1]}: differs from {TABLES[0]}"):
        convert(other, tmp_path / "none", tokenizer=tokenizer)


def test_files_that_are_no_such_model_are_named(tmp_path, tokenizer):
    (tmp_path / "list").mkdir()
    torch.save([1, 2], tmp_path / "list" / "model.pt")
    with pytest.raises(CheckpointError, match="has no dictionary named model_config"):
        convert(tmp_path / "list", tmp_path / "out", tokenizer=tokenizer)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "model.pt").write_text("text")
    with pytest.raises(CheckpointError, match="is not a zip file"):
        convert(tmp_path / "text", tmp_path / "out", tokenizer=tokenizer)
    lacking = write_published(tmp_path / "lacking", *golden(), table_files())
    (lacking / "meta.json").unlink()
    with pytest.raises(CheckpointError, match="meta.json: No such file"):
        convert(lacking, tmp_path / "out", tokenizer=tokenizer)
    folder = write_training(tmp_path / "run", [], golden()[1])
    with pytest.raises(CheckpointError, match="has no dictionary named state_dict"):
        convert(folder, tmp_path / "out", tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="tokenizer: .*run has none"):
        convert(folder, tmp_path / "out")


def test_a_folder_is_not_served_but_converted(tmp_path):
    training = write_training(tmp_path / "run", *golden())
    published = write_published(tmp_path / "published", *golden(), table_files())
    for folder in (training, published):
        with pytest.raises(ModelNotFoundError, match="memplus convert"):
            find_model(str(folder), tmp_path)


@pytest.mark.slow
def test_a_converted_model_is_served_from_disk(published):
    options = "--table-tier", "disk", "--table-cache", "1MiB", "--device", "cpu"
    with running(published(), *options) as server:
        body = {"prompt": '!"#$%', "max_tokens": 5, "temperature": 0, "ignore_eos": True}
        answer = server.complete(**body).json()
    assert answer["usage"]["completion_tokens"] == 5
