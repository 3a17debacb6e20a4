"""Micro-batches on the GPU: the order of pieces, the waits of the host, and the same tokens."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from engine.engine import Engine
from engine.executors.batch import prompt_batch
from engine.executors.cuda import buckets, micro_batches, step
from engine.executors.cuda.buckets import StepShape
from engine.executors.cuda.micro_batches import run_layers, split_rule
from engine.executors.cuda.step_inputs import InputLayout, InputWriter
from engine.executors.lookahead import LookaheadConfig
from engine.executors.micro_batch_count import SplitRule
from engine.model.forward_trace import ForwardTrace
from memory_ops import reference
from memory_ops.native import disk_rows
from memory_ops.tables.value_table import TableReadError
from tests.engine.executors.cuda.fake_device import FakeDevice
from tests.engine.executors.cuda.interpreted import test_patches
from tests.engine.executors.cuda.interpreted.test_disk_tier import CONFIG, on_disk
from tests.engine.executors.cuda.on_cpu import cuda_on_cpu
from tests.memory_ops.interpreted.test_gpu_disk import NUM_ROWS, WIDTH, gpu_disk
from tests.memory_ops.late_stream import LateStream
from tests.memory_ops.table_kinds import rows_of
from tests.models import feed_forward_changes, greedy, plain_greedy, random_model, run, tiny_config

needs_library = pytest.mark.skipif(not disk_rows.is_available(), reason="built without a compiler")


class LoggedLayer:
    """A layer of one lookup, which logs its pieces by micro-batch."""

    def __init__(self, log: list[str]) -> None:
        self._log = log

    def pieces(self, residual_TD, tokens, kv_blocks, trace):
        self._log.append(f"{tokens.name} layers")
        yield
        self._log.append(f"{tokens.name} start")
        yield
        self._log.append(f"{tokens.name} rows")
        yield
        return residual_TD + 1


def test_the_layers_of_one_micro_batch_run_while_the_host_fetches_rows_of_another():
    log: list[str] = []
    parts = [
        SimpleNamespace(name="A", part=slice(0, 2)),
        SimpleNamespace(name="B", part=slice(2, 5)),
    ]
    layers, residual_TD = [LoggedLayer(log), LoggedLayer(log)], torch.arange(5.0).view(5, 1)
    found = run_layers(layers, residual_TD, parts, [None, None], ForwardTrace())
    assert torch.equal(found, residual_TD + 2)
    # a table has one lookup at a time: from its start until its rows are read
    assert ", ".join(log) == (
        "A layers, A start, B layers, A rows, B start, A layers, B rows, A start, B layers, A rows,"
        " B start, B rows"
    )
    log.clear()
    run_layers(layers, residual_TD, parts[:1], [None, None], ForwardTrace())
    assert log == ["A layers", "A start", "A rows"] * 2


def test_three_micro_batches_end_together():
    log: list[str] = []
    parts = [SimpleNamespace(name=n, part=slice(i, i + 1)) for i, n in enumerate("ABC")]
    found = run_layers([LoggedLayer(log)], torch.zeros(3, 1), parts, [None], ForwardTrace())
    assert torch.equal(found, torch.ones(3, 1))
    assert ", ".join(log) == (
        "A layers, A start, B layers, A rows, B start, C layers, B rows, C start, C rows"
    )


class LookupLayer:
    """A layer that reads drawn rows of a table on disk; the stream computes its row ids late."""

    def __init__(self, table, exact_RV: Tensor, stream: LateStream, log: list[str]) -> None:
        self._table, self._exact_RV, self._stream, self._log = table, exact_RV, stream, log

    def pieces(self, residual_TD, tokens, kv_blocks, trace):
        right = rows_of(self._exact_RV, len(residual_TD), 1, 3)
        rows, weights = torch.zeros_like(right), torch.rand(right.shape)

        def compute() -> None:
            rows.copy_(right)
            self._log.append(f"{tokens.name} layers")

        self._stream.run(compute)
        yield
        lookup = self._table.start(rows, weights)
        yield
        self._log.append(f"host of {tokens.name}")
        read_TV = lookup.finish()
        yield
        copied = torch.full_like(read_TV, torch.nan)
        self._stream.run(lambda: copied.copy_(read_TV))
        tokens.pairs.append((copied, reference.gather_rows(self._exact_RV, right, weights)))
        return residual_TD


def run_lookups(folder, ignored: int = -1, **options) -> tuple[int, list[str], bool]:
    """Two micro-batches of three layers: the number of waits, a log, and whether rows are right.

    ``options`` are those of ``gpu_disk``.
    """
    torch.manual_seed(0)
    stream, rows_RV, log = LateStream(ignored), torch.randn(NUM_ROWS, WIDTH), list[str]()
    table = gpu_disk(folder, rows_RV, stream, slots=7, **options)
    read = table.disk.rows.start
    table.disk.rows.start = lambda *args, **options: log.append("read") or read(*args, **options)
    parts = [
        SimpleNamespace(name=name, part=slice(2 * i, 2 * i + 2), pairs=[])
        for i, name in enumerate("AB")
    ]
    layers = [LookupLayer(table, rows_RV, stream, log)] * 3
    try:
        run_layers(layers, torch.zeros(4, 1), parts, [None] * 3, ForwardTrace())
    except (IndexError, TableReadError):
        return stream.waits, log, False
    waits = stream.waits
    stream.finish()
    pairs = [pair for part in parts for pair in part.pairs]
    return waits, log, all(torch.allclose(*pair, atol=1e-5) for pair in pairs)


@needs_library
def test_the_host_reads_rows_before_the_device_has_done_the_other_layers(tmp_path):
    _, log, is_right = run_lookups(tmp_path)
    assert is_right
    # the device works as late as it may: the layers of B were launched, but no wait needed them
    assert log[:3] == ["host of A", "A layers", "read"]
    assert log[3:7] == ["host of B", "B layers", "read", "host of A"]


@needs_library
def test_only_the_first_part_of_a_lookup_overlaps_other_layers(tmp_path):
    # overflow rows for one token: each lookup of two tokens has two parts
    _, log, is_right = run_lookups(tmp_path, overflow=3)
    assert is_right
    assert log[:3] == ["host of A", "A layers", "read"]
    # the second part is placed behind the layers of B, so its rows are read after them
    assert log[3:5] == ["B layers", "read"]
    assert log[5:9] == ["host of B", "read", "A layers", "read"]


@needs_library
@pytest.mark.slow
def test_no_wait_between_micro_batches_can_be_left_out(tmp_path):
    waits = run_lookups(tmp_path)[0]
    assert waits == 6  # one for each lookup
    for ignored in range(waits):
        assert not run_lookups(tmp_path, ignored)[2], ignored


def test_fewer_rows_than_weights_are_worth_are_not_a_reason_to_split():
    small, large = split_rule(2 * 10**8), split_rule(16 * 10**9)
    assert 400 < small.least_rows < 500 and 2000 < large.least_rows < 3000
    assert [large.most(count) for count in (1, 31, 32, 1023, 1024)] == [1, 1, 2, 2, 4]
    # no lookup needs slots while another one waits, and its first part alone overlaps
    assert (large.most_references, large.needs_slots) == (2**14, False)


def written(shape: StepShape, batch) -> dict[str, list]:
    words = torch.full((InputLayout(shape).num_words,), 77)
    views = InputLayout(shape).views(words)
    writer = InputWriter(vocab_size=50, group=1, scrap_slot=99)
    writer.write({name: view.numpy() for name, view in views.items()}, shape, batch, (), None)
    return {name: view.tolist() for name, view in views.items()}


def test_each_micro_batch_gets_its_part_of_sequences_and_padding():
    batch = replace(
        prompt_batch(range(7), block_size=4), query_starts=(0, 2, 7), context_lengths=(12, 5),
        block_ids=((0, 1, 2), (3, 4)), seats=(3, 1), logits_at_L=torch.tensor([1, 6]),
    )  # fmt: skip
    shape = StepShape(10, 3, 3, False, micro_batches=2)
    assert shape.edges == (0, 4, 10)
    assert not shape.is_filled(6) and shape.is_filled(7)
    inputs = written(shape, batch)
    assert inputs["counts"] == [0, 0, 4, 3]
    assert inputs["sources"] == [0, 1, 2, 3, 0, 1, 2, 0, 0, 0]
    # two tokens of the second sequence are in the first micro-batch, the others follow them
    assert inputs["query_starts_0"] == [0, 2, 4, 4] and inputs["query_starts_1"] == [0, 3, 3, 3]
    assert inputs["context_lengths_0"][:2] == [12, 2] and inputs["context_lengths_1"][0] == 5
    assert inputs["seats_0"][:2] == [3, 1] and inputs["seats_1"][0] == 1
    # a micro-batch of padding alone begins with the first token: 11 tokens are known up to it
    padded = written(shape, replace(batch, query_starts=(0, 2, 3), context_lengths=(12, 5),
                                    ids_T=batch.ids_T[:3], positions_T=batch.positions_T[:3],
                                    kv_index_T=batch.kv_index_T[:3],
                                    logits_at_L=torch.tensor([1, 2])))  # fmt: skip
    assert padded["counts"] == [0, 0, 3, 0] and padded["query_starts_1"] == [0, 1, 1, 1]
    assert padded["context_lengths_1"][0] == 11 and padded["seats_1"][0] == 3
    decode = replace(batch, query_starts=tuple(range(8)), context_lengths=tuple(range(20, 27)),
                     seats=tuple(range(7)), block_ids=((0,),) * 7)  # fmt: skip
    inputs = written(StepShape(8, 8, 8, True, micro_batches=2), decode)
    assert inputs["context_lengths_1"] == [24, 25, 26, 20] and inputs["seats_1"] == [4, 5, 6, 0]
    assert inputs["query_starts_1"] == [0, 1, 2, 3, 4]


PROMPTS = {"a": [1, 2, 3], "b": [4, 5, 6, 7, 8, 9, 10], "c": [11], "d": [12, 13]}


def check(model, folder, monkeypatch, *, lookahead=None, warm=False) -> FakeDevice:
    """Compare tokens of split steps with those of a plain loop; returns the device."""
    monkeypatch.setattr(step, "split_rule", lambda weight_bytes: SplitRule(((4, 2),)))
    runs, seen = micro_batches.run_layers, list[int]()
    monkeypatch.setattr(step, "run_layers", lambda *args: seen.append(len(args[2])) or runs(*args))
    count = 2
    expected = {name: plain_greedy(model, ids, count) for name, ids in PROMPTS.items()}
    # all rows fit in host memory, few on the device
    make = on_disk(folder, num_layers=model.config.num_layers, slots=64)
    model.attach_tables({name: make(table.rows) for name, table in model.tables.items()})
    config, device = replace(CONFIG, max_num_seqs=4), FakeDevice()
    served = Engine(cuda_on_cpu(model, config, device, lookahead, warm=warm), config)
    seen.clear()
    requests = [greedy(name, ids, count) for name, ids in PROMPTS.items()]
    assert run(served, {0: requests}) == expected
    # the prompts and the decode of four sequences
    assert warm or seen == [2, 2]
    return device


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kinds", "memory", "lookahead"),
    [
        (("memory_plus", "dense", "pkm"), {}, LookaheadConfig(2, 3)),
        (("peer",), {}, None),
        (("memory_plus",), {"placement": "beside"}, None),
    ],
)
def test_tokens_of_split_steps(kinds, memory, lookahead, tmp_path, monkeypatch):
    model = random_model(tiny_config(**feed_forward_changes(*kinds, **memory)))
    check(model, tmp_path, monkeypatch, lookahead=lookahead)


@needs_library
@pytest.mark.slow
def test_tokens_of_split_graphs(tmp_path, monkeypatch):
    monkeypatch.setattr(buckets, "_DECODE_SEQUENCES", (4,))
    monkeypatch.setattr(buckets, "_MIXED_TOKENS", (14,))
    model = random_model(tiny_config(**feed_forward_changes("memory_plus")))
    device = check(model, tmp_path, monkeypatch, warm=True)
    # each lookup cuts a graph where its rows are known and where they are needed
    assert (device.num_replays, device.num_cuts) == (2, 2 * 2 * 2)


@needs_library
@pytest.mark.slow
def test_row_patches_and_their_counts_in_split_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "split_rule", lambda weight_bytes: SplitRule(((4, 2),)))
    runs, seen = micro_batches.run_layers, set[int]()
    monkeypatch.setattr(step, "run_layers", lambda *args: seen.add(len(args[2])) or runs(*args))
    make = on_disk(tmp_path, slots=64)
    # the prompts of three requests, two of them with patches
    test_patches.check(("memory_plus",), table_of=make, count=2, num_first=3)
    assert 2 in seen
