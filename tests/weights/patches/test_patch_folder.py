"""Patch folders: written, read back, hashed by content, and refused by file, table and field."""

import errno
import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from engine.config import EngineConfig
from engine.errors import PatchRefusedError
from engine.loaded_patches import LoadedPatches
from tests.models import tiny_config
from tests.weights.patches.made import IDENTITY, NUM_ROWS, TABLE, WIDTH, patch_of, saved_patch
from weights.errors import PatchError, PatchReadError
from weights.patches import content_hash as hashing
from weights.patches import patch_folder
from weights.patches.content_hash import content_hash
from weights.patches.description import PatchDescription
from weights.patches.model_identity import ModelIdentity
from weights.patches.patch_folder import opened_patch, read_patch, stored_patch, write_patch
from weights.patches.patch_loader import LoadablePatch

ROWS, DELTAS = f"{TABLE}.rows", f"{TABLE}.deltas"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    saved_patch(tmp_path / "patch")
    return tmp_path / "patch"


def rewrite(folder: Path, change) -> None:
    """Change the tensors of a patch."""
    tensors = load_file(folder / "patch.safetensors")
    change(tensors)
    save_file(tensors, folder / "patch.safetensors")


def describe(folder: Path, change) -> None:
    """Change the description of a patch."""
    raw = json.loads((folder / "patch.json").read_text())
    change(raw)
    (folder / "patch.json").write_text(json.dumps(raw))


patches = st.builds(
    patch_of,
    seed=st.integers(0, 10**6),
    count=st.integers(0, NUM_ROWS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    data=st.none() | st.just("d" * 64),
    settings=st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=9), max_size=3),
    scores=st.dictionaries(st.text(max_size=5), st.floats(0, 1), max_size=3),
    base_patches=st.sampled_from([{}, {TABLE: ["e" * 64]}]),
)


@given(patch=patches)
def test_a_patch_is_read_as_it_was_written(patch):
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "patch"
        write_patch(folder, patch)
        assert sorted(file.name for file in folder.iterdir()) == ["patch.json", "patch.safetensors"]
        read = read_patch(folder, IDENTITY)
    assert read.description == patch.description
    assert read.content_hash == patch.content_hash
    assert (read.num_rows, read.num_bytes) == (patch.num_rows, patch.num_bytes)
    for name, tensors in patch.tables.items():
        for found, wanted in zip(read.tables[name], tensors, strict=True):
            assert found.dtype == wanted.dtype and torch.equal(found, wanted)


def test_the_hash_is_of_the_tensors_and_not_of_the_description():
    patch = patch_of()
    (rows, deltas) = patch.tables[TABLE]
    described = replace(patch.description, data="c" * 64, settings={"name": "x"}, scores={"a": 1})
    assert stored_patch(described, patch.tables).content_hash == patch.content_hash
    other = replace(patch.description, shapes={TABLE: (NUM_ROWS + 1, WIDTH)})
    changed = [(rows + 1, deltas), (rows, -deltas), (rows, deltas.bfloat16())]
    hashes = {stored_patch(other, {TABLE: one}).content_hash for one in changed}
    renamed = PatchDescription({"t": "a" * 64}, "b" * 64, {"t": (NUM_ROWS, WIDTH)})
    hashes.add(stored_patch(renamed, {"t": (rows, deltas)}).content_hash)
    assert len(hashes | {patch.content_hash}) == 5


def test_a_large_tensor_is_hashed_in_parts():
    tensors = {"b": torch.randn(3, 2**18 + 5), "a": torch.arange(5)}
    digest = blake3()
    for name, code in (("a", "I64"), ("b", "F32")):
        content, size = tensors[name].numpy().tobytes(), hashing.PART_BYTES
        digest.update(f"{name} {code} {list(tensors[name].shape)}\n".encode())
        for first in range(0, len(content), size):
            digest.update(blake3(content[first : first + size]).digest())

    def part(name, first, size):
        return memoryview(tensors[name].numpy().tobytes())[first : first + size]

    assert content_hash(tensors, part) == digest.hexdigest()


def test_an_opened_patch_is_hashed_without_memory_for_it(tmp_path, monkeypatch):
    patch = patch_of()
    write_patch(tmp_path / "patch", patch)
    monkeypatch.setattr(patch_folder, "_memory", pytest.fail)
    with opened_patch(tmp_path / "patch", IDENTITY) as opened:
        assert opened.content_hash() == patch.content_hash
        monkeypatch.setattr(os, "preadv", lambda descriptor, parts, offset: 0)
        with pytest.raises(PatchError, match=r"patch\.safetensors: ends within tensor memory"):
            opened.content_hash()


