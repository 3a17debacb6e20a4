"""Ten times as many clients as the server admits: it refuses, and loses nothing that it admits."""

import asyncio
import random

import pytest

from tests.server.running import running
from tests.soak.drawn_requests import DrawnRequest
from tests.soak.load_client import LoadClient, async_client, together
from tests.soak.server_state import ServerState

pytestmark = pytest.mark.soak
SEED = 23
NUM_PLACES = 24
NUM_REQUESTS = 960
OPTIONS = ("--max-num-seqs", "8", "--max-queued-requests", "16", "--allow-priority")


def test_every_admitted_request_is_answered_and_counted(memory_plus_folder, source, chat_template):
    rng = random.Random(SEED)
    print(f"\nseed {SEED}")
    options = (*OPTIONS, "--chat-template", str(chat_template))
    with running(memory_plus_folder, *options, program="tests.server.faulty_serve") as server:
        source.ask_seeded(server)
        state = ServerState(server)
        requests = [
            source.draw(rng, cut=False, faulty=number % 50 == 1) for number in range(NUM_REQUESTS)
        ]

        async def overload() -> LoadClient:
            async with async_client(server.url) as http:
                load = LoadClient(http)

                async def insist(request: DrawnRequest) -> None:
                    while (await load.send(request)).status == 503:
                        pass

                await together(10 * NUM_PLACES, requests, insist)
                return load

        totals = asyncio.run(overload()).totals
        state.wait_until_idle()
        totals.add_seeded(source)
        print(totals)
        assert sum(totals.reasons.values()) >= NUM_REQUESTS
        assert state.by("request_success_total", "finished_reason") == totals.reasons
        assert state.total("prompt_tokens_total") == totals.prompt_tokens
        assert state.total("generation_tokens_total") == totals.generated_tokens
        assert state.total("admission_rejections_total") == totals.refused > NUM_REQUESTS
        # all places are free
        answer = server.complete(prompt=[[1]] * NUM_PLACES, max_tokens=1)
        assert answer.status_code == 200
        server.process.terminate()
        assert server.process.wait(timeout=60) == 0
