"""Row patches of an engine process: answers, removals and reloads, with a fake engine."""

import asyncio
import logging
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.errors import PatchBusyError, PatchFailedError, PatchRefusedError
from engine.loaded_patches import LoadedPatches
from engine.messages import LoadPatch, PatchLoaded, UnloadPatch
from engine.patch_loading import PatchLoading
from engine.process import EngineLostError
from engine.request import PatchSummary
from server import engine_patches
from server.engine_patches import EnginePatches
from tests.engine.test_loaded_patches import MadePatches


class FakeEngine:
    """Records messages; ``answer`` answers the oldest load, of a folder named like its content."""

    def __init__(self):
        self.sent, self.lost = [], []
        self.patches = EnginePatches(self.sent.append)

    async def begun(self, folder: str) -> "asyncio.Task[PatchSummary]":
        """A load that waits for its answer."""
        task = asyncio.create_task(self.patches.load(Path(folder)))
        await asyncio.sleep(0)
        return task

    async def answer(
        self,
        content_hash: str | None = None,
        error: str = "refused",
        kind: type = PatchRefusedError,
    ):
        """Accept the oldest load in flight with a content hash, or refuse it."""
        message = self.sent.pop(0)
        assert isinstance(message, LoadPatch)
        summary = content_hash and PatchSummary(content_hash, 1, 12, {"memory.table": 1})
        text = None if summary else error
        self.patches.answer(PatchLoaded(message.key, summary, text, kind))
        for _ in range(5):
            await asyncio.sleep(0)
        return message

    async def loaded(self, folder: str, content_hash: str) -> None:
        task = await self.begun(folder)
        await self.answer(content_hash)
        assert (await task).content_hash == content_hash

    async def reload(self) -> "asyncio.Task[None]":
        """A reload that waits for its first answer."""
        task = asyncio.create_task(self.patches.reload(self.lost.append))
        for _ in range(3):
            await asyncio.sleep(0)
        return task

    def unload(self, folder: str, content_hash: str) -> None:
        self.patches.unload(content_hash, Path(folder))


class AsEngine:
    """Loaded patches behind the engine's methods."""

    def __init__(self, patches: LoadedPatches):
        self.load_patch, self.unload_patch = patches.load, patches.remove


def scenario(run):
    """Run a test's coroutine on a fake engine."""

    def test():
        asyncio.run(asyncio.wait_for(run(FakeEngine()), 60))

    test.__name__ = run.__name__
    return test


@scenario
async def test_a_load_gives_the_summary_or_the_reason(engine):
    first, second = await engine.begun("/a"), await engine.begun("/b")
    assert (await engine.answer("A"))[1:] == ("/a", None)
    assert (await first).content_hash == "A"
    await engine.answer(error="/b: shapes.t: wrong")
    with pytest.raises(PatchRefusedError, match="^/b: shapes.t: wrong$"):
        await second


@scenario
async def test_a_content_is_removed_after_the_last_of_its_loads(engine):
    for folder in ("/a", "/a", "/copy"):
        await engine.loaded(folder, "A")
    for folder in ("/a", "/copy"):
        engine.unload(folder, "A")
        assert engine.sent == []
    engine.unload("/a", "A")
    assert engine.sent == [UnloadPatch("A")]
    engine.unload("/a", "A")
    assert engine.sent == [UnloadPatch("A")]
    # nothing is left to load again
    await engine.patches.reload(engine.lost.append)
    assert len(engine.sent) == 1 and not engine.lost


@scenario
async def test_a_removal_is_sent_at_once_while_a_load_is_slow(engine):
    """It was held back until no load was in flight, so the next load was refused at the limit."""
    limited = LoadedPatches(EngineConfig(max_patches=2), MadePatches())
    limited.load(Path("/a"))
    await engine.loaded("/a", "a")
    slow = await engine.begun("/b")
    engine.unload("/a", "a")
    after = await engine.begun("/c")
    loading = PatchLoading(AsEngine(limited), engine.patches.answer)
    for message in engine.sent:
        loading.submit(message)
    loading._thread.shutdown(wait=True)
    assert [(await one).content_hash for one in (slow, after)] == ["b", "c"]


@scenario
async def test_a_removal_takes_no_patch_from_a_load_with_the_same_content(engine):
    await engine.loaded("/a", "A")
    await engine.loaded("/b", "B")
    copy = await engine.begun("/copy")
    for name in "ab":
        engine.unload(f"/{name}", name.upper())
    assert engine.sent[1:] == [UnloadPatch("A"), UnloadPatch("B")]
    # the engine has loaded it, and then removed it
    await engine.answer("A")
    assert not copy.done()
    del engine.sent[:2]
    assert (await engine.answer("A"))[1:] == ("/copy", None)
    assert (await copy).content_hash == "A" and not engine.sent
    engine.unload("/copy", "A")
    assert engine.sent == [UnloadPatch("A")]


@scenario
async def test_a_patch_that_nobody_waits_for_is_removed(engine):
    task = await engine.begun("/a")
    task.cancel()
    await asyncio.sleep(0)
    await engine.answer("A")
    assert engine.sent == [UnloadPatch("A")]


