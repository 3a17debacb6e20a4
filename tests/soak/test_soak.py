"""Thousands of requests of every kind, cut off, overloaded and hostile: nothing is lost or held."""

import asyncio
import random

import pytest

from tests.server.running import Running, running
from tests.soak.drawn_requests import DrawnRequest, RequestSource
from tests.soak.hostile_clients import DEAF, NUM_DEAF, HostileClients
from tests.soak.load_client import LoadClient, Totals, async_client, together
from tests.soak.server_state import ServerState

pytestmark = pytest.mark.soak
SEED = 22
NUM_REQUESTS = 2000
NUM_TOGETHER = 64
# the first requests fill caches and pools of memory
NUM_WARM_UP = 400
MOST_GROWTH = 1.05
NUM_PLACES = 32 + 320
MODEL_LEN = 512
MAX_BODY_MIB = 4
OPTIONS = (
    # KV blocks for about half of the sequences that run at the same time
    *("--max-num-seqs", "32", "--max-queued-requests", "320", "--kv-cache-gib", "0.002"),
    *(
        "--max-bodies-mib",
        str(MAX_BODY_MIB),
        "--stream-write-timeout-s",
        "2",
        "--body-timeout-s",
        "2",
    ),
    *("--allow-priority", "--debug-checks"),
)
# its engine fails in steps with a token that only faulty requests have
PROGRAM = "tests.server.faulty_serve"


def drawn(source: RequestSource, rng: random.Random, count: int) -> list[DrawnRequest]:
    """Requests of which a third is cut off, and one in fifty fails."""
    return [
        source.draw(rng, cut=number % 3 == 0, faulty=number % 50 == 1) for number in range(count)
    ]


def check_nothing_is_held(server: Running) -> None:
    """One request gets all places and all tokens of the admission, another all body bytes."""
    # the limit of tokens is half of what all places could need
    prompts = [[1] * (MODEL_LEN // 2 - 1)] * NUM_PLACES
    assert server.complete(prompt=prompts, max_tokens=1).status_code == 200
    too_long = server.complete(prompt="x" * (MAX_BODY_MIB * 2**20 - 100))
    assert too_long.status_code == 400


def check_counters(state: ServerState, totals: Totals, deaf: int) -> None:
    """The metrics are the sums over the answers, plus what the cut requests had until then."""
    reasons = state.by("request_success_total", "finished_reason")
    print(f"metrics: {reasons}; clients: {totals}")
    for reason in ("stop", "error"):
        assert reasons[reason] == totals.reasons[reason]
    # some answers that nobody reads, and few others, end before they are cut
    late = reasons["length"] - totals.reasons["length"]
    assert 0 <= late <= deaf + totals.cut_samples // 100
    assert totals.begun_samples + deaf <= reasons["abort"] + late <= totals.cut_samples + deaf
    # every request that began has ended, once
    assert state.total("request_prompt_tokens_count") == sum(reasons.values())
    prompt_tokens = state.total("prompt_tokens_total")
    assert prompt_tokens == state.total("request_prompt_tokens_sum")
    deaf_tokens = deaf * len(DEAF["prompt"])
    of_cut = prompt_tokens - totals.prompt_tokens - deaf_tokens
    assert totals.begun_prompt_tokens <= of_cut <= totals.cut_prompt_tokens
    generated = state.total("generation_tokens_total")
    assert generated == state.total("request_generation_tokens_sum")
    assert generated >= totals.generated_tokens


@pytest.mark.parametrize("speculate", ["none", "ngram"])
def test_2000_requests_of_which_a_third_is_cut_off(
    memory_plus_folder, source, chat_template, speculate
):
    rng = random.Random(f"{SEED} {speculate}")
    print(f"\nseed {SEED}, speculate {speculate}")
    options = (*OPTIONS, "--speculate", speculate, "--chat-template", str(chat_template))
    with running(memory_plus_folder, *options, program=PROGRAM) as server:
        source.ask_seeded(server)
        state = ServerState(server)
        load = asyncio.run(soak(server, source, state, rng))
        growth = state.memory_growth()
        print(f"MiB in the first and the last quarter: {growth}")
        assert all(last < MOST_GROWTH * first for first, last in growth.values())
        assert state.total("num_preemptions_total") > 0
        assert (state.total("spec_decode_num_accepted_tokens_total") > 0) == (speculate == "ngram")
        load.totals.add_seeded(source)
        check_counters(state, load.totals, NUM_DEAF * DEAF["n"])
        check_nothing_is_held(server)
        server.process.terminate()
        assert server.process.wait(timeout=60) == 0


async def soak(
    server: Running, source: RequestSource, state: ServerState, rng: random.Random
) -> LoadClient:
    """Warm up, then send the requests next to hostile clients, until the server is idle again."""
    async with async_client(server.url) as http:
        load = LoadClient(http)
        await together(NUM_TOGETHER, drawn(source, rng, NUM_WARM_UP), load.send)
        num_sent = 0

        async def send(request: DrawnRequest) -> None:
            nonlocal num_sent
            await load.send(request)
            num_sent += 1
            if num_sent % 20 == 0:
                state.note_memory()
            if num_sent % 250 == 0:
                print(f"{num_sent} of {NUM_REQUESTS}: {dict(load.totals.reasons)}")

        async with HostileClients(http, server.address) as hostile:
            await hostile.send_slowly()
            await together(NUM_TOGETHER, drawn(source, rng, NUM_REQUESTS), send)
            # connections that read nothing are still open, and hold nothing
            await asyncio.to_thread(state.wait_until_idle)
            assert hostile.num_refused > 0 and hostile.were_cut()
            print(f"{hostile.num_refused} times nonsense refused")
    assert not load.totals.refused
    return load
