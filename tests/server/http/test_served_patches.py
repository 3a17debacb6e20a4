"""Names of row patches: loading, removing, defaults, limits of keys, and metrics, without HTTP."""

import asyncio
import threading

import pytest

from engine.errors import (
    ConfigError,
    PatchBusyError,
    PatchFailedError,
    PatchRefusedError,
    RequestError,
)
from engine.process import EngineLostError
from engine.request import EngineStatistics, PatchRef, PatchStatistics, PatchSummary
from server.api_keys import parse_key
from server.http import served_patches
from server.http.errors import ApiError
from server.http.metrics import Metrics
from server.http.named_patches import NamedPatch
from server.http.served_patches import ServedPatches
from server.patch_options import PatchOptions

TENANT, NOBODY = parse_key("key patches=a:c", ""), parse_key("key patches=", "")


class FakeEngine:
    """Takes the place of the engine's client; a folder's content is its first letter."""

    def __init__(self):
        self.loaded, self.unloaded = [], []
        self.error = None

    async def answers(self, folder):
        """Return when the engine answers the load of a folder."""
        await asyncio.sleep(0)

    async def load_patch(self, folder):
        await self.answers(folder)
        if self.error is not None:
            raise self.error
        self.loaded.append(folder)
        return PatchSummary(folder.name[0] * 64, 7, 100, {"memory.table": 7})

    def unload_patch(self, content_hash, folder):
        self.unloaded.append((content_hash, folder.name))


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def metrics():
    return Metrics("mock")


@pytest.fixture
def patches(engine, metrics, tmp_path):
    """Patches a and b of the start, of which b is a default one; c, d and a copy of a to load."""
    for name in ("a", "b", "c", "d", "a2"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "inner").symlink_to("c")
    outside = tmp_path.with_name(f"{tmp_path.name}-outside")
    outside.mkdir(exist_ok=True)
    (tmp_path / "out").symlink_to(outside)
    (tmp_path / "loop").symlink_to("loop")
    options = PatchOptions(
        patch=(f"a={tmp_path}/a", f"b={tmp_path}/b"),
        default_patches=("b",),
        patch_dir=str(tmp_path),
    )
    served = ServedPatches(engine, metrics.patches, options, 4)
    asyncio.run(served.load_first())
    return served


def names(patches, key=None):
    return [one.name for one in patches.of_key(key)]


def refused(status, work):
    """The message of an ApiError."""
    with pytest.raises(ApiError) as raised:
        asyncio.run(work)
    assert raised.value.status == status
    return str(raised.value)


def test_patches_are_loaded_from_their_folder_once(patches, engine, tmp_path):
    assert names(patches) == ["a", "b"]
    served = asyncio.run(patches.load("c"))
    assert served.name == "c" and not served.is_default and patches["b"].is_default
    assert engine.loaded[-1] == tmp_path / "c" and "c" in patches
    assert "already loaded" in refused(409, patches.load("c"))


@pytest.mark.parametrize(
    ("name", "status"), [("none", 404), ("file", 400), ("inner", 400), ("out", 400), ("loop", 400)]
)
def test_other_folders_are_not_loaded(patches, engine, name, status):
    count = len(engine.loaded)
    assert f"patch {name}: " in refused(status, patches.load(name))
    assert len(engine.loaded) == count and name not in patches


def test_refused_patches_and_a_dead_engine_are_errors(patches, engine, tmp_path, caplog):
    engine.error = PatchRefusedError(f"{tmp_path}/c/patch.json: is missing")
    # the log names the folder, clients do not see it
    assert refused(400, patches.load("c")) == "name: patch 'c': c/patch.json: is missing"
    assert str(tmp_path) in caplog.text
    engine.error = PatchFailedError(f"{tmp_path}/c: Too many open files")
    message = "name: patch 'c' could not be loaded; the server's log says why"
    assert refused(500, patches.load("c")).startswith(message)
    assert "Too many open files" in caplog.text
    message = "--max-patches: 4 row patches are allowed; requests still use removed patches"
    engine.error = PatchBusyError(message)
    with pytest.raises(ApiError, match=f"^name: patch 'c': {message}$") as raised:
        asyncio.run(patches.load("c"))
    assert raised.value.status == 503 and raised.value.headers == {"Retry-After": "5"}
    assert raised.value.body["error"]["param"] == "name"
    engine.error = EngineLostError("the engine is not running")
    refused(503, patches.load("c"))
    assert names(patches) == ["a", "b"]
    engine.error = None
    assert asyncio.run(patches.load("c")).name == "c"