@scenario
async def test_a_load_that_is_cancelled_when_it_was_answered_is_taken_back(engine):
    task = await engine.begun("/a")
    message = engine.sent.pop()
    engine.patches.answer(PatchLoaded(message.key, PatchSummary("A", 1, 12, {})))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.sent == [UnloadPatch("A")]


@scenario
async def test_loads_fail_if_the_engine_dies_and_late_answers_are_ignored(engine):
    task = await engine.begun("/a")
    (message,) = engine.sent
    engine.patches.engine_died()
    with pytest.raises(EngineLostError, match="has died"):
        await task
    engine.patches.answer(PatchLoaded(message.key, PatchSummary("A", 1, 12, {})))
    await engine.patches.reload(engine.lost.append)
    assert engine.sent == [message] and not engine.lost


def test_a_new_engine_loads_all_patches_that_still_exist(caplog):
    @scenario
    async def run(engine):
        for folder, content in (("/a", "A"), ("/b", "B"), ("/copy", "A"), ("/c", "C")):
            await engine.loaded(folder, content)
        engine.unload("/c", "C")
        engine.sent.clear()
        engine.patches.engine_died()
        task = await engine.reload()
        assert (await engine.answer(error="/a: is gone"))[1:] == ("/a", "A")
        assert (await engine.answer("A"))[1:] == ("/copy", "A")
        assert (await engine.answer(error="/b: has changed"))[1:] == ("/b", "B")
        await task
        assert engine.lost == ["B"] and not engine.sent
        # what is lost stays lost; a folder that is back is used again
        task = await engine.reload()
        assert (await engine.answer("A"))[1:] == ("/a", "A")
        await task
        assert not engine.sent

    with caplog.at_level(logging.ERROR):
        run()
    assert [record.getMessage() for record in caplog.records] == [
        "row patch A: the new engine refuses it: /a: is gone",
        "row patch B: the new engine refuses it: /b: has changed",
    ]


@scenario
async def test_a_patch_that_is_removed_while_it_is_reloaded_stays_removed(engine):
    await engine.loaded("/a", "A")
    await engine.loaded("/b", "B")
    task = await engine.reload()
    engine.unload("/a", "A")
    engine.unload("/b", "B")
    await engine.answer("A")
    await task
    assert sorted(engine.sent) == [UnloadPatch("A"), UnloadPatch("B")] and not engine.lost


@scenario
async def test_a_reload_fails_if_the_new_engine_dies_too(engine):
    await engine.loaded("/a", "A")
    task = await engine.reload()
    engine.patches.engine_died()
    with pytest.raises(EngineLostError):
        await task
    engine.sent.clear()
    task = await engine.reload()
    await engine.answer("A")
    await task


@scenario
async def test_a_load_of_a_dead_engine_fails_at_once(engine):
    await engine.loaded("/a", "A")
    engine.patches.engine_died()
    with pytest.raises(EngineLostError, match="has died"):
        await engine.patches.load(Path("/b"))
    assert engine.sent == []


@pytest.mark.parametrize("answered", [1, 2])
def test_a_reload_fails_if_the_new_engine_dies_after_an_answer(answered):
    """Before the reload goes on with the next patch, or after the last one."""

    @scenario
    async def run(engine):
        await engine.loaded("/a", "A")
        await engine.loaded("/b", "B")
        task = await engine.reload()
        if answered == 2:
            await engine.answer("A")
        message = engine.sent.pop()
        engine.patches.answer(PatchLoaded(message.key, PatchSummary(message[2], 1, 12, {})))
        engine.patches.engine_died()
        with pytest.raises(EngineLostError):
            await task
        assert engine.sent == [] and not engine.lost

    run()


def test_failures_are_retried_together_before_patches_are_lost(monkeypatch, caplog):
    """The pauses between loads do not grow with the number of patches that fail."""
    paused, pause = [], asyncio.sleep

    async def sleep(seconds):
        paused.extend([seconds] if seconds else [])
        await pause(0)

    monkeypatch.setattr(engine_patches.asyncio, "sleep", sleep)

    @scenario
    async def run(engine):
        contents = {folder: folder[1].upper() for folder in ("/a", "/b", "/c", "/d")}
        for folder, content in contents.items():
            await engine.loaded(folder, content)
        task = await engine.reload()
        failures = {"error": "Too many open files", "kind": PatchFailedError}
        for folder in ("/a", "/b", "/c"):
            assert (await engine.answer(**failures))[1] == folder
        await engine.answer(error="/d: has changed")
        assert paused == [1.0]
        engine.unload("/c", "C")
        assert engine.sent.pop() == UnloadPatch("C")
        assert (await engine.answer("A"))[1] == "/a"
        for _ in range(2):
            assert (await engine.answer(**failures))[1] == "/b"
        await task
        assert engine.lost == ["B", "D"] and not engine.sent

    run()
    assert paused == [1.0, 5.0]
    assert "row patches: 3 are loaded again in 1 s" in caplog.text


@pytest.mark.parametrize("kind", [PatchRefusedError, PatchFailedError, PatchBusyError])
def test_an_error_keeps_its_kind(kind):
    @scenario
    async def run(engine):
        task = await engine.begun("/a")
        await engine.answer(error="MemoryError", kind=kind)
        with pytest.raises(kind, match="MemoryError") as raised:
            await task
        assert type(raised.value) is kind

    run()
