"""Loads of row patches in a thread: answers, errors and order, while steps go on."""

import multiprocessing
import threading

import pytest

from engine.errors import PatchFailedError, PatchRefusedError
from engine.messages import EngineReady, Heartbeat, LoadPatch, PatchLoaded, UnloadPatch
from engine.patch_loading import PatchLoading
from engine.process import EngineLoop, run_engine
from engine.request import PatchSummary, StepOutput
from tests.engine.test_process import LIMITS, CountingEngine, request

NAMES = ("good", "refused", "broken", "unreadable")
SUMMARY = PatchSummary("a", 3, 100, {"memory.table": 3})


class PatchedEngine(CountingEngine):
    """A fake engine whose loads wait for an event, and end as their folder's name says."""

    def __init__(self):
        super().__init__()
        self.may_load = threading.Event()
        self.calls = []

    def load_patch(self, folder, content_hash=None):
        self.may_load.wait()
        self.calls.append((folder.name, content_hash))
        if folder.name == "refused":
            raise PatchRefusedError(f"{folder}: shapes.t: wrong")
        if folder.name == "unreadable":
            raise PatchFailedError("Too many open files")
        if folder.name == "broken":
            raise MemoryError
        return SUMMARY

    def unload_patch(self, content_hash):
        self.calls.append(content_hash)


def test_messages_are_carried_out_in_order_and_each_load_is_answered():
    engine, answers = PatchedEngine(), []
    engine.may_load.set()
    loading = PatchLoading(engine, answers.append)
    for key, name in enumerate(NAMES):
        loading.submit(LoadPatch(str(key), f"/patches/{name}"))
        loading.submit(UnloadPatch(name))
    loading.submit(LoadPatch("4", "/patches/good", "a"))
    loading._thread.shutdown(wait=True)
    assert answers == [
        PatchLoaded("0", SUMMARY),
        PatchLoaded("1", error="/patches/refused: shapes.t: wrong"),
        PatchLoaded("2", error="MemoryError while the patch was loaded", kind=PatchFailedError),
        PatchLoaded("3", error="Too many open files", kind=PatchFailedError),
        PatchLoaded("4", SUMMARY),
    ]
    named = [call for name in NAMES for call in ((name, None), name)]
    assert engine.calls == [*named, ("good", "a")]


def test_an_answer_that_nobody_reads_does_not_end_the_thread():
    def closed(answer):
        answers.append(answer)
        raise BrokenPipeError

    engine, answers = PatchedEngine(), []
    engine.may_load.set()
    loading = PatchLoading(engine, closed)
    for key in "ab":
        loading.submit(LoadPatch(key, "/good"))
    loading._thread.shutdown(wait=True)
    assert [answer.key for answer in answers] == ["a", "b"]


def test_the_loads_that_wait_are_dropped_when_the_engine_ends():
    engine = PatchedEngine()
    ours, theirs = multiprocessing.Pipe()
    loop = EngineLoop(engine, theirs)
    thread = threading.Thread(target=loop.run)
    thread.start()
    ours.send([LoadPatch("a", "/a"), LoadPatch("b", "/b")])
    ours.send(None)
    thread.join(timeout=30)
    assert not thread.is_alive()
    engine.may_load.set()
    loop._patches._thread.shutdown(wait=True)
    assert engine.calls in ([("a", None)], [])


@pytest.fixture
def engine():
    return PatchedEngine()


@pytest.fixture
def connection(engine):
    ours, theirs = multiprocessing.Pipe()
    thread = threading.Thread(target=run_engine, args=(engine, theirs))
    thread.start()
    assert ours.recv() == EngineReady(LIMITS)
    yield ours
    engine.may_load.set()
    ours.close()
    thread.join(timeout=30)
    assert not thread.is_alive()


def test_steps_go_on_while_a_patch_is_loaded(connection, engine):
    connection.send([LoadPatch("key", "/good"), request("a", 1, 2, 3)])
    tokens = []
    while len(tokens) < 3:
        message = connection.recv()
        assert isinstance(message, StepOutput | Heartbeat)
        if isinstance(message, StepOutput):
            tokens += [token for output in message.outputs for token in output.token_ids]
    assert tokens == [1, 2, 3] and not engine.calls
    engine.may_load.set()
    while not isinstance(message := connection.recv(), PatchLoaded):
        assert isinstance(message, StepOutput | Heartbeat)
    assert message == PatchLoaded("key", SUMMARY)
