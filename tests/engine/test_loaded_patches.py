"""Patches that an engine has loaded: equal contents, limits, removals and counts."""

import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.errors import PatchBusyError, PatchRefusedError, RequestError
from engine.loaded_patches import LoadedPatches
from engine.model.row_patches import RowPatch
from engine.request import PatchRef, PatchStatistics, PatchSummary
from memory_ops.patches.patched_rows import PatchedRows, patched_bytes

WIDTH = 256
BYTES = patched_bytes(100, WIDTH, itemsize=4)

IN_USE = "requests still use removed patches; retry later"


class MadePatch:
    """A patch of ``num_rows`` rows, and what was done with it."""

    def __init__(self, content, num_rows):
        self.content, self.num_rows = content, num_rows
        self.num_bytes = patched_bytes(num_rows, WIDTH, itemsize=4)
        self.calls = []

    def content_hash(self):
        self.calls.append("hash")
        return self.content

    def read(self, find):
        self.calls.append("read")
        if (known := find(self.content)) is not None:
            return known
        self.calls.append("place")
        rows = PatchedRows(torch.arange(self.num_rows), torch.zeros(self.num_rows, WIDTH))
        return RowPatch(self.content, {0: rows, 2: rows})

    def summary(self, content_hash):
        return PatchSummary(content_hash, self.num_rows, self.num_bytes, {})


class MadePatches:
    """A source of patches of 100 rows, or 99; a folder's name begins with its content."""

    def __init__(self):
        self.opened = []

    def prepare(self):
        pass

    @contextmanager
    def open(self, folder):
        self.opened.append(MadePatch(folder.name[0], 99 if "small" in folder.name else 100))
        yield self.opened[-1]


def loaded(**limits) -> LoadedPatches:
    return LoadedPatches(EngineConfig(**limits), MadePatches())


def done(patches: LoadedPatches) -> list[str]:
    """The calls of the patch that was opened last."""
    return patches._source.opened[-1].calls


def refused(
    patches: LoadedPatches, folder: str, message: str, kind: type = PatchRefusedError
) -> None:
    with pytest.raises(kind) as raised:
        patches.load(Path(folder))
    assert str(raised.value) == message and type(raised.value) is kind


def test_equal_contents_are_one_patch():
    patches = LoadedPatches()
    patches.put(RowPatch("a", {}))
    (first,) = patches.lease([PatchRef("a")])
    patches.put(RowPatch("a", {}))
    assert patches.lease([PatchRef("a")])[0].patch is first.patch
    patches.remove("a")
    patches.put(RowPatch("a", {}))
    assert patches.lease([PatchRef("a")])[0].patch is first.patch


def test_a_patch_that_is_not_loaded_is_refused():
    patches = LoadedPatches()
    patches.remove("a")
    with pytest.raises(RequestError, match="memory_patches: patch a is not loaded"):
        patches.lease([PatchRef("a")])


def test_equal_contents_in_two_folders_take_memory_once():
    patches = loaded()
    assert patches.load(Path("/a")).num_bytes == BYTES
    assert done(patches) == ["read", "place"]
    patches.load(Path("/a-again"), "a")
    assert done(patches) == ["read"]
    assert (patches.num_alive, patches.num_bytes) == (1, BYTES)


def test_a_removed_patch_counts_as_long_as_a_request_uses_it():
    patches = loaded(max_patches=3, patch_memory_gib=2 * BYTES / 2**30)
    patches.load(Path("/a"))
    patches.load(Path("/b"))
    message = "--patch-memory-gib: the patch takes 9.71e-05 GiB, 0 of 0.000194 GiB is free"
    refused(patches, "/c", f"{message}; remove a patch or raise the limit")
    lease = patches.lease([PatchRef("a")])
    patches.remove("a")
    refused(patches, "/c", f"{message}; {IN_USE}", PatchBusyError)
    del lease
    patches.load(Path("/c"))
    assert (patches.num_alive, patches.num_bytes) == (2, 2 * BYTES)


def test_the_number_of_patches_is_limited_but_not_that_of_folders():
    patches = loaded(max_patches=2)
    for folder in ("/a", "/b", "/a-again", "/b-again"):
        patches.load(Path(folder))
    message = "--max-patches: 2 row patches are allowed, and as many are loaded or still used by"
    refused(patches, "/c", f"{message} requests; remove a patch or raise the limit")
    lease = patches.lease([PatchRef("a")])
    patches.remove("a")
    refused(patches, "/c", f"{message} requests; {IN_USE}", PatchBusyError)
    # a content that is still in memory does not count twice
    patches.load(Path("/a-once-more"))
    assert lease[0].patch is patches.lease([PatchRef("a")])[0].patch


@pytest.mark.parametrize(
    "limits", [{"max_patches": 1}, {"patch_memory_gib": BYTES / 2**30}, {"max_patches": 2}]
)
def test_a_content_in_memory_needs_no_space(limits):
    patches = loaded(**limits)
    patches.load(Path("/a"))
    lease = patches.lease([PatchRef("a")])
    patches.remove("a")
    assert patches.load(Path("/a-again")).num_bytes == BYTES
    assert done(patches) == (["read"] if limits == {"max_patches": 2} else ["hash"])
    assert patches.lease([PatchRef("a")])[0].patch is lease[0].patch


