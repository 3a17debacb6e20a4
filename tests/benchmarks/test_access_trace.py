"""``memplus bench trace`` records exactly the rows that memory layers read, per token."""

import numpy as np
import pytest
import torch

from benchmarks import access_trace
from benchmarks.access_trace import record
from benchmarks.row_trace import AccessTrace
from engine.errors import ConfigError
from engine.model.layout import TokenLayout
from server.cli.main import main
from tests.models import feed_forward_changes, random_model, save_model, tiny_config
from weights.checkpoints.checkpoint import table_origins
from weights.errors import DataError
from weights.training.packing import Passage, cut
from weights.training.row_reads import count_reads, read_row_reads
from weights.training.training_data import checkpoint_text

TEXTS = ["one red fox", "two", "and three more of them"]


@pytest.fixture
def texts(tmp_path):
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(text)
    return [str(tmp_path / f"{number}.txt") for number in range(len(TEXTS))]


@pytest.fixture
def model():
    return random_model(tiny_config(**feed_forward_changes("memory_plus", "dense", "pkm")))


def test_every_token_of_every_layer_is_counted(model, texts, tmp_path):
    folder = save_model(model, tmp_path / "model")
    text = checkpoint_text(folder)
    wanted = []
    for one in TEXTS:
        ids = torch.tensor(text.document(one))
        layout = TokenLayout(torch.arange(len(ids)), (0, len(ids)))
        out = model(ids, layout, torch.tensor([0]), with_trace=True)
        wanted.append(torch.stack([trace.rows_THK for trace in out.memory.values()], 1))
    rows = torch.cat(wanted).numpy()
    found = record(folder, texts, num_tokens=len(rows), num_traced=14)
    assert np.array_equal(found.rows_TMHK, rows[:14])
    for layer in (0, 1):
        counts = np.bincount(rows[:, layer].reshape(-1), minlength=64)
        assert np.array_equal(found.counts_MR[layer], counts)
    with pytest.raises(ConfigError, match=f"tokens: the texts have {len(rows)}, fewer"):
        record(folder, texts, len(rows) + 1, 1)
    with pytest.raises(ConfigError, match="traced: must be at least 1, not 0"):
        record(folder, texts, 1, 0)


def test_a_trace_survives_saving_and_loading(model, texts, tmp_path, capsys):
    folder, file = save_model(model, tmp_path / "model"), tmp_path / "trace.npz"
    arguments = ["bench", "trace", *texts, "--model", str(folder), "--out", str(file)]
    assert main([*arguments, "--tokens", "20", "--traced", "8"]) == 0
    assert "of the rows read" in capsys.readouterr().out
    found, wanted = AccessTrace.load(file), record(folder, texts, 20, 8)
    assert np.array_equal(found.rows_TMHK, wanted.rows_TMHK)
    assert np.array_equal(found.counts_MR, wanted.counts_MR) and found.num_tokens == 20
    file.write_bytes(b"PK no")
    with pytest.raises(DataError, match=r"trace.npz: not an access trace"):
        AccessTrace.load(file)


def test_a_model_without_memory_layers_is_rejected(texts, tmp_path):
    folder = save_model(random_model(tiny_config()), tmp_path / "model")
    with pytest.raises(ConfigError, match="has no memory layers"):
        record(folder, texts, 1, 1)


def test_the_counts_are_kept_in_the_models_folder(model, texts, tmp_path):
    folder, file = save_model(model, tmp_path / "model"), str(tmp_path / "trace.npz")
    text = checkpoint_text(folder)
    ids = [text.document(one) for one in TEXTS]
    tokens = str(sum(map(len, ids)))
    arguments = ["bench", "trace", *texts, "--model", str(folder), "--tokens", tokens]
    assert main([*arguments, "--out", file]) == 0
    assert read_row_reads(folder, model.config, table_origins(folder)) is None
    assert main([*arguments, "--record"]) == 0
    found = read_row_reads(folder, model.config, table_origins(folder))
    # the trace reads the last token of a document too
    wanted = count_reads(model, [one for of in ids for one in cut([*of, 0], 512)])
    assert found.num_documents == wanted.num_documents == 3
    for name, table in wanted.tables.items():
        assert torch.equal(found.tables[name].reads_R, table.reads_R)
        assert torch.equal(found.tables[name].documents_R, table.documents_R)


def test_no_more_tokens_are_counted_than_traced(model, texts, tmp_path, monkeypatch):
    folder = save_model(model, tmp_path / "model")
    text = checkpoint_text(folder)
    ids = [text.document(one) for one in TEXTS]
    tokens = len(ids[0]) + 3
    record(folder, texts, tokens, 1, keep_record=True)
    found = read_row_reads(folder, model.config, table_origins(folder))
    wanted = count_reads(model, [Passage((*of, 0)) for of in (ids[0], ids[1][:3])])
    assert found.num_documents == 2
    for name, table in wanted.tables.items():
        assert torch.equal(found.tables[name].reads_R, table.reads_R)
    monkeypatch.delattr(access_trace, "ReadCounter")  # without a record nothing is counted
    assert record(folder, texts, tokens, 1).num_tokens == tokens


def test_a_trace_that_is_written_nowhere_is_refused(texts, capsys):
    assert main(["bench", "trace", *texts, "--model", "no-such-model"]) == 2
    assert "out: give --out FILE.npz, --record or both" in capsys.readouterr().err
