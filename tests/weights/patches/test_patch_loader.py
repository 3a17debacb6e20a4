"""Patches loaded into a running engine: used, refused by name, limited, and removed."""

import multiprocessing
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import PatchFailedError
from engine.executors.executor import make_executor
from engine.messages import EngineReady, LoadPatch, PatchLoaded, UnloadPatch
from engine.model.row_patches import RowPatch
from engine.process import run_engine
from engine.request import PatchRef, PatchStatistics, PatchSummary, StepOutput
from memory_ops.patches.patched_rows import PatchedRows
from tests.models import feed_forward_changes, greedy, random_model, save_model, tiny_config
from tests.weights.patches.made import IDENTITY, TABLE, saved_patch
from weights.checkpoints.checkpoint import load_model
from weights.errors import PatchError
from weights.patches.description import PatchDescription
from weights.patches.model_identity import model_identity
from weights.patches.patch_folder import stored_patch, write_patch
from weights.patches.patch_loader import PatchLoader

PROMPT = [5, 9, 2, 8, 1, 7, 3, 3, 4, 6, 9, 9, 1, 2]
CPU = torch.device("cpu")


class RunningEngine:
    """An engine with patches from folders, behind a pipe, as in its process."""

    def __init__(self, folder: Path, **limits) -> None:
        model, config = load_model(folder)
        settings = EngineConfig(kv_cache_gib=0.001, **limits)
        source = PatchLoader(folder, config.model, CPU)
        self.engine = Engine(make_executor(model, settings), settings, patch_source=source)
        self.engine.patches.prepare()
        self._ours, theirs = multiprocessing.Pipe()
        self._thread = threading.Thread(target=run_engine, args=(self.engine, theirs))
        self._thread.start()
        assert isinstance(self._ours.recv(), EngineReady)
        self.tokens, self.ended, self.errors = {}, set(), {}
        self.statistics = None

    def send(self, *messages) -> None:
        self._ours.send(list(messages))

    def ask(self, name: str, count: int, *refs: PatchRef) -> None:
        self.send(replace(greedy(name, PROMPT, count), patches=refs))

    def load(self, folder: Path, content_hash: str | None = None) -> PatchLoaded:
        self.send(LoadPatch(str(folder), str(folder), content_hash))
        while not isinstance(message := self._take(), PatchLoaded):
            pass
        assert message.key == str(folder)
        return message

    def finish(self, *names: str) -> list[list[int]]:
        while not self.ended >= set(names):
            self._take()
        return [self.tokens[name] for name in names]

    def close(self) -> None:
        self._ours.close()
        self._thread.join(timeout=30)
        assert not self._thread.is_alive()

    def _take(self):
        message = self._ours.recv()
        if isinstance(message, StepOutput):
            self.statistics = message.statistics
            for output in message.outputs:
                self.tokens.setdefault(output.request_id, []).extend(output.token_ids)
                if output.finish_reason is not None:
                    self.ended.add(output.request_id)
                    self.errors[output.request_id] = output.error
        return message


@pytest.fixture
def served(memory_plus_folder):
    engines = []

    def start(**limits) -> RunningEngine:
        engines.append(RunningEngine(memory_plus_folder, **limits))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module")
def identity(memory_plus_folder):
    return model_identity(memory_plus_folder)


def test_a_loaded_patch_is_used_and_a_removed_one_leaves_no_trace(served, identity, tmp_path):
    engine = served()
    patch = saved_patch(tmp_path / "p", model=identity, count=60, data="d" * 64)
    engine.ask("plain", 40)
    answer = engine.load(tmp_path / "p", patch.content_hash)
    assert answer.error is None
    bytes_of_index = 4 * 128
    assert answer.summary == PatchSummary(
        patch.content_hash, 60, patch.num_bytes + bytes_of_index, {TABLE: 60}, "d" * 64
    )
    assert engine.engine.patches.num_bytes == answer.summary.num_bytes
    ref = PatchRef(patch.content_hash)
    engine.ask("patched", 40, ref)
    # the request that uses it finishes with it
    engine.send(UnloadPatch(patch.content_hash))
    engine.ask("first", 40)
    plain, patched, first = engine.finish("plain", "patched", "first")
    assert plain == first != patched
    loaded_again = engine.load(tmp_path / "p")
    assert loaded_again.summary == answer.summary
    engine.ask("again", 40, ref)
    assert engine.finish("again") == [patched]
    ((name, reads, hits),) = engine.statistics.patches
    assert name == patch.content_hash and 0 < hits <= reads


