"""Tests of requests that run again when the engine dies."""

import asyncio
from types import SimpleNamespace

import pytest

from server.replicas.relayed_request import RelayedRequest, RoutingText
from server.replicas.retried_messages import retried_messages

TEXT = RoutingText("", "x")


class Application:
    """Answers with the next of its statuses; an engine of an answer with an error dies."""

    def __init__(self, *statuses, restarts):
        self.statuses, self.restarts = list(statuses), restarts
        self.engine = SimpleNamespace(is_alive=True)
        self.runs = 0

    async def __call__(self, scope, receive, send):
        self.runs += 1
        status = self.statuses.pop(0)
        if status >= 500:
            self.engine.is_alive = False
            asyncio.get_running_loop().call_later(0, self.restart)
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def restart(self):
        self.engine.is_alive = self.restarts


def statuses(application, text=TEXT, is_retry=False):
    """The status of each batch; 0 for an empty one."""

    async def run():
        request = RelayedRequest({}, b"", text, is_retry)
        batches = retried_messages(application, request, application.engine)
        return [batch[0]["status"] if batch else 0 async for batch in batches]

    return asyncio.run(asyncio.wait_for(run(), 60))


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr("server.replicas.retried_messages._LOOK_EVERY_S", 0)


@pytest.mark.parametrize("second", [200, 500])
def test_a_prompt_whose_engine_dies_runs_once_again(second):
    application = Application(500, second, restarts=True)
    assert statuses(application) == [0, second] and application.runs == 2


@pytest.mark.parametrize(("text", "is_retry"), [(TEXT, True), (None, False)])
def test_a_retry_and_a_request_without_a_prompt_do_not(text, is_retry):
    assert statuses(Application(500, restarts=True), text, is_retry) == [500]


def test_an_error_of_a_living_engine_is_the_answer():
    application = Application(400, restarts=True)
    assert statuses(application) == [400] and application.runs == 1