def test_a_failure_at_the_start_names_the_patch(engine, metrics):
    engine.error = PatchRefusedError("x: No such file")
    served = ServedPatches(engine, metrics.patches, PatchOptions(patch=("law=x",)), 1)
    with pytest.raises(ConfigError, match="patch: law: x: No such file"):
        asyncio.run(served.load_first())


def test_without_a_folder_of_patches_none_can_be_loaded(engine, metrics):
    served = ServedPatches(engine, metrics.patches, PatchOptions(), 1)
    assert "without --patch-dir" in refused(400, served.load("a"))


def refused_unload(status, patches, name):
    """The message of an ApiError."""
    with pytest.raises(ApiError) as raised:
        asyncio.run(patches.unload(name))
    assert raised.value.status == status
    return str(raised.value)


def test_each_name_is_taken_back_from_the_engine(patches, engine):
    asyncio.run(patches.load("a2"))
    asyncio.run(patches.unload("a"))
    assert names(patches) == ["a2", "b"]
    asyncio.run(patches.unload("a2"))
    assert engine.unloaded == [("a" * 64, "a"), ("a" * 64, "a2")]
    assert "no patch 'a2' is loaded" in refused_unload(404, patches, "a2")
    assert "default" in refused_unload(409, patches, "b")


def test_a_slow_load_delays_no_other_change(patches, engine):
    may_load = asyncio.Event()

    async def slow(folder):
        if folder.name == "c":
            await may_load.wait()

    async def scenario():
        engine.answers = slow
        loading = asyncio.create_task(patches.load("c"))
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="patch 'c' is being loaded") as raised:
            await patches.load("c")
        assert raised.value.status == 409
        with pytest.raises(ApiError, match="patch 'c' is being loaded"):
            await patches.unload("c")
        await patches.load("d")
        await patches.unload("a")
        assert names(patches) == ["b", "d"] and not loading.done()
        may_load.set()
        assert (await loading).name == "c"

    asyncio.run(asyncio.wait_for(scenario(), 60))
    assert names(patches) == ["b", "c", "d"]


def test_a_load_that_takes_too_long_is_given_up(patches, engine, metrics, monkeypatch):
    async def hang(folder):
        await asyncio.Event().wait()

    engine.answers = hang
    with monkeypatch.context() as patch:
        patch.setattr(served_patches, "_LOAD_TIMEOUT_S", 0.05)
        assert "patch 'c' was not loaded within 0.05 s" in refused(504, patches.load("c"))
    engine.answers = FakeEngine().answers
    assert asyncio.run(patches.load("c")).name == "c"
    assert 'result="failed"} 1.0' in metrics.render().decode()


def test_a_hung_folder_is_given_up_and_holds_no_other_thread(patches, monkeypatch):
    is_back = threading.Event()
    monkeypatch.setattr(served_patches, "folder_in", lambda *_: is_back.wait(60))
    monkeypatch.setattr(served_patches, "_LOAD_TIMEOUT_S", 0)

    async def scenario():
        for name in ("c", "d", "e"):
            with pytest.raises(ApiError, match="was not loaded within 0 s"):
                await patches.load(name)
        # the threads of the event loop encode prompts
        assert asyncio.get_running_loop()._default_executor is None

    try:
        asyncio.run(scenario())
    finally:
        is_back.set()


def test_names_are_limited_like_patches(patches, engine):
    may_load = asyncio.Event()

    async def slow(folder):
        await may_load.wait()

    async def scenario():
        engine.answers = slow
        loading = asyncio.create_task(patches.load("c"))
        copying = asyncio.create_task(patches.load("a2"))
        with pytest.raises(ApiError, match="name: patch 'd': --max-patches: 4 row patches are"):
            await patches.load("d")
        may_load.set()
        await asyncio.gather(loading, copying)

    asyncio.run(asyncio.wait_for(scenario(), 60))
    refused(400, patches.load("d"))
    refused(404, patches.load("none"))
    asyncio.run(patches.unload("a2"))
    asyncio.run(patches.load("d"))
    assert names(patches) == ["a", "b", "c", "d"]


