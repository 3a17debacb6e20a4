"""Answers with ngram speculation equal those without, for every kind of request."""

import pytest
import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.executors.executor import make_executor
from engine.request import Request
from engine.sampling.params import SamplingParams
from server.config import EngineSettings
from server.engine_entry import build_engine
from server.model_options import ModelOptions
from tests.engine.delayed_executor import delayed
from tests.engine.test_company import KV_BYTES, Multiples, step_all, tokens
from tests.models import engine_of, greedy, random_model, tiny_config
from weights.models.named_models import ModelFolder

COUNT = 40
KINDS = {
    "greedy": {"temperature": 0},
    "scored": {"temperature": 0, "logprobs": 2, "prompt_logprobs": 0},
    "sampled": {"temperature": 0.3, "seed": 3},
    "truncated": {"temperature": 0.5, "seed": 4, "top_k": 5, "top_p": 0.9, "logprobs": 0},
    "penalised": {"temperature": 0, "frequency_penalty": 0.2, "repetition_penalty": 1.02},
    "biased": {"temperature": 0, "logit_bias": ((9, 1.0), (24, -1.0))},
    "banned": {"temperature": 0, "bad_words": ((9, 12), (24, 24)), "min_tokens": 5},
    "masked": {"temperature": 0},
}


@pytest.fixture(scope="module", params=[make_executor, delayed])
def model(request):
    torch.manual_seed(3)
    made = random_model(tiny_config(num_layers=1))
    made.make = request.param
    return made


def engine(model, speculate: str, kv_tokens: int = 4096, **config) -> Engine:
    settings = EngineConfig(kv_cache_gib=kv_tokens * KV_BYTES / 2 / 2**30, **config)
    settings = EngineConfig(**(vars(settings) | {"speculate": speculate}))
    return engine_of(model, settings, make=model.make)


def answers(served: Engine, stops: frozenset[int] = frozenset()) -> dict[str, list]:
    """Outputs by request; prompts repeat themselves and share a prefix."""
    for number, (name, sampling) in enumerate(KINDS.items()):
        # few tokens, so that answers repeat themselves; a mask allows each of them in its turn
        params = SamplingParams(
            COUNT,
            ignore_eos=True,
            stop_token_ids=stops,
            allowed_token_ids=frozenset({9, 12, 24}),
            **sampling,
        )
        prompt = (*([9, 12, 24, 24, 12, 12] * 4), number)
        served.add(Request(name, prompt, params), Multiples() if name == "masked" else None)
    return step_all(served)


@pytest.mark.parametrize(
    "config",
    [
        {"max_num_seqs": 2},
        {"kv_tokens": 160, "block_size": 4, "max_model_len": 96},
        {"max_batched_tokens": 9, "max_num_seqs": 9, "block_size": 4},
    ],
    ids=["two at a time", "preempted", "chunked"],
)
def test_every_kind_of_request_gets_the_same_tokens(model, config):
    plain, fast = engine(model, "none", **config), engine(model, "ngram", **config)
    expected = answers(plain)
    stop = tokens(expected["greedy"])[-1]
    found = answers(fast)
    assert {name: tokens(out) for name, out in found.items()} == {
        name: tokens(out) for name, out in expected.items()
    }
    for name, outputs in found.items():
        for kind in ("logprobs", "prompt_logprobs"):
            entries = [entry for output in outputs for entry in getattr(output, kind)]
            exact = [entry for output in expected[name] for entry in getattr(output, kind)]
            assert [entry.rank for entry in entries] == [entry.rank for entry in exact]
            assert [entry.logprob for entry in entries] == pytest.approx(
                [entry.logprob for entry in exact], abs=1e-4
            )
    counted = fast.statistics()
    assert (counted.preemptions > 0) == ("kv_tokens" in config)
    assert 0 < counted.accepted_tokens < counted.draft_tokens and plain.statistics().drafts == 0
    outputs = [output for several in found.values() for output in several]
    assert counted.draft_tokens == sum(output.draft_tokens for output in outputs)
    assert counted.accepted_tokens == sum(output.accepted_tokens for output in outputs)
    assert all(output.accepted_tokens <= len(output.token_ids) for output in outputs)
    # the same prompts again: from the prefix cache, and with an end among the drafts
    stops = frozenset({stop})
    again, ended = answers(plain, stops), answers(fast, stops)
    assert {name: tokens(out) for name, out in ended.items()} == {
        name: tokens(out) for name, out in again.items()
    }
    assert ended["greedy"][-1].finish_reason == "stop"


def test_a_repetition_takes_few_steps(model):
    forced = {"allowed_token_ids": frozenset({7})}
    plain, fast = engine(model, "none"), engine(model, "ngram")
    steps = []
    for served in (plain, fast):
        served.add(greedy("a", [1, 2], COUNT, **forced))
        steps.append(len(step_all(served)["a"]))
    assert steps[0] == COUNT and steps[1] < COUNT / 3


def test_a_sequence_that_leaves_keeps_no_index(model):
    served = engine(model, "ngram")
    served.add(greedy("a", [1, 2, 3] * 5, COUNT))
    for _ in range(4):
        served.step()
    (sequence,) = served._scheduler._running.values()
    assert sequence.drafter is not None
    served.abort("a")
    assert sequence.drafter is None


def test_the_setting_reaches_the_engine(memory_plus_folder):
    config = EngineConfig(kv_cache_gib=0.01, speculate="ngram", speculate_tokens=3)
    options = ModelOptions(model=str(memory_plus_folder), device="cpu")
    served = build_engine(EngineSettings(options, ModelFolder(memory_plus_folder), config))
    served.add(greedy("a", [1, 2] * 10, 20, allowed_token_ids=frozenset({7})))
    outputs = step_all(served)["a"]
    assert max(output.draft_tokens for output in outputs) == 3