def test_a_removed_patch_is_refused_to_later_requests(served, identity, tmp_path):
    engine = served()
    patch = saved_patch(tmp_path / "p", model=identity)
    engine.load(tmp_path / "p")
    engine.send(UnloadPatch(patch.content_hash))
    engine.load(tmp_path / "none")  # answered after the removal
    engine.ask("late", 3, PatchRef(patch.content_hash))
    engine.finish("late")
    assert engine.errors["late"] == f"memory_patches: patch {patch.content_hash} is not loaded"


def load(loader: PatchLoader, folder: Path) -> tuple[RowPatch, PatchSummary]:
    with loader.open(folder) as opened:
        patch = opened.read(lambda content_hash: None)
        return patch, opened.summary(patch.content_hash)


def rewritten(folder: Path, change) -> None:
    tensors = load_file(folder / "patch.safetensors")
    change(tensors)
    save_file(tensors, folder / "patch.safetensors")


def test_bad_patches_are_refused_by_name_and_running_requests_go_on(served, identity, tmp_path):
    rows, deltas = f"{TABLE}.rows", f"{TABLE}.deltas"
    wide = replace(identity, shapes={TABLE: (64, 32)})
    high = replace(identity, shapes={TABLE: (128, 24)})
    made = {
        "model": (IDENTITY, None, "row_choice: the patch was made for"),
        "width": (wide, None, rf"shapes.{TABLE}: the patch was made for [64, 32]"),
        "table": (high, None, rf"shapes.{TABLE}: the patch was made for [128, 24]"),
        "beyond": (identity, lambda t: t[rows].__setitem__(-1, 64), "row 64 is outside the table"),
        "unsorted": (identity, lambda t: t.update({rows: t[rows].flip(0)}), "row ids must ascend"),
        "doubled": (identity, lambda t: t[rows].__setitem__(1, t[rows][0]), "is given twice"),
        "nan": (identity, lambda t: t[deltas].fill_(torch.nan), "value [0, 0] is NaN"),
    }
    problems = {}
    for name, (model, change, problem) in made.items():
        saved_patch(tmp_path / name, model=model)
        if change is not None:
            rewritten(tmp_path / name, change)
        problems[name] = problem
    for name in ("truncated", "changed", "target"):
        saved_patch(tmp_path / name, model=identity)
    file = tmp_path / "truncated" / "patch.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    (tmp_path / "linked").symlink_to(tmp_path / "target")
    shutil.copytree(tmp_path / "target", tmp_path / "linked-file")
    (tmp_path / "linked-file/patch.safetensors").unlink()
    (tmp_path / "linked-file/patch.safetensors").symlink_to(tmp_path / "target/patch.safetensors")
    saved_patch(tmp_path / "rows", model=identity, count=31)
    problems |= {
        "truncated": "is truncated",
        "linked": "is a symbolic link",
        "linked-file": "is a symbolic link",
        "rows": "--max-patch-rows: the patch has 31 rows, but at most 30 are allowed",
        "none": "No such file or directory",
    }
    plain, engine = served(), served(max_patch_rows=30)
    plain.ask("a", 100)
    engine.ask("a", 100)
    for name, problem in problems.items():
        answer = engine.load(tmp_path / name)
        assert answer.summary is None and problem in answer.error, name
        # the limits name their option, all others the folder
        assert answer.error.startswith(f"{tmp_path / name}") or name == "rows"
    changed = engine.load(tmp_path / "changed", "c" * 64)
    assert f"{tmp_path / 'changed'}: its content has changed: {'c' * 64}" in changed.error
    assert engine.engine.patches.num_alive == 0
    assert engine.finish("a") == plain.finish("a") and engine.errors["a"] is None


def test_memory_is_limited_before_it_is_allocated(served, identity, tmp_path, monkeypatch):
    engine = served(patch_memory_gib=2000 / 2**30)
    saved_patch(tmp_path / "small", model=identity, count=9)
    saved_patch(tmp_path / "large", model=identity, count=20)
    summary = engine.load(tmp_path / "small").summary
    assert summary.num_bytes == 9 * (8 + 4 * 24) + 4 * 32
    monkeypatch.setattr("weights.patches.patch_folder._memory", None)
    error = engine.load(tmp_path / "large").error
    assert error.startswith(
        "--patch-memory-gib: the patch takes 2.18e-06 GiB, 8.72e-07 of 1.86e-06"
    )
    assert error.endswith("GiB is free; remove a patch or raise the limit")


def test_an_engine_without_patches_refuses_them(served, identity, tmp_path):
    engine = served(max_patches=0)
    patch = saved_patch(tmp_path / "p", model=identity)
    problem = "row patches are disabled (--max-patches 0)"
    assert engine.load(tmp_path / "p").error == problem
    engine.ask("a", 3, PatchRef(patch.content_hash))
    engine.finish("a")
    assert engine.errors["a"] == f"memory_patches: {problem}"
    assert engine.statistics.patches == ()