def test_a_patch_without_space_is_refused_before_it_takes_memory():
    patches = loaded(max_patches=1)
    patches.load(Path("/a"))
    for folder, calls in (("/b", ["hash"]), ("/a-small", [])):
        with pytest.raises(PatchRefusedError, match="^--max-patches: 1 row patches"):
            patches.load(Path(folder))
        assert done(patches) == calls
    with pytest.raises(PatchRefusedError, match="^/a: its content has changed: b became a$"):
        patches.load(Path("/a"), "b")


def test_patches_are_loaded_removed_and_counted_in_two_threads():
    patches, errors = loaded(), []
    kept = RowPatch("kept", {0: PatchedRows(torch.arange(2), torch.zeros(2, 4))})
    patches.put(kept)

    def change():
        try:
            for number in range(2000):
                name = str(number % 7)
                patches.put(RowPatch(name, kept.layers))
                assert patches.num_bytes >= kept.num_bytes
                patches.remove(name)
        except Exception as error:
            errors.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        thread = threading.Thread(target=change)
        thread.start()
        while thread.is_alive():
            (use,) = patches.lease([PatchRef("kept")])
            assert use.patch is kept
            patches.take_counts()
        thread.join()
    finally:
        sys.setswitchinterval(before)
    assert errors == [] and patches.num_alive == 1


def test_a_patch_that_ends_while_bytes_are_counted_changes_no_sum(monkeypatch):
    patches, sizes = LoadedPatches(), []
    names = ("a", "b", "c")
    for name in names:
        patches.put(RowPatch(name, {}))
    (use,) = patches.lease([PatchRef("b")])
    patches.remove("b")

    def size(patch):
        # as if the engine's thread ran here: a request ends, and the next one is added
        nonlocal use
        use = None
        patches.lease([PatchRef("a")])
        sizes.append(patch.content_hash)
        return 1

    monkeypatch.setattr(RowPatch, "num_bytes", property(size))
    assert patches.num_bytes == 3 and sizes == list(names)
    assert patches.num_alive == 2


def test_the_rows_of_a_patch_are_limited():
    message = (
        "--max-patch-rows: the patch has 100 rows, but at most 99 are allowed; raise the limit"
    )
    refused(loaded(max_patch_rows=99), "/a", message)
    assert loaded(max_patch_rows=100).load(Path("/a")).num_rows == 100


def test_a_content_that_has_changed_is_refused():
    patches = loaded()
    with pytest.raises(PatchRefusedError, match=r"^/a: its content has changed: b became a$"):
        patches.load(Path("/a"), "b")
    assert patches.num_alive == 0


def test_patches_need_a_source_of_folders():
    LoadedPatches().prepare()
    with pytest.raises(PatchRefusedError, match="reads no row patches"):
        LoadedPatches().load(Path("/a"))


def test_a_patch_on_another_device_than_the_model_is_refused():
    patch = RowPatch("a", {0: PatchedRows(torch.arange(2), torch.zeros(2, 4))})
    elsewhere = patch.to(torch.device("meta"))
    with pytest.raises(
        PatchRefusedError, match=r"^row patch a is on meta, but the model is on cpu"
    ):
        LoadedPatches().put(elsewhere)
    there = LoadedPatches(device=torch.device("meta"))
    with pytest.raises(
        PatchRefusedError, match=r"^row patch a is on cpu, but the model is on meta"
    ):
        there.put(patch)
    there.put(elsewhere)
    assert there.num_alive == 1


def count(use, reads, hits):
    use.patch.layers[0].counts += torch.tensor([reads, hits])


def test_counts_are_the_reads_since_they_were_taken():
    patches = loaded()
    for folder in ("/a", "/b"):
        patches.load(Path(folder))
    (use,) = patches.lease([PatchRef("a")])
    assert patches.take_counts() == ()
    count(use, 7, 3)
    assert patches.take_counts() == (PatchStatistics("a", 7, 3),)
    assert patches.take_counts() == ()
    count(use, 2, 0)
    assert patches.take_counts() == (PatchStatistics("a", 2, 0),)


def test_reads_of_a_removed_patch_are_not_those_of_its_next_load():
    patches = loaded()
    patches.load(Path("/a"))
    lease = patches.lease([PatchRef("a")])
    count(lease[0], 7, 3)
    patches.remove("a")
    # the request goes on, and its reads are taken
    assert patches.take_counts() == (PatchStatistics("a", 7, 3),)
    patches.load(Path("/a-again"))
    assert patches.take_counts() == ()
    # a patch that was freed counts from 0
    patches.remove("a")
    del lease
    patches.load(Path("/a"))
    count(patches.lease([PatchRef("a")])[0], 7, 3)
    assert patches.take_counts() == (PatchStatistics("a", 7, 3),)