def test_a_lost_patch_of_the_start_comes_back_from_its_folder(patches, engine, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    options = PatchOptions(patch=(f"law={tmp_path}/elsewhere",), default_patches=("law",))
    served = ServedPatches(engine, Metrics("mock").patches, options, 1)
    asyncio.run(served.load_first())
    served.check_defaults()
    served._lost("e" * 64)
    with pytest.raises(ApiError, match="^a default row patch was lost"):
        served.check_defaults()
    assert asyncio.run(served.load("law")).is_default
    assert engine.loaded[-1] == tmp_path / "elsewhere"
    served.check_defaults()


def test_requests_get_content_hashes_in_canonical_order(patches):
    a, b = "a" * 64, "b" * 64
    assert patches.refs(None, None) == (PatchRef(b),)
    assert patches.refs([], None) == ()
    for scales in ((60.0, 50.0), (-100.0, -0.5)):
        with pytest.raises(RequestError, match="memory_patches: scale must be -100 to 100, not"):
            patches.refs([NamedPatch("a", scale) for scale in scales], None)
    named = [NamedPatch("b", 0.5), NamedPatch("a"), NamedPatch("b", -2.0)]
    assert patches.refs(named, None) == (PatchRef(a), PatchRef(b, -1.5))
    with pytest.raises(RequestError, match="memory_patches: no patch 'c' is loaded"):
        patches.refs([NamedPatch("c")], None)


def test_a_key_uses_only_its_patches(patches):
    assert names(patches, TENANT) == ["a"] and names(patches, NOBODY) == []
    assert patches.refs([NamedPatch("a")], TENANT) == (PatchRef("a" * 64),)
    # the default patch is not for them
    assert patches.refs(None, TENANT) == patches.refs(None, NOBODY) == ()
    # loaded or not, the answer is the same
    for name in ("b", "d"):
        with pytest.raises(ApiError, match=f"may not use patch '{name}'") as raised:
            patches.refs([NamedPatch("a"), NamedPatch(name)], TENANT)
        assert raised.value.status == 403


def test_a_lost_patch_has_no_names_and_a_lost_default_is_an_error(patches, engine):
    asyncio.run(patches.load("a2"))
    engine.on_patch_lost("a" * 64)
    assert names(patches) == ["b"]
    engine.on_patch_lost("b" * 64)
    with pytest.raises(ApiError, match="default patch 'b' was lost") as raised:
        patches.refs(None, None)
    assert raised.value.status == 503
    assert patches.refs([], None) == ()
    # its name is free again
    assert asyncio.run(patches.load("b")).is_default
    assert patches.refs(None, None) == (PatchRef("b" * 64),)


def counts(metrics, name):
    """Values of a metric by patch."""
    found = {}
    for line in metrics.render().decode().splitlines():
        if line.startswith(f"memplus:patch_{name}{{"):
            found[line.split('patch="')[1].split('"')[0]] = float(line.split()[-1])
    return found


def test_counters_continue_over_restarts_and_end_with_the_name(patches, metrics):
    def observe(*counted):
        statistics = [PatchStatistics(name * 64, *counts) for name, *counts in counted]
        metrics.observe_step(EngineStatistics(patches=tuple(statistics)))
        return counts(metrics, "reads_total"), counts(metrics, "hits_total")

    assert counts(metrics, "rows") == {"a": 7, "b": 7}
    assert observe(("a", 10, 4)) == ({"a": 10, "b": 0}, {"a": 4, "b": 0})
    assert observe(("a", 2, 1), ("b", 3, 3)) == ({"a": 12, "b": 3}, {"a": 5, "b": 3})
    metrics.observe_step(EngineStatistics())  # the engine has died
    assert observe(("a", 1, 0), ("other", 5, 5))[0] == {"a": 13, "b": 3}
    # each name counts from its own load
    asyncio.run(patches.load("a2"))
    assert observe(("a", 2, 0))[0] == {"a": 15, "a2": 2, "b": 3}
    asyncio.run(patches.unload("a"))
    for name in ("rows", "reads_total", "hits_total"):
        assert counts(metrics, name).keys() == {"a2", "b"}
    asyncio.run(patches.unload("a2"))
    # a request that still uses it
    assert observe(("a", 9, 9))[0] == {"b": 3}
    asyncio.run(patches.load("a"))
    assert observe(("a", 1, 1))[0] == {"a": 1, "b": 3}


def test_loads_are_counted_by_their_result(patches, engine, metrics):
    asyncio.run(patches.load("c"))
    for error in (PatchRefusedError("x"), PatchRefusedError("x"), PatchFailedError("x")):
        engine.error = error
        with pytest.raises(ApiError):
            asyncio.run(patches.load("d"))
    text = metrics.render().decode()
    for result, value in (("loaded", 3.0), ("refused", 2.0), ("failed", 1.0)):
        line = f'memplus:patch_loads_total{{model_name="mock",result="{result}"}} {value}'
        assert line in text.splitlines()