@pytest.mark.parametrize(
    ("kinds", "problem"), [(("dense",), "has no memory layers"), (("peer",), "layer 0 is peer")]
)
def test_a_model_that_takes_no_patches_says_so(tmp_path, kinds, problem):
    config = tiny_config(**feed_forward_changes(*kinds))
    folder = save_model(random_model(config), tmp_path / "model")
    saved_patch(tmp_path / "p")
    loader = PatchLoader(folder, config, CPU)
    assert not config.takes_patches
    with pytest.raises(PatchError, match=problem):
        load(loader, tmp_path / "p")


def test_a_model_that_cannot_be_read_is_named(tmp_path, memory_plus_folder):
    folder = shutil.copytree(memory_plus_folder, tmp_path / "model")
    _, config = load_model(folder)
    shutil.rmtree(folder)
    loader = PatchLoader(folder, config.model, CPU)
    with pytest.raises(PatchFailedError, match=str(folder)):
        load(loader, tmp_path / "p")
    # the hashes are computed again by the next load
    shutil.copytree(memory_plus_folder, folder)
    saved_patch(tmp_path / "p", model=model_identity(folder))
    load(loader, tmp_path / "p")


def test_a_table_of_each_layer_and_a_patch_of_one_of_them(tmp_path):
    config = tiny_config(**feed_forward_changes("pkm", "dense", "pkm", share_values=False))
    folder = save_model(random_model(config), tmp_path / "model")
    identity = model_identity(folder)
    assert config.takes_patches and len(identity.shapes) == 2
    first, second = identity.shapes
    saved_patch(tmp_path / "both", model=identity)
    shapes, origins = {second: identity.shapes[second]}, {second: identity.origins[second]}
    saved_patch(tmp_path / "one", model=replace(identity, shapes=shapes, origins=origins))
    loader = PatchLoader(folder, config, CPU)
    patch, summary = load(loader, tmp_path / "both")
    assert list(patch.layers) == [0, 2] and summary.tables == {first: 9, second: 9}
    assert patch.layers[0] is not patch.layers[2] and summary.num_rows == 18
    patch, summary = load(loader, tmp_path / "one")
    assert list(patch.layers) == [2] and summary.tables == {second: 9}


def test_layers_share_the_rows_of_a_table(memory_plus_folder, identity, tmp_path):
    _, config = load_model(memory_plus_folder)
    saved_patch(tmp_path / "p", model=identity)
    loader = PatchLoader(memory_plus_folder, config.model, CPU)
    patch, summary = load(loader, tmp_path / "p")
    assert patch.layers[1] is patch.layers[3] and patch.num_bytes == summary.num_bytes
    assert patch.counts() == PatchStatistics(patch.content_hash, 0, 0)[1:]


FREED = """
import sys
from pathlib import Path
from memory_ops.patches.patched_rows import PatchedRows
from server.allocator import keep_freed_memory
from weights.patches.patch_folder import read_patch

def load():
    return [PatchedRows(*pair) for pair in read_patch(Path(sys.argv[1])).tables.values()]

def resident_kb():
    line = next(one for one in open("/proc/self/status") if one.startswith("VmRSS"))
    return int(line.split()[1])

assert keep_freed_memory()
load()
before, count = resident_kb(), 20
patches = [load() for _ in range(count)]
size_kb = sum(rows.num_bytes for rows in patches[0]) / 1024
assert resident_kb() - before > (count - 2) * size_kb
del patches
assert resident_kb() - before < 2 * size_kb, (before, resident_kb(), size_kb)
"""


@pytest.mark.slow
def test_a_removed_patch_gives_its_memory_back(tmp_path):
    # in a subprocess, since the settings of malloc last until the process ends
    rows_P, deltas_PV = torch.arange(10_000), torch.ones(10_000, 64)
    large = PatchDescription({TABLE: "a" * 64}, "b" * 64, {TABLE: (10_000, 64)})
    write_patch(tmp_path / "p", stored_patch(large, {TABLE: (rows_P, deltas_PV)}))
    done = subprocess.run(
        [sys.executable, "-c", FREED, tmp_path / "p"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_patches_are_placed_on_the_device_of_the_model(
    memory_plus_folder, identity, tmp_path, monkeypatch
):
    _, config = load_model(memory_plus_folder)
    saved_patch(tmp_path / "p", model=identity)
    moved = []
    monkeypatch.setattr(PatchedRows, "to", lambda rows, device: moved.append(device) or rows)
    gpu = torch.device("cuda", 1)
    loader = PatchLoader(memory_plus_folder, config.model, gpu)
    load(loader, tmp_path / "p")
    assert moved == [gpu]
