"""Loading of tables: conversion, checksums, and no second copy in memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import tqdm

from engine.errors import ConfigError
from memory_ops.row_formats import ROW_FORMATS, RowRecords
from memory_ops.tables.disk import DiskTable
from server.cli.main import main
from tests.models import (
    feed_forward_changes,
    model_tensors,
    random_model,
    random_weights,
    save_model,
    save_with_sparse_tables,
    tiny_config,
)
from weights.checkpoints import table_loading, tensor_files
from weights.checkpoints.checkpoint import load_model
from weights.checkpoints.convert import convert
from weights.checkpoints.dtype_names import TABLE_DTYPES
from weights.checkpoints.table_files import OUTPUT_DTYPES, requested_layout
from weights.checkpoints.table_loading import rows_in_memory, rows_on_device
from weights.checkpoints.tensor_files import StoredTensor, list_file, list_tensors, read_parts
from weights.errors import CheckpointError

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
ROWS, WIDTH = 512**2, 192
TABLE_BYTES = ROWS * WIDTH * 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with two fp32 tables."""
    changes = feed_forward_changes("peer", "dense")
    return save_model(random_model(tiny_config(**changes)), tmp_path / "model")


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read tables of 64 rows in parts of 7 rows."""
    monkeypatch.setattr(tensor_files, "PART_BYTES", 7 * 32 * 4)


def tables_of(model) -> dict[str, torch.Tensor | RowRecords]:
    tensors = model_tensors(model)
    return {name: tensors[name] for name in model.config.table_names}


def stored_bytes(rows: torch.Tensor | RowRecords) -> torch.Tensor:
    return rows.records_RB if isinstance(rows, RowRecords) else rows.view(torch.uint8)


def damage(folder: Path) -> str:
    """Change one byte of a table; return the name of its file."""
    file = sorted(folder.glob("table-*"))[1]
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)
    return file.name


def test_every_dtype_has_a_name():
    assert sorted(TABLE_DTYPES) == sorted((*OUTPUT_DTYPES, *ROW_FORMATS))


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("dtype", TABLE_DTYPES)
def test_conversion_at_load_equals_that_of_the_command_bit_for_bit(folder, tmp_path, dtype):
    loaded = tables_of(load_model(folder, table_dtype=dtype)[0])
    target = tmp_path / "quantized"
    assert main(["quantize", str(folder), str(target), "--table-dtype", dtype]) == 0
    wanted = tables_of(load_model(target)[0])
    assert loaded.keys() == wanted.keys() and len(loaded) == 2
    for name, rows in wanted.items():
        assert type(loaded[name]) is type(rows)
        assert torch.equal(stored_bytes(loaded[name]), stored_bytes(rows))
        if isinstance(rows, RowRecords):
            assert loaded[name].row_format == rows.row_format == dtype
        else:
            assert loaded[name].dtype == rows.dtype == OUTPUT_DTYPES[dtype]
    # all other tensors are unchanged
    before, after = list_tensors(folder), list_tensors(target)
    dense = set(before) - set(loaded)
    assert dense == set(after) - set(loaded)
    assert all(before[name].dtype == after[name].dtype == "F32" for name in dense)


def test_quantize_takes_a_known_name(tmp_path, capsys):
    target = tmp_path / "small"
    assert main(["quantize", "wordnet", str(target), "--table-dtype", "int8"]) == 0
    (table,) = (one for one in list_tensors(target).values() if one.name == "memory.table")
    assert (table.dtype, table.metadata["row_format"]) == ("U8", "int8")
    assert main(["quantize", "wordnet", str(target), "--table-dtype", "int8"]) == 2
    assert "exists already" in capsys.readouterr().err


def test_converting_rows_on_disk_is_refused_with_the_command_to_use(folder, tmp_path):
    with pytest.raises(ConfigError, match=rf"memplus quantize {folder} DST --table-dtype int8"):
        load_model(folder, table_cache=2**20, table_dtype="int8")
    loaded, _ = load_model(folder, table_cache=2**20, table_dtype="float32")
    assert isinstance(loaded.model.layers[0].memory.table, DiskTable)
    convert(folder, tmp_path / "narrow", table_dtype="int4")
    loaded, _ = load_model(tmp_path / "narrow", table_cache=2**20, table_dtype="int4")
    assert isinstance(loaded.model.layers[0].memory.table, DiskTable)


def test_unsupported_conversions_are_refused_by_name(folder, tmp_path):
    with pytest.raises(ConfigError, match="table_dtype: 'int3' is not one of"):
        load_model(folder, table_dtype="int3")
    convert(folder, tmp_path / "narrow", table_dtype="int4")
    with pytest.raises(ConfigError, match=r"table_dtype: .*table-00000.* has int4 rows already"):
        load_model(tmp_path / "narrow", table_dtype="float32")
    dense = save_model(random_model(tiny_config()), tmp_path / "dense")
    with pytest.raises(ConfigError, match="table_dtype: requires value tables"):
        load_model(dense, table_dtype="int8")
    with pytest.raises(ConfigError, match="verify_tables: requires value tables"):
        load_model(dense, verify_tables=True)


@pytest.mark.usefixtures("small_parts")
def test_a_row_that_cannot_be_rounded_is_named_at_load(tmp_path):
    model = random_model(tiny_config(**feed_forward_changes("memory_plus", "dense")))
    model.model.layers[0].memory.table.rows[10, 3] = torch.inf
    folder = save_model(model, tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"memory.table, rows from 7: .*row 3 has values"):
        load_model(folder, table_dtype="fp8")


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("dtype", TABLE_DTYPES)
@pytest.mark.parametrize("source", TABLE_DTYPES)
def test_rows_streamed_to_a_device_equal_those_in_memory(folder, tmp_path, source, dtype):
    convert(folder, tmp_path / "copy", table_dtype=source)
    tables = [one for name, one in list_tensors(tmp_path / "copy").items() if "table" in name]
    if source in ROW_FORMATS and dtype != source:
        return
    for one in tables:
        layout, read = requested_layout(one, dtype), []
        held = rows_in_memory(one, layout, "device", lambda number: None, verify=True)
        streamed = rows_on_device(one, layout, CPU, read.append, verify=True)
        assert streamed.dtype is held.dtype is layout.dtype
        assert torch.equal(stored_bytes(streamed), stored_bytes(held))
        assert sum(read) == one.num_bytes and len(read) > 1


def test_a_damaged_table_is_not_streamed(folder):
    damage(folder)
    with pytest.raises(CheckpointError, match="its checksum"):
        for name, stored in list_tensors(folder).items():
            if "table" in name:
                layout = requested_layout(stored, None)
                rows_on_device(stored, layout, CPU, lambda number: None, verify=True)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("cache", [None, 2**20], ids=["device", "disk"])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_checksums_detect_changed_data(folder, tmp_path, cache, dtype):
    target = tmp_path / "copy"
    convert(folder, target, table_dtype=dtype)
    wanted = tables_of(load_model(target)[0])
    loaded, _ = load_model(target, table_cache=cache, verify_tables=True)
    if cache is None:
        found = tables_of(loaded)
        assert all(torch.equal(stored_bytes(found[n]), stored_bytes(wanted[n])) for n in wanted)
    name = damage(target)
    load_model(target, table_cache=cache)
    with pytest.raises(CheckpointError, match=rf"{name}: tensor memory.* its checksum"):
        load_model(target, table_cache=cache, verify_tables=True)


def test_data_are_checked_while_they_are_converted(folder):
    load_model(folder, table_dtype="bfloat16", verify_tables=True)
    damage(folder)
    with pytest.raises(CheckpointError, match="its checksum"):
        load_model(folder, table_dtype="bfloat16", verify_tables=True)


@pytest.mark.parametrize("arguments", [["convert"], ["quantize", "--table-dtype", "int8"]])
def test_a_damaged_table_gets_no_new_checksum(folder, tmp_path, arguments, capsys):
    verb, *options = arguments
    name, target = damage(folder), tmp_path / "copy"
    assert main([verb, str(folder), str(target), *options]) == 2
    message = capsys.readouterr().err
    assert f"{name}: tensor memory" in message and "its checksum" in message
    assert not target.exists()


@pytest.mark.parametrize("offset", [4096, 5000])
def test_read_pages_are_dropped_from_the_page_cache(tmp_path, monkeypatch, offset):
    monkeypatch.setattr(tensor_files, "PART_BYTES", 10_000)
    file, given_up = tmp_path / "rows", []
    file.write_bytes(bytes(offset + 100 * 400))

    def noted(descriptor, start, length, advice):
        assert advice == os.POSIX_FADV_DONTNEED
        # only whole pages, and none that is still to be read
        assert os.lseek(descriptor, 0, os.SEEK_CUR) == start + length
        given_up.extend(range(-(-start // 4096), (start + length) // 4096))

    monkeypatch.setattr(tensor_files.os, "posix_fadvise", noted)
    monkeypatch.setattr(tensor_files.mmap, "PAGESIZE", 4096)
    stored = StoredTensor("rows", file, "F32", (100, 100), offset, 100 * 400)
    for target in (None, torch.empty(100, 100)):
        given_up.clear()
        assert len(list(read_parts(stored, target))) == 4
        assert given_up == list(range(1, (offset + 100 * 400) // 4096))


@pytest.mark.parametrize("cache", [None, 2**20], ids=["device", "disk"])
def test_a_table_without_a_checksum_loads_but_is_not_verified(folder, tmp_path, cache):
    for file in folder.glob("table-*"):
        (table,) = list_file(file)
        start = table.offset
        content = file.read_bytes()
        header = json.loads(content[8:start])
        del header["__metadata__"][f"sha256:{table.name}"]
        text = json.dumps(header).encode()
        file.write_bytes(content[:8] + text + b" " * (start - 8 - len(text)) + content[start:])
    load_model(folder, table_cache=cache)
    named = r"table-00000\.safetensors: tensor memory.* has no checksum"
    with pytest.raises(CheckpointError, match=named):
        load_model(folder, table_cache=cache, verify_tables=True)
    convert(folder, tmp_path / "copy")
    load_model(tmp_path / "copy", table_cache=cache, verify_tables=True)


def test_the_command_verifies_checksums(folder, capsys):
    arguments = ["generate", "x", "--model", str(folder), "--max-tokens", "1", "--verify-tables"]
    assert main(arguments) == 0
    name = damage(folder)
    assert main(arguments) == 2
    assert name in capsys.readouterr().err


@pytest.mark.parametrize(("least", "num_bars"), [(2**30, 0), (1000, 2)])
def test_only_large_tables_get_a_progress_bar(folder, monkeypatch, least, num_bars):
    bars, byte_counts = [], []

    class Bar(tqdm.tqdm):
        def __init__(self, **arguments):
            bars.append(arguments)
            super().__init__(**arguments)

        def update(self, count):
            byte_counts.append(count)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    monkeypatch.setattr(table_loading, "_MIN_PROGRESS_BYTES", least)
    load_model(folder, table_dtype="int8")
    load_model(folder, table_cache=2**20, verify_tables=True)
    # with None, tqdm itself checks for a terminal
    total = 2 * 64 * 32 * 4
    assert [(bar["total"], bar["disable"]) for bar in bars] == [(total, None)] * num_bars
    assert sum(byte_counts) == total * num_bars


def sparse_model(folder: Path) -> Path:
    """A model with a table of 192 MiB of zeros in a sparse file."""
    memory = {"num_heads": 1, "num_subkeys": 512, "top_k": 2, "query_dim": 8, "value_dim": WIDTH}
    config = tiny_config(**feed_forward_changes("memory_plus", **memory))
    return save_with_sparse_tables(random_weights(config), folder)


PEAK = """
import sys
from pathlib import Path
import torch
from weights.checkpoints.checkpoint import load_model
from weights.checkpoints.convert import convert
from weights.checkpoints.table_files import requested_layout
from weights.checkpoints.table_loading import rows_on_device
from weights.checkpoints.tensor_files import list_tensors
def peak(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024
small, large, verb, dtype, target = sys.argv[1:]
def work(folder, target):
    if verb == "convert":
        convert(folder, target, table_dtype=dtype)
    elif verb == "stream":
        for name, one in list_tensors(folder).items():
            if name == "memory.table":
                layout = requested_layout(one, dtype)
                return rows_on_device(one, layout, torch.device("cpu"), str, verify=False)
    else:
        return load_model(folder, table_dtype=dtype)
work(Path(small), Path(target) / "small")
before = peak("VmRSS")
kept = work(Path(large), Path(target) / "large")
print(peak("VmHWM") - before)
"""


@pytest.mark.parametrize(
    ("verb", "dtype", "held"),
    [
        ("load", "auto", TABLE_BYTES),
        pytest.param("load", "bfloat16", TABLE_BYTES // 2, marks=pytest.mark.slow),
        pytest.param("load", "int8", TABLE_BYTES // 4 + 64 * ROWS, marks=pytest.mark.slow),
        pytest.param("stream", "float32", TABLE_BYTES, marks=pytest.mark.slow),
        ("stream", "int8", TABLE_BYTES // 4 + 64 * ROWS),
        ("convert", "bfloat16", 0),
    ],
)
def test_a_table_is_never_twice_in_memory(folder, tmp_path, verb, dtype, held):
    large = sparse_model(tmp_path / "large")
    (tmp_path / "out").mkdir()
    arguments = [str(folder), str(large), verb, dtype, str(tmp_path / "out")]
    result = subprocess.run(
        [sys.executable, "-c", PEAK, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    grown = int(result.stdout)
    # a second copy would add at least 64 MiB (int8 rows) or 192 MiB (rows of the file)
    assert held * 0.9 < grown < held + 60 * 2**20
