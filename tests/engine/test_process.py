"""The engine process: its loop in a thread, and the handle of a real process."""

import multiprocessing
import signal
import threading

import pytest

from engine.errors import RequestError
from engine.messages import (
    Abort,
    DescribeMemory,
    EngineReady,
    EngineRefused,
    Heartbeat,
    MemoryReport,
)
from engine.process import EngineFailedError, EngineProcess, EngineStartError, run_engine
from engine.progress import Progress
from engine.request import EngineStatistics, Request, RequestLimits, StepOutput, TokenOutput
from engine.sampling.params import SamplingParams

LIMITS = RequestLimits(vocab_size=10, max_model_len=20)


class CountingEngine:
    """A fake engine: it returns each prompt's ids, one per step."""

    limits = LIMITS

    def __init__(self):
        self._left = {}
        self.progress = Progress()

    @property
    def has_work(self):
        return bool(self._left)

    def add(self, request):
        if not request.prompt_ids:
            raise RequestError("prompt", "is empty")
        self._left[request.request_id] = list(request.prompt_ids)

    def abort(self, request_id):
        self._left.pop(request_id, None)

    def step(self):
        outputs = []
        for name, ids in list(self._left.items()):
            token = ids.pop(0)
            if not ids:
                del self._left[name]
            outputs.append(TokenOutput(name, (token,), None if ids else "length"))
        return StepOutput(tuple(outputs), self.statistics())

    def check_idle(self):
        pass

    def memory_report(self):
        raise KeyError("lost")

    def statistics(self):
        return EngineStatistics(num_running=len(self._left))


def output(receive):
    """The next message that is no heartbeat."""
    while isinstance(message := receive(), Heartbeat):
        pass
    return message


def request(name: str, *ids: int) -> Request:
    return Request(name, ids, SamplingParams())


@pytest.fixture
def connection():
    ours, theirs = multiprocessing.Pipe()
    thread = threading.Thread(target=run_engine, args=(CountingEngine(), theirs))
    thread.start()
    assert ours.recv() == EngineReady(LIMITS)
    yield ours
    ours.close()
    thread.join(timeout=30)
    assert not thread.is_alive(), "the loop did not end when the other side closed"


def test_requests_are_answered_in_steps(connection):
    connection.send([request("a", 1, 2), request("b", 3)])
    first, second = output(connection.recv), output(connection.recv)
    assert first.outputs == (TokenOutput("a", (1,)), TokenOutput("b", (3,), "length"))
    assert second.outputs == (TokenOutput("a", (2,), "length"),)


def test_a_refused_request_is_answered_and_does_not_affect_others(connection):
    connection.send([request("bad"), request("good", 1)])
    assert output(connection.recv).outputs == (
        TokenOutput("bad", finish_reason="error", error="prompt: is empty", error_param="prompt"),
    )
    assert output(connection.recv).outputs == (TokenOutput("good", (1,), "length"),)


def test_an_abort_of_the_last_request_still_sends_statistics(connection):
    connection.send([request("a", 1, 2), Abort("a")])
    assert output(connection.recv) == StepOutput((), EngineStatistics())


def test_a_report_that_fails_names_the_error(connection):
    connection.send([DescribeMemory()])
    messages = [output(connection.recv) for _ in range(2)]
    assert MemoryReport(error="KeyError") in messages


def answering(connection, settings):
    """An entry function for a real process."""
    if settings == "refuse":
        connection.send(EngineRefused("no such model"))
    elif settings == "fail":
        connection.send(EngineRefused("out of memory", is_failure=True))
    elif settings == "mask":
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        connection.send(EngineRefused(" ".join(sorted(one.name for one in blocked))))
    elif settings == "die":
        raise SystemExit(7)
    else:
        run_engine(CountingEngine(), connection)


ENTRY = "tests.engine.test_process:answering"


def test_a_process_answers_until_it_is_stopped():
    process = EngineProcess(ENTRY, "run")
    assert process.start() == EngineReady(LIMITS)
    process.send(request("a", 5))
    assert output(process.receive).outputs == (TokenOutput("a", (5,), "length"),)
    process.stop()
    assert multiprocessing.active_children() == []


def test_an_idle_process_sends_heartbeats():
    process = EngineProcess(ENTRY, "run")
    process.start()
    assert process.receive() == Heartbeat(0.0)
    process.stop()


def test_a_refused_start_gives_the_reason():
    with pytest.raises(EngineStartError, match="no such model") as caught:
        EngineProcess(ENTRY, "refuse").start()
    assert not isinstance(caught.value, EngineFailedError)


def test_signals_to_the_group_do_not_reach_a_process_even_before_its_first_line():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with pytest.raises(EngineStartError, match="^SIGINT SIGTERM$"):
        EngineProcess(ENTRY, "mask").start()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


@pytest.mark.parametrize(("settings", "said"), [("die", "exit 7"), ("fail", "out of memory")])
def test_a_start_that_fails_is_told_from_a_refusal(settings, said):
    with pytest.raises(EngineFailedError, match=said):
        EngineProcess(ENTRY, settings).start()


def test_output_of_a_killed_process_ends_with_eof():
    process = EngineProcess(ENTRY, "run")
    process.start()
    multiprocessing.active_children()[0].kill()
    with pytest.raises(EOFError):
        output(process.receive)
    process.stop()
