"""Parts of tensors in a file: written by several processes, and read by any number of them."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memory_ops.tables.table_shard import TableShard
from tests.thread_replicas import in_group
from weights.checkpoints import tensor_files, tensor_part
from weights.checkpoints.tensor_files import TensorSource, list_file
from weights.checkpoints.tensor_part import part_of_table, read_part, write_part
from weights.checkpoints.tensor_writer import write_tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder, while reads and writes are of a few rows each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_part, "_WRITTEN_BYTES", 100)
        patch.setattr(tensor_files, "PART_BYTES", 100)
        yield tmp_path_factory.mktemp("parts")


def parts(whole, axis, count):
    shape = whole.shape[0], whole.shape[1] if whole.dim() == 2 else count
    for rank in range(count):
        shard = TableShard.even(shape, axis, rank, count)
        is_divided = axis == 0 or whole.dim() == 2
        part = shard.part_of(whole) if is_divided else whole
        yield part_of_table(part.clone(memory_format=torch.contiguous_format), shard)


def store_of(whole, axis, count):
    """A function that writes a tensor by its parts."""
    made = list(parts(whole, axis, count))

    def store(path: Path, offset: int) -> None:
        in_group(count, lambda group: write_part(path, offset, made[group.rank], group))

    return store if made[0].shard is not None else None


@given(
    *(st.integers(0, 1), st.integers(2, 4), st.integers(0, 30), st.integers(0, 12)),
    *(st.sampled_from(["float32", "bfloat16", "int64"]), st.booleans()),
)
@settings(max_examples=20, deadline=None)
def test_parts_fill_a_file_that_any_division_reads(
    folder, axis, count, more_rows, more_columns, dtype, has_columns
):
    shape = (count + more_rows, count + more_columns)[: 1 + has_columns]
    whole = torch.randint(-99, 99, shape).to(getattr(torch, dtype))
    first = torch.ones(3, dtype=torch.float32)
    sources = [
        TensorSource("first", (3,), torch.float32, first.cpu),
        TensorSource(
            "whole", tuple(shape), whole.dtype, whole.cpu, store=store_of(whole, axis, count)
        ),
        TensorSource("last", (3,), torch.float32, first.cpu),
    ]
    written, wanted = folder / "parts.safetensors", folder / "whole.safetensors"
    for file in (written, wanted):
        file.unlink(missing_ok=True)
    write_tensors(written, sources, lambda num_bytes: None, with_checksums=True)
    plain = [TensorSource(one.name, one.shape, one.dtype, one.load) for one in sources]
    write_tensors(wanted, plain, lambda num_bytes: None, with_checksums=True)
    assert written.read_bytes() == wanted.read_bytes()
    stored = next(one for one in list_file(written) if one.name == "whole")
    for other in range(1, count + 1):
        for part in parts(whole, 1 - axis, other):
            assert part.shape == tuple(shape)
            values = part.tensor.clone()
            part.tensor.zero_()
            read_part(stored, part)
            assert torch.equal(part.tensor, values)


def test_rows_of_another_dtype_are_converted(folder):
    whole = torch.randn(40, 9).half()
    file = folder / "half.safetensors"
    write_tensors(file, [TensorSource("t", (40, 9), whole.dtype, whole.cpu)], lambda size: None)
    (stored,) = list_file(file)
    for axis in (0, 1):
        for part in parts(whole.float(), axis, 3):
            values = part.tensor.clone()
            read_part(stored, part)
            assert torch.equal(part.tensor, values)


def test_a_file_that_becomes_short_is_named(tmp_path):
    def store(path: Path, offset: int) -> None:
        os.truncate(path, offset + 5)

    file = tmp_path / "short.safetensors"
    source = TensorSource("whole", (3,), torch.float32, torch.ones(3).cpu, store=store)
    with pytest.raises(OSError, match="short.safetensors is shorter than what was written"):
        write_tensors(file, [source], lambda num_bytes: None, with_checksums=True)
