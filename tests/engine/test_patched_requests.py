"""Requests with row patches: their tokens equal those of models whose tables were changed."""

import gc
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import PatchRefusedError, RequestError
from engine.executors.executor import make_executor
from engine.model.row_patches import RowPatch
from engine.request import MAX_PATCH_USES, PatchRef, canonical_patches
from memory_ops.patches.patched_rows import PatchedRows
from memory_ops.tables.device import DeviceTable
from tests.engine.delayed_executor import delayed
from tests.engine.executors.cpu.packed_forward import threads
from tests.engine.patches import patch_of
from tests.models import (
    eager,
    engine_of,
    feed_forward_changes,
    greedy,
    plain_greedy,
    plain_logits,
    random_model,
    run,
    tiny_config,
)

KINDS = ("memory_plus", "dense", "pkm")
PROMPT = [5, 9, 2, 8, 1, 7, 3, 3, 4, 6, 9, 9, 1, 2, 30, 31, 32]


def model_of(kinds=KINDS, **memory):
    torch.manual_seed(3)
    return random_model(tiny_config(**feed_forward_changes(*kinds, **memory)))


def changed_model(model, *uses: tuple[RowPatch, float], kinds=KINDS, **memory):
    """The same model, with patches written into its tables."""
    changed = model_of(kinds, **memory)
    tables = {}
    for name, table in model.tables.items():
        rows_RV = table.rows.clone()
        layer = next(
            i for i in model.config.memory_layers if model.config.layer_tables(i).values == name
        )
        for patch, scale in uses:
            rows = patch.layers[layer]
            rows_RV[rows.rows_P] += scale * rows.deltas_PV
        tables[name] = DeviceTable(rows_RV)
    changed.attach_tables(tables)
    return changed


def engine(model, make=make_executor, **config) -> Engine:
    kv = tiny_config(num_layers=3).kv_bytes_per_token(itemsize=4)
    return engine_of(model, EngineConfig(kv_cache_gib=4096 * kv / 2**30, **config), make=make)


def asks(name: str, count: int, *uses: tuple[RowPatch, float], prompt=PROMPT):
    refs = canonical_patches(PatchRef(patch.content_hash, scale) for patch, scale in uses)
    return replace(greedy(name, prompt, count), patches=refs)


@pytest.mark.parametrize("make", [make_executor, delayed, eager])
def test_tokens_equal_those_of_a_model_with_changed_tables(make):
    model = model_of()
    first, second = patch_of(model, 1), patch_of(model, 2)
    sets = [(), ((first, 1.0),), ((second, 0.5),), ((first, 1.0), (second, -1.0))]
    wanted = {
        str(i): plain_greedy(changed_model(model, *uses), PROMPT, 10) for i, uses in enumerate(sets)
    }
    assert len({tuple(tokens) for tokens in wanted.values()}) == len(sets)
    served = engine(model, make)
    for patch in (first, second):
        served.patches.put(patch)
    # together, then each alone with the blocks of the others in the prefix cache
    requests = [asks(str(i), 10, *uses) for i, uses in enumerate(sets)]
    assert run(served, {0: requests}) == wanted
    for i, request in enumerate(requests):
        assert run(served, {0: [request]}) == {str(i): wanted[str(i)]}