def swap(tensors):
    tensors[ROWS][[2, 3]] = tensors[ROWS][[3, 2]]


def double(tensors):
    tensors[ROWS][3] = tensors[ROWS][2]


def put(name, index, value):
    return lambda tensors: tensors[name].__setitem__(index, value)


def set_to(name, make):
    return lambda tensors: tensors.__setitem__(name, make(tensors.get(name)))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (swap, f"tensor {ROWS}: row ids must ascend, but \\d+ follows \\d+"),
        (double, f"tensor {ROWS}: row \\d+ is given twice"),
        (put(ROWS, -1, NUM_ROWS), f"tensor {ROWS}: row 64 is outside the table of 64 rows"),
        (put(ROWS, 0, -1), f"tensor {ROWS}: row -1 is outside the table of 64 rows"),
        (put(DELTAS, (4, 7), torch.nan), rf"tensor {DELTAS}: value \[4, 7\] is NaN or infinite"),
        (put(DELTAS, (0, 0), torch.inf), rf"tensor {DELTAS}: value \[0, 0\] is NaN or infinite"),
        (put(DELTAS, (8, 23), -torch.inf), rf"tensor {DELTAS}: value \[8, 23\] is NaN or inf"),
        (
            set_to(DELTAS, lambda t: t.bfloat16().fill_(torch.nan)),
            rf"tensor {DELTAS}: value \[0, 0\] is NaN or infinite",
        ),
        (
            set_to(DELTAS, lambda t: t[:, 1:].contiguous()),
            rf"tensor {DELTAS}: expected BF16 or F32 \[9, 24\], got F32 \[9, 23\]",
        ),
        (
            set_to(DELTAS, lambda t: t[1:]),
            rf"tensor {DELTAS}: expected BF16 or F32 \[9, 24\], got F32 \[8, 24\]",
        ),
        (set_to(DELTAS, torch.Tensor.half), f"tensor {DELTAS}: expected BF16 or F32 .*got F16"),
        (set_to(ROWS, torch.Tensor.int), rf"tensor {ROWS}: expected I64 \[P\], got I32 \[9\]"),
        (set_to(ROWS, lambda t: t[None]), rf"tensor {ROWS}: expected I64 \[P\], got I64 \[1, 9\]"),
        (set_to("other.rows", lambda _: torch.arange(3)), "tensor other.rows is unknown"),
        (set_to("extra", lambda _: torch.zeros(3)), "tensor extra is unknown"),
        (lambda tensors: tensors.pop(DELTAS), f"tensor {DELTAS} is missing"),
        (
            lambda t: t.update({ROWS: torch.arange(65), DELTAS: torch.zeros(65, WIDTH)}),
            f"tensor {ROWS}: has 65 row ids for a table of 64 rows",
        ),
    ],
)
def test_a_bad_tensor_is_named(folder, change, named):
    rewrite(folder, change)
    with pytest.raises(PatchError, match=rf"patch\.safetensors: {named}") as caught:
        read_patch(folder)
    assert "\n" not in str(caught.value)


def delete(key):
    return lambda raw: raw.pop(key)


