"""Table files and grouped weights whose headers lie: refused in one line, with nothing loaded."""

import contextlib
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ConfigError
from tests.models import feed_forward_changes, random_model, save_model, tiny_config
from tests.weights.checkpoints.refusals import refusal
from weights.checkpoints import checkpoint, placed_tables
from weights.checkpoints.checkpoint import load_model
from weights.checkpoints.convert import convert
from weights.errors import CheckpointError

TABLE = "memory.table"
KINDS = ("int8", "int4", "int4_row", "float32")


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config(**feed_forward_changes("dense", "memory_plus")))


@pytest.fixture(scope="module", params=KINDS)
def folder(request, model, tmp_path_factory):
    """A model with a table of rows of each kind, whose weights are in groups if rows are."""
    folder = tmp_path_factory.mktemp("models")
    plain = save_model(model, folder / "plain")
    if request.param == "float32":
        return plain
    groups = request.param.removesuffix("_row")
    rounded = {"table_dtype": request.param, "weight_dtype": groups}
    convert(plain, folder / request.param, **rounded)
    return folder / request.param


@pytest.fixture
def table(folder):
    """The table's file, whose content is put back after the test."""
    (file,) = folder.glob("table-*")
    with put_back(file):
        yield file


@contextlib.contextmanager
def put_back(file):
    """Write a file's content back at the end of a block."""
    content = file.read_bytes()
    try:
        yield
    finally:
        file.write_bytes(content)


def header_of(file):
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write(file, header, data):
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def loads_nothing(monkeypatch):
    """Fail if a model is built or a table is read."""

    def refused(*arguments, **options):
        raise AssertionError("loaded")

    monkeypatch.setattr(checkpoint, "_read_model", refused)
    monkeypatch.setattr(placed_tables, "load_tables", refused)
    monkeypatch.setattr(placed_tables, "open_tables", refused)


@pytest.mark.parametrize("cache", [None, 2**20])
@pytest.mark.parametrize("change", [-4096, -1, 1, 4096, 2**40])
def test_a_length_that_lies_is_refused(table, change, cache, monkeypatch):
    loads_nothing(monkeypatch)
    os.truncate(table, table.stat().st_size + change)  # sparse
    assert f"{table}: is truncated" in refusal(load_model, table.parent, "auto", cache)


@pytest.mark.parametrize("factor", [0, 0.5, 2, 2**20])
def test_another_number_of_rows_is_refused(table, factor, monkeypatch):
    loads_nothing(monkeypatch)
    header, data = header_of(table)
    entry = header[TABLE]
    entry["shape"][0] = int(entry["shape"][0] * factor)
    entry["data_offsets"][1] = int(entry["data_offsets"][1] * factor)
    write(table, header, b"")
    os.truncate(table, table.stat().st_size + int(len(data) * factor))
    assert f"{table}: tensor {TABLE} has shape" in refusal(load_model, table.parent)


@pytest.mark.parametrize("cache", [None, 2**20])
def test_a_file_that_is_shortened_after_it_was_opened_is_named(folder, table, cache, monkeypatch):
    opened = checkpoint.open_checkpoint

    def shortened(folder):
        found = opened(folder)
        os.truncate(table, table.stat().st_size - 1)
        return found

    monkeypatch.setattr(checkpoint, "open_checkpoint", shortened)
    assert str(table) in refusal(load_model, folder, "auto", cache)


def test_a_checksum_of_another_form_is_refused(folder, table):
    header, data = header_of(table)
    for checksum in ("", "0", "x\ny", "f" * 64, "f" * 100_000):
        header["__metadata__"][f"sha256:{TABLE}"] = checksum
        write(table, header, data)
        with pytest.raises(CheckpointError, match="do not match its checksum") as caught:
            load_model(folder, verify_tables=True)
        assert str(caught.value).isprintable()


DTYPES = [*("F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3")]
METADATA = st.sampled_from(["int8", "int4", "fp8", "24", "32", "0", "", "9" * 99, "\n"])


@st.composite
def changes(draw, header):
    """A header with some entries renamed, reshaped, retyped, exchanged or removed."""
    changed = json.loads(json.dumps(header))
    names = [name for name in changed if name != "__metadata__"]
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(names))
        entry = changed.get(name)
        if entry is None:
            continue
        kind = draw(st.sampled_from(["name", "shape", "dtype", "swap", "metadata", "offsets"]))
        if kind == "name":
            suffix = draw(st.sampled_from(["", "_scales", "_minimums", "x"]))
            changed[name.removesuffix("_scales") + suffix] = changed.pop(name)
        elif kind == "shape":
            shape = [*entry["shape"]]
            moved = draw(st.permutations(shape))
            entry["shape"] = draw(
                st.sampled_from([moved, [*shape, 1], [1, *shape], shape[1:], [], [0, *shape]])
            )
        elif kind == "dtype":
            entry["dtype"] = draw(st.sampled_from(DTYPES))
        elif kind == "swap":
            other = changed.get(draw(st.sampled_from(names)), entry)
            key = draw(st.sampled_from(["shape", "dtype", "data_offsets"]))
            entry[key], other[key] = other[key], entry[key]
        elif kind == "offsets":
            entry["data_offsets"] = draw(st.lists(st.integers(-1, 2**40), max_size=3))
        else:
            metadata = changed.setdefault("__metadata__", {})
            metadata[draw(st.sampled_from(["row_format", "value_dim", "origin"]))] = draw(METADATA)
    return changed


@pytest.mark.parametrize("name", ["table-00000.safetensors", "model.safetensors"])
@given(data=st.data())
def test_a_changed_header_is_refused_or_loads(folder, name, data):
    file = folder / name
    with put_back(file):
        header, content = header_of(file)
        write(file, data.draw(changes(header)), content)
        try:
            loaded, _ = load_model(folder)
        except (CheckpointError, ConfigError) as error:
            assert str(error).isprintable()
        else:
            assert loaded.tables.keys() == {TABLE}