def test_sixteen_requests_with_eight_sets_equal_themselves_alone():
    model = model_of()
    patches = [patch_of(model, seed) for seed in range(3)]
    sets = [tuple((patches[i], 1.0 + i) for i in range(3) if n >> i & 1) for n in range(8)]
    requests = [asks(str(i), 6, *sets[i % 8], prompt=PROMPT[: 3 + i // 2]) for i in range(16)]

    def served():
        made = engine(model, block_size=4)
        for patch in patches:
            made.patches.put(patch)
        return made

    alone = {}
    for request in requests:
        alone |= run(served(), {0: [request]})
    assert run(served(), {0: requests[:9], 2: requests[9:]}) == alone


def test_a_model_that_loaded_patches_gives_the_same_bits_without_them():
    model = model_of()
    plain, patched = engine(model), engine(model)
    patched.patches.put(patch_of(model, 1))
    run(patched, {0: [asks("a", 5, (patch_of(model, 1), 1.0))]})
    request = greedy("b", PROMPT, 8, logprobs=3, prompt_logprobs=2)

    def outputs(one):
        one.add(request)
        found = []
        while one.has_work:
            found += one.step().outputs
        return [output._replace(queued_s=0.0) for output in found]

    assert outputs(plain) == outputs(patched)


@pytest.mark.parametrize("make", [make_executor, eager])
def test_reads_of_patched_rows_are_counted(make):
    model = model_of(share_values=False)
    layers = model.config.memory_layers
    whole = PatchedRows(torch.arange(64), torch.zeros(64, 32))
    patch = RowPatch("half", {layers[0]: whole, layers[1]: patch_of(model, 1).layers[layers[1]]})
    served = engine(model, make)
    served.patches.put(patch)
    run(served, {0: [greedy("plain", PROMPT, 3)]})
    assert patch.counts() == (0, 0)
    run(served, {0: [asks("a", 3, (patch, 1.0)), greedy("plain", PROMPT[1:], 3)]})
    read = (len(PROMPT) + 2) * 2 * 3  # heads x rows per head
    assert whole.counts.tolist() == [read, read]
    reads, hits = patch.counts()
    assert reads == 2 * read and read < hits < reads
    # layers that share a table share its counts
    assert RowPatch("shared", dict.fromkeys(layers, whole)).counts() == (read, read)


def test_reads_are_counted_once_by_more_threads_than_steps_of_columns():
    # native kernels split 256 columns in 2 steps
    wide = {"value_projection": True, "value_dim": 256}
    model = model_of(("pkm",), **wide)
    counts = []
    for make in (make_executor, eager):
        patch = patch_of(model, 1)
        served = engine(model, make)
        served.patches.put(patch)
        with threads(8):
            run(served, {0: [asks("a", 3, (patch, 1.0), prompt=PROMPT[:4])]})
        counts.append(patch.counts())
    assert counts[0] == counts[1] and counts[0].reads == (4 + 2) * 2 * 3


def test_a_patch_of_one_table_of_two():
    model = model_of(share_values=False)
    first, *others = model.config.memory_layers
    whole = patch_of(model, 1)
    part = RowPatch("part", {first: whole.layers[first]})
    nothing = PatchedRows(torch.empty(0, dtype=torch.int64), torch.empty(0, 32))
    same = RowPatch("same", part.layers | dict.fromkeys(others, nothing))
    served = engine(model)
    served.patches.put(part)
    served.patches.put(same)
    tokens = run(served, {0: [asks("part", 8, (part, 1.0)), asks("same", 8, (same, 1.0))]})
    assert tokens["part"] == tokens["same"] != plain_greedy(model, PROMPT, 8)


def test_a_removed_patch_stays_with_the_requests_that_use_it():
    model = model_of()
    patch = patch_of(model, 1)
    wanted = plain_greedy(changed_model(model, (patch, 1.0)), PROMPT, 10)
    served = engine(model, max_num_seqs=1)
    served.patches.put(patch)
    for name in ("running", "waiting"):
        served.add(asks(name, 10, (patch, 1.0)))
    served.step()
    served.patches.remove(patch.content_hash)
    with pytest.raises(RequestError, match="memory_patches: .* is not loaded"):
        served.add(asks("late", 10, (patch, 1.0)))
    served.patches.remove(patch.content_hash)
    del patch
    gc.collect()
    tokens = run(served, {})
    assert tokens["waiting"] == wanted and tokens["running"] == wanted[-len(tokens["running"]) :]
    assert served.patches.num_alive == 0


def test_patches_are_canonical():
    refs = [PatchRef("b", 0.5), PatchRef("a", 1.0), PatchRef("b", 0.5), PatchRef("c", 0.0)]
    assert canonical_patches(refs) == (PatchRef("a", 1.0), PatchRef("b", 1.0))
    with pytest.raises(AssertionError):
        replace(greedy("a", [1], 1), patches=tuple(refs))


def test_more_patches_than_a_batch_has_space_for_are_refused():
    refs = [PatchRef(str(number)) for number in range(MAX_PATCH_USES + 1)]
    assert len(canonical_patches(refs[1:])) == MAX_PATCH_USES
    with pytest.raises(RequestError, match="memory_patches: has 17 patches, but at most 16"):
        canonical_patches(refs)


@pytest.mark.parametrize("scales", [(math.nan,), (math.inf,), (101,), (60, 60), (-50.5, -50)])
def test_a_scale_out_of_range_is_refused(scales):
    message = f"memory_patches: scale must be -100 to 100, not {sum(scales)}"
    with pytest.raises(RequestError, match=message):
        canonical_patches(PatchRef("a", scale) for scale in scales)
    assert canonical_patches([PatchRef("a", 60), PatchRef("a", 40)]) == (PatchRef("a", 100),)


def test_logits_are_those_of_a_changed_table_within_tolerance():
    model = model_of()
    patch = patch_of(model, 1)
    served = engine(model)
    served.patches.put(patch)
    request = greedy("a", PROMPT, 0, prompt_logprobs=3)
    served.add(replace(request, patches=(PatchRef(patch.content_hash, 0.25),)))
    outputs = []
    while served.has_work:
        outputs += served.step().outputs
    found = [entry for output in outputs for entry in output.prompt_logprobs]
    exact = plain_logits(changed_model(model, (patch, 0.25)), PROMPT).log_softmax(-1)
    for at, entry in enumerate(found):
        assert entry.logprob == pytest.approx(float(exact[at, PROMPT[at + 1]]), abs=1e-4)


def test_patches_must_be_on_the_executors_device():
    model = model_of()
    config = EngineConfig(kv_cache_gib=0.001)
    executor = eager(model, config)
    executor.device = torch.device("meta")
    with pytest.raises(PatchRefusedError, match="is on cpu, but the model is on meta"):
        Engine(executor, config).patches.put(patch_of(model, 1))


@pytest.mark.parametrize(
    ("kinds", "limits", "reason"),
    [
        (("dense",), {}, "the model has no memory layers, so it takes no row patches"),
        (("pkm", "peer"), {}, "layer 1 is peer, whose output is not linear in its rows"),
        (("pkm",), {"max_patches": 0}, r"row patches are disabled \(--max-patches 0\)"),
    ],
)
def test_an_engine_without_patches_says_why(kinds, limits, reason):
    served = engine(model_of(kinds), **limits)
    with pytest.raises(RequestError, match=f"^memory_patches: {reason}"):
        served.add(replace(greedy("a", PROMPT, 3), patches=(PatchRef("a"),)))
    with pytest.raises(PatchRefusedError, match=f"^{reason}"):
        served.load_patch(Path("/a"))