def field(*path_and_value):
    *path, last, value = path_and_value

    def change(raw):
        for key in path:
            raw = raw[key]
        raw[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (field("memplus_patch", 2), "memplus_patch: must be 1, not 2"),
        (delete("memplus_patch"), "memplus_patch: must be 1, not None"),
        (delete("origins"), "origins: missing"),
        (delete("scores"), "scores: missing"),
        (field("memplus_patch", True), "memplus_patch: must be 1, not True"),
        (field("memplus_patch", 1.0), "memplus_patch: must be 1, not 1.0"),
        (field("memplus_patch", "\ud800"), r"memplus_patch: must be 1, not '\\ud800'"),
        (field("name", "x"), "'name': unknown key"),
        (field("\ud800", "x"), r"'\\ud800': unknown key"),
        (field("shapes", {}), "shapes: names no table"),
        (field("shapes", []), "shapes: expected a JSON object"),
        (field("shapes", TABLE, [64, 0]), r"shapes.memory.table: expected \[rows, values\]"),
        (field("shapes", TABLE, [64, True]), r"shapes.memory.table: expected \[rows, values\]"),
        (field("shapes", TABLE, [2**50, 24]), r"shapes.memory.table: expected \[rows, values\]"),
        (field("shapes", TABLE, 64), r"shapes.memory.table: expected \[rows, values\], got 64"),
        (field("shapes", "\ud800", [1, 1]), r"origins: table name '\\ud800' is not printable"),
        (field("origins", "\x1b[2J", "a" * 64), r"origins: table name '\\x1b\[2J' is not print"),
        (field("shapes", "t" * 257, [1, 1]), "origins: table name 't+' is not .* more than 256"),
        (field("base_patches", []), "base_patches: expected a JSON object"),
        (field("base_patches", {"t": []}), "base_patches: table t is not in shapes"),
        (field("base_patches", {TABLE: "a"}), "base_patches.memory.table: expected a list"),
        (field("base_patches", {TABLE: ["a"]}), "base_patches.memory.table: expected 64 hex"),
        (field("origins", "t", "a" * 64), "origins: table t is only in one of origins and shapes"),
        (field("origins", TABLE, "a" * 63), "origins.memory.table: expected 64 hexadecimal"),
        (field("row_choice", "B" * 64), "row_choice: expected 64 hexadecimal"),
        (field("row_choice", None), "row_choice: expected 64 hexadecimal"),
        (field("data", 3), "data: expected 64 hexadecimal"),
        (field("settings", None), "settings: expected a JSON object"),
    ],
)
def test_a_bad_description_is_named(folder, change, named):
    describe(folder, change)
    with pytest.raises(PatchError, match=rf"patch\.json: {named}") as caught:
        read_patch(folder)
    assert str(caught.value).isprintable()


def test_older_descriptions_name_no_base_patches(folder):
    describe(folder, delete("base_patches"))
    assert read_patch(folder).description.base_patches == {}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[1]", "expected a JSON object"),
        ("{", "Expecting property name"),
        ("\xff", "Expecting value"),
        ('{"memplus_patch": NaN}', "not valid JSON: NaN"),
        ('{"memplus_patch": -1e999}', "not valid JSON: the number -1e999 is out of range"),
        ('{"shapes": {"t": [1, 2], "t": [3, 4]}}', "the key 't' is given twice"),
        ("[" * 100_000, "not valid JSON: nested too deeply"),
        (" " * (2**20 + 1), "is larger than 1048576 bytes"),
    ],
)
def test_a_file_that_is_not_json_is_refused(folder, text, named):
    (folder / "patch.json").write_text(text)
    with pytest.raises(PatchError, match=rf"patch\.json: .*{named}"):
        read_patch(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, 4096, -1])
def test_a_truncated_file_is_refused(folder, keep):
    file = folder / "patch.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(PatchError, match=r"patch\.safetensors: is truncated"):
        read_patch(folder)


@given(
    name=st.sampled_from(["patch.json", "patch.safetensors"]),
    at=st.integers(0, 600),
    byte=st.integers(0, 255),
)
def test_a_damaged_byte_is_refused_or_read(name, at, byte):
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "patch"
        saved_patch(folder)
        content = bytearray((folder / name).read_bytes())
        content[at % len(content)] = byte
        (folder / name).write_bytes(content)
        try:
            read = read_patch(folder)
        except PatchError as error:
            assert str(folder / name) in str(error) or "patch.safetensors: tensor" in str(error)
        else:
            assert read.num_rows == 9


def test_a_file_that_shrinks_while_it_is_read_is_refused(folder, monkeypatch):
    monkeypatch.setattr(os, "preadv", lambda descriptor, parts, offset: 0)
    with pytest.raises(PatchError, match=r"patch\.safetensors: ends within tensor memory"):
        read_patch(folder)


def test_a_lack_of_memory_is_reported(folder, monkeypatch):
    def refuse(shape, dtype):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(patch_folder, "unpooled_zeros", refuse)
    with pytest.raises(PatchReadError, match=r"patch\.safetensors: .* does not fit in memory"):
        read_patch(folder)


def test_a_huge_header_is_refused_before_it_is_parsed(folder):
    (folder / "patch.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{}" * 100)
    with pytest.raises(PatchError, match="is not a patch: its header has 1099511627776 bytes"):
        read_patch(folder)


