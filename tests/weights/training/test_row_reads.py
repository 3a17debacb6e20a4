"""Row reads: counts against a plain loop, and the record in a model folder."""

import shutil

import pytest
import torch
from safetensors.torch import save_file

from engine.model.layout import TokenLayout
from tests.models import feed_forward_changes, random_model, tiny_config
from weights.checkpoints.checkpoint import load_model, table_origins
from weights.checkpoints.convert import convert
from weights.errors import CheckpointError
from weights.training.packing import Passage
from weights.training.row_reads import (
    RowReads,
    TableReads,
    count_reads,
    read_row_reads,
    recorded_tokens,
    sampled_passages,
    write_row_reads,
)
from weights.training.token_file import TokenFile

TABLE = "memory.table"
PASSAGES = [Passage((5, 9, 2, 8, 1)), Passage((7, 3)), Passage((5, 9, 2, 4))]


@pytest.mark.parametrize("shared", [True, False])
def test_reads_and_documents_are_counted(shared):
    changes = feed_forward_changes("memory_plus", "dense", "pkm", share_values=shared)
    model = random_model(tiny_config(**changes))
    found = count_reads(model, PASSAGES)
    assert found.num_documents == 3 and set(found.tables) == set(model.tables)
    wanted = {name: torch.zeros(2, 64, dtype=torch.int64) for name in model.tables}
    for passage in PASSAGES:
        ids = torch.tensor(passage.ids[:-1])
        layout = TokenLayout(torch.arange(len(ids)), (0, len(ids)))
        seen = {name: set() for name in wanted}
        for layer, trace in model(ids, layout, torch.tensor([0]), with_trace=True).memory.items():
            name = model.config.layer_tables(layer).values
            for row in trace.rows_THK.flatten().tolist():
                wanted[name][0, row] += 1
                seen[name].add(row)
        for name, rows in seen.items():
            wanted[name][1, sorted(rows)] += 1
    for name, counts in wanted.items():
        assert torch.equal(found.tables[name].reads_R, counts[0])
        assert torch.equal(found.tables[name].documents_R, counts[1])


def reads(largest=5):
    reads_R, documents_R = torch.arange(64), torch.arange(64) % 4
    reads_R[9] = largest
    return RowReads({TABLE: TableReads(reads_R, documents_R)}, 3)


@pytest.fixture
def folder(memory_plus_folder, tmp_path):
    return shutil.copytree(memory_plus_folder, tmp_path / "model")


@pytest.mark.parametrize("largest", [5, 2**40])
def test_a_record_is_read_back_and_carried_by_convert(folder, tmp_path, largest):
    config, origins = load_model(folder)[0].config, table_origins(folder)
    assert read_row_reads(folder, config, origins) is None
    write_row_reads(folder, reads(7))
    write_row_reads(folder, reads(largest))
    convert(folder, tmp_path / "narrow", table_dtype="int8")
    for one in (folder, tmp_path / "narrow"):
        found = read_row_reads(one, config, origins)
        assert found.num_documents == 3
        assert torch.equal(found.tables[TABLE].reads_R, reads(largest).tables[TABLE].reads_R)
        assert torch.equal(found.tables[TABLE].documents_R, reads().tables[TABLE].documents_R)


def test_a_record_of_another_model_is_refused(folder):
    config, origins = load_model(folder)[0].config, table_origins(folder)
    counts = {f"{TABLE}.reads": torch.zeros(64).int(), f"{TABLE}.documents": torch.ones(64).int()}
    own = {f"origin:{TABLE}": origins[TABLE]}
    three = {"documents": "3"} | own
    for change, metadata, named in [
        ({f"{TABLE}.reads": torch.zeros(63).int()}, three, r"reads: expected .*\[64\], got I32"),
        ({f"{TABLE}.reads": torch.zeros(64)}, three, "reads: expected I32 or I64"),
        ({f"{TABLE}.reads": torch.zeros(64).bool()}, three, "reads: expected I32 .*got BOOL"),
        ({f"{TABLE}.reads": -torch.ones(64).int()}, three, "reads: has a count below 0"),
        ({"other": torch.zeros(1)}, three, "tensor other is unknown"),
        ({f"{TABLE}.documents": torch.full((64,), 4)}, three, "documents: has a count above 3"),
        ({}, own | {"documents": "-3"}, "metadata documents: expected a count, got '-3'"),
        ({}, own, "metadata documents"),
        ({}, {"documents": "3"}, f"origin:{TABLE}: is none, but the table has {origins[TABLE]}"),
        (
            {},
            {f"origin:{TABLE}": "a" * 64},
            f"origin:{TABLE}: is a{{64}}, but the table has {origins[TABLE]}",
        ),
    ]:
        save_file(counts | change, folder / "row_reads.safetensors", {"format": "pt", **metadata})
        with pytest.raises(CheckpointError, match=named):
            read_row_reads(folder, config, origins)
        with pytest.raises(CheckpointError, match=named):
            convert(folder, folder.parent / "copy")
    save_file({f"{TABLE}.reads": torch.zeros(64).int()}, folder / "row_reads.safetensors")
    with pytest.raises(CheckpointError, match=r"memory.table.documents is missing"):
        read_row_reads(folder, config, origins)


def test_a_sample_has_random_documents_up_to_a_limit(tmp_path):
    documents = [[100 * n, 100 * n + 1, 100 * n + 2] for n in range(9)]
    tokens = TokenFile.write(tmp_path / "tokens", documents, 1000)
    every = {passage.ids for passage in sampled_passages(tokens, 8, 1, 100)}
    assert every == {tuple(one) for one in documents}
    few = [passage.ids for passage in sampled_passages(tokens, 8, 1, 7)]
    assert len(few) == 3 and set(few) < every
    assert few != [passage.ids for passage in sampled_passages(tokens, 8, 2, 7)]


def test_a_record_takes_a_part_of_the_tokens_that_a_run_trained_on():
    trained = (1000, 2**20, 2**30)
    assert [recorded_tokens(one) for one in trained] == [2**12, 2**18, 2**18]
    assert recorded_tokens(2**18) == 2**16
