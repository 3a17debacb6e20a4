"""Safetensors files and their index: hostile ones are refused in one line, and nothing is read."""

import json
import os
import shutil
import tracemalloc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.models import random_model, save_model, tiny_config
from tests.weights.checkpoints.refusals import refusal
from weights.checkpoints.checkpoint import load_model, open_checkpoint
from weights.checkpoints.tensor_files import list_file, list_tensors
from weights.errors import CheckpointError

A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
NORM = "model.norm.weight"
INDEX = "model.safetensors.index.json"
SHARDS = ("model-1.safetensors", "model-2.safetensors")
MIB = 2**20


def write(file, header, data=bytes(24), length=None):
    """A safetensors file whose header may be anything; ``length`` is the one that it claims."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(content) if length is None else length
    file.write_bytes(length.to_bytes(8, "little") + content + data)
    return file


def test_a_written_file_is_listed(tmp_path):
    (found,) = list_file(write(tmp_path / "a.safetensors", {"a": A}))
    assert (found.name, found.dtype, found.shape, found.num_bytes) == ("a", "F32", (2, 3), 24)


@pytest.mark.parametrize(
    "header",
    [
        pytest.param({"a": A | change}, id=str(change))
        for change in [
            {"shape": [-2, -3]},
            {"shape": [-2, 3], "data_offsets": [24, 0]},
            {"shape": [2, 4]},
            {"shape": [2.0, 3]},
            {"shape": [True, 6]},
            {"shape": ["2", 3]},
            {"shape": 6},
            {"shape": [2**32, 2**32, 2**32]},
            {"shape": [2**62, 4], "data_offsets": [0, 0]},
            {"shape": [2**63, 2, 0]},
            {"shape": [2**64 + 6]},
            {"data_offsets": [-24, 0]},
            {"data_offsets": [24, 0]},
            {"data_offsets": [8, 32]},
            {"data_offsets": [0, 2**63]},
            {"data_offsets": [0, 2**64 + 24]},
            {"data_offsets": [0]},
            {"data_offsets": [0, 24, 24]},
            {"dtype": "X9"},
            {"dtype": 32},
            {"dtype": None},
        ]
    ],
)
def test_sizes_that_lie_are_refused(tmp_path, header):
    assert "a.safetensors" in refusal(list_file, write(tmp_path / "a.safetensors", header))


B = A | {"data_offsets": [24, 48]}


@pytest.mark.parametrize(
    ("header", "size"),
    [
        pytest.param({"a": A, "b": A}, 24, id="the same bytes twice"),
        pytest.param({"a": A, "b": A | {"data_offsets": [12, 36]}}, 36, id="overlap"),
        pytest.param({"a": A, "b": A | {"data_offsets": [32, 56]}}, 56, id="gap"),
        pytest.param({"a": A, "b": B}, 47, id="too short"),
        pytest.param({"a": A, "b": B}, 49, id="too long"),
        pytest.param({}, 24, id="no tensors"),
        pytest.param({"a": A, "b": 3}, 24, id="no description"),
        pytest.param({"a": {"shape": [2, 3]}}, 24, id="half a description"),
        pytest.param([A], 24, id="a list"),
        pytest.param({"a": A, "__metadata__": {"n": 3}}, 24, id="a number as metadata"),
        pytest.param({"a": A, "__metadata__": [1]}, 24, id="a list as metadata"),
        pytest.param(b'{"a": {"dtype": "F32', 24, id="half a header"),
        pytest.param(b"[" * 100_000, 24, id="deep"),
        pytest.param(b'{"a":' * 100_000, 24, id="deep objects"),
        pytest.param(b'\xff\xfe{"a": 3}', 24, id="not UTF-8"),
        pytest.param(b"", 24, id="no header"),
        pytest.param(b"9" * 5000, 24, id="a long number"),
    ],
)
def test_headers_that_do_not_describe_their_file_are_refused(tmp_path, header, size):
    file = write(tmp_path / "a.safetensors", header, bytes(size))
    assert "a.safetensors: " in refusal(list_file, file)


@pytest.mark.parametrize(
    "second", [A, B, A | {"shape": [3, 2]}, {"dtype": "I8", "shape": [0], "data_offsets": [0, 0]}]
)
def test_a_name_given_twice_is_refused(tmp_path, second):
    entries = f'{{"a": {json.dumps(A)}, "a": {json.dumps(second)}}}'.encode()
    for size in (24, 48):
        file = write(tmp_path / "a.safetensors", entries, bytes(size))
        assert "a.safetensors: " in refusal(list_file, file)


def test_metadata_given_twice_are_refused(tmp_path):
    entries = f'{{"__metadata__": {{"a": "1", "a": "2"}}, "a": {json.dumps(A)}}}'.encode()
    assert "twice" in refusal(list_file, write(tmp_path / "a.safetensors", entries))


@pytest.mark.parametrize("name", ["a\nmemplus: all is well", "\x1b[2J", "\u202e", "a" * 100_000])
def test_names_cannot_break_the_line_of_an_error(tmp_path, name):
    write(tmp_path / "model-1.safetensors", {name: A})
    write(tmp_path / "model-2.safetensors", {name: A})
    assert "model-" in refusal(list_tensors, tmp_path)


@pytest.mark.parametrize("length", [2**24 + 1, 99_999_999, 2**32, 2**63, 2**64 - 1])
def test_a_huge_header_is_refused_before_it_is_read(tmp_path, length):
    file = write(tmp_path / "a.safetensors", b"{", b"", length)
    os.truncate(file, min(length + 8, 2**30))  # sparse
    tracemalloc.start()
    assert "header" in refusal(list_file, file)
    assert tracemalloc.get_traced_memory()[1] < MIB
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["model.safetensors", "table-00000.safetensors", INDEX])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path, name):
    folder = save_model(random_model(tiny_config()), tmp_path / "model")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert name in refusal(open_checkpoint, folder)
    (folder / name).unlink()
    (folder / name).mkdir()
    assert name in refusal(open_checkpoint, folder)


@pytest.fixture
def sharded(tmp_path):
    """A folder with two shards, and a function that writes its index with changes."""
    folder = save_model(random_model(tiny_config()), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = dict(zip(SHARDS, (names[:5], names[5:]), strict=True))
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    (folder / "model.safetensors").unlink()
    weight_map = {name: file for file, part in parts.items() for name in part}

    def index(**changes):
        text = json.dumps({"weight_map": weight_map | changes})
        (folder / INDEX).write_text(text)
        return folder

    index()
    load_model(folder)
    return folder, index


@pytest.mark.parametrize(
    "name",
    [
        *("../model-2.safetensors", "../model/model-2.safetensors", "./model-2.safetensors"),
        *("", ".", "..", "/", "/etc/passwd", "/dev/zero", "model-2.safetensors/"),
        *("model-3.safetensors", "model-2.safetensors\0", "\ud800.safetensors", "a\nb.safetensors"),
        *(INDEX, "config.json", "other.index.json", "a" * 300 + ".safetensors", "a" * 100_000),
    ],
)
def test_an_index_names_safetensors_files_of_its_folder_only(sharded, name):
    folder, index = sharded
    shutil.copy(folder / INDEX, folder / "other.index.json")
    absolute = str(folder / SHARDS[1])
    for one in (name, absolute):
        message = refusal(open_checkpoint, index(**{NORM: one}))
        assert f"{INDEX}: names " in message


def test_shards_may_be_links_as_in_the_cache_of_hugging_face(sharded, tmp_path):
    folder, _ = sharded
    (tmp_path / "blobs").mkdir()
    blob = (folder / SHARDS[0]).rename(tmp_path / "blobs" / "0123abcd")
    (folder / SHARDS[0]).symlink_to(blob)
    load_model(folder)
    blob.unlink()
    assert f"{INDEX}: names" in refusal(open_checkpoint, folder)
    (folder / SHARDS[0]).unlink()
    (folder / SHARDS[0]).symlink_to(folder / SHARDS[0])
    assert f"{INDEX}: names" in refusal(open_checkpoint, folder)


def test_an_index_that_names_the_wrong_shard_is_refused(sharded):
    _, index = sharded
    wrong = {NORM: SHARDS[0] if json_shard(sharded[0]) == SHARDS[1] else SHARDS[1]}
    message = refusal(open_checkpoint, index(**wrong))
    assert f"tensor {NORM} is not in {wrong[NORM]}" in message
    message = refusal(open_checkpoint, index(another=SHARDS[0]))
    assert f"tensor another is not in {SHARDS[0]}" in message


def json_shard(folder):
    return json.loads((folder / INDEX).read_text())["weight_map"][NORM]


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "3", "{}", '{"weight_map": []}', '{"weight_map": {}}'),
        *('{"weight_map": {"a": null}}', '{"weight_map": {"a": ["b"]}}', "[" * 100_000),
        '{"weight_map":' * 100_000,
        '{"weight_map": {"a": ' + "9" * 5000 + "}}",
    ],
    ids=lambda text: text[:20],
)
def test_an_index_of_another_form_is_refused(sharded, text):
    folder, _ = sharded
    (folder / INDEX).write_text(text)
    assert INDEX in refusal(open_checkpoint, folder)


def test_a_huge_index_is_refused_before_it_is_read(sharded):
    folder, _ = sharded
    os.truncate(folder / INDEX, 2**30)
    tracemalloc.start()
    assert f"{INDEX}: has {2**30} bytes" in refusal(open_checkpoint, folder)
    assert tracemalloc.get_traced_memory()[1] < MIB
    tracemalloc.stop()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder of a small model, its weights, and the content and header of its file."""
    sizes = {"num_layers": 1, "hidden_size": 8, "intermediate_size": 8, "head_dim": 2}
    model = random_model(tiny_config(**sizes))
    folder = save_model(model, tmp_path_factory.mktemp("small") / "model")
    # without padding, so that every byte of the header says something
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model.safetensors")
    content = (folder / "model.safetensors").read_bytes()
    return folder, tensors, content, int.from_bytes(content[:8], "little") + 8


@given(data=st.data())
def test_a_changed_header_is_refused_or_gives_the_same_tensors(small, data):
    folder, tensors, content, length = small
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, length - 1))
        changed[at] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(b'0123456789-,:"')))
    (folder / "model.safetensors").write_bytes(changed)
    try:
        loaded, _ = load_model(folder)
    except CheckpointError as error:
        assert str(error).isprintable() and str(error)
    else:
        found = loaded.state_dict()
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(found[name], tensor), name