@pytest.mark.parametrize("name", ["patch.json", "patch.safetensors"])
def test_files_that_are_not_regular_are_refused(folder, tmp_path, name):
    file = folder / name
    shutil.move(file, tmp_path / name)
    with pytest.raises(PatchError, match=f"{file}: No such file"):
        read_patch(folder)
    file.symlink_to(tmp_path / name)
    with pytest.raises(PatchError, match=f"{file}: is a symbolic link"):
        read_patch(folder)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(PatchError, match=f"{file}: is not a regular file"):
        read_patch(folder)


OTHER = "c" * 64


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (
            replace(IDENTITY, origins={TABLE: OTHER}),
            f"origins.{TABLE}: the patch was made for {'a' * 64}, but the model has {OTHER}",
        ),
        (
            replace(IDENTITY, row_choice=OTHER),
            f"row_choice: the patch was made for {'b' * 64}, but the model has {OTHER}",
        ),
        (
            replace(IDENTITY, shapes={TABLE: (NUM_ROWS, 32)}),
            rf"shapes.{TABLE}: the patch was made for \[64, 24\], but the model has \[64, 32\]",
        ),
        (
            ModelIdentity({"t": OTHER}, "b" * 64, {"t": (1, 1)}),
            f"shapes.{TABLE}: the model's tables are t",
        ),
    ],
)
def test_a_patch_of_another_model_is_refused(folder, model, named):
    with pytest.raises(PatchError, match=rf"patch\.json: {named}"):
        read_patch(folder, model)


def test_invalid_tensors_are_not_written():
    patch = patch_of()
    rows_P, deltas_PV = patch.tables[TABLE]
    with pytest.raises(PatchError, match=f"patch: tensor {ROWS}: row ids must ascend"):
        stored_patch(patch.description, {TABLE: (rows_P.flip(0), deltas_PV)})
    with pytest.raises(PatchError, match=rf"patch: tensor {DELTAS}: value \[0, 0\] is NaN"):
        stored_patch(patch.description, {TABLE: (rows_P, deltas_PV * torch.nan)})


def test_a_failed_write_leaves_no_files(tmp_path, folder):
    with pytest.raises(PatchError, match="patch: exists already"):
        write_patch(folder, patch_of())
    with pytest.raises(PatchError, match="cannot be created .Not a directory"):
        write_patch(folder / "patch.json" / "new", patch_of())
    (tmp_path / "link").symlink_to(tmp_path / "none")
    with pytest.raises(PatchError, match="link: exists already"):
        write_patch(tmp_path / "link", patch_of())
    (tmp_path / "link").unlink()
    with pytest.raises(PatchError, match="at most 1048576 fit"):
        write_patch(tmp_path / "new", patch_of(settings={"text": "x" * 2**20}))
    assert [one.name for one in tmp_path.iterdir()] == ["patch"]


def test_a_patch_of_ten_million_rows_is_refused_before_memory_is_allocated(tmp_path, monkeypatch):
    num_rows, width = 10_000_000, 64
    folder = tmp_path / "patch"
    folder.mkdir()
    description = PatchDescription({TABLE: "a" * 64}, "b" * 64, {TABLE: (2**24, width)})
    (folder / "patch.json").write_bytes(description.to_json())
    ends = num_rows * 8, num_rows * (8 + 2 * width)
    header = json.dumps(
        {
            ROWS: {"dtype": "I64", "shape": [num_rows], "data_offsets": [0, ends[0]]},
            DELTAS: {"dtype": "BF16", "shape": [num_rows, width], "data_offsets": list(ends)},
        }
    ).encode()
    with (folder / "patch.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + ends[1])  # a hole, which takes no space on the disk
    monkeypatch.setattr(patch_folder, "_memory", pytest.fail)

    config = tiny_config()

    class Source:
        @contextmanager
        def open(self, folder):
            with opened_patch(folder) as opened:
                yield LoadablePatch(opened, config, torch.device("cpu"))

    by_rows = "--max-patch-rows: the patch has 10000000 rows, but at most 1000000 are allowed"
    by_bytes = "--patch-memory-gib: the patch takes 1.39 GiB, 1 of 1 GiB is free"
    for limits, message in (({}, by_rows), ({"max_patch_rows": num_rows}, by_bytes)):
        with pytest.raises(PatchRefusedError, match=f"^{message}"):
            LoadedPatches(EngineConfig(**limits), Source()).load(folder)
