"""NaN in a model ends the requests that meet it with an error, and changes no other request."""

import pytest
import torch

from engine.config import EngineConfig
from engine.executors.executor import make_executor
from engine.request import Request
from engine.sampling.params import SamplingParams
from tests.engine.delayed_executor import delayed
from tests.models import eager, engine_of, feed_forward_changes, greedy, random_model, tiny_config

HIT = 126  # the token with NaN in its embedding
PROMPT = [97, HIT, 98, 99]
CLEAN = [97, 98, 99]
MASKED = "penalties, bans and masks leave no token, or "


@pytest.fixture(scope="module", params=[make_executor, eager, delayed])
def engine(request):
    torch.manual_seed(3)
    model = random_model(tiny_config())
    model.model.embed_tokens.weight[HIT] = torch.nan
    # few blocks, so that those which held NaN are soon used again
    gib = 40 * 16 * tiny_config().kv_bytes_per_token(itemsize=4) / 2**30
    config = EngineConfig(kv_cache_gib=gib, max_batched_tokens=64)
    return engine_of(model, config, make=request.param)


def finish(engine, *requests: Request):
    """The last output and all tokens of each request."""
    for request in requests:
        engine.add(request)
    last, tokens = {}, {request.request_id: [] for request in requests}
    while engine.has_work:
        for output in engine.step().outputs:
            last[output.request_id] = output
            tokens[output.request_id] += output.token_ids
        engine.check_integrity()
    return last, tokens


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": 0}, "the model's logits are not finite"),
        ({"temperature": 0.8, "seed": 1, "logprobs": 2}, "the model's logits are not finite"),
        ({"temperature": 0, "repetition_penalty": 1.5}, f"{MASKED}the model's logits"),
        ({"max_tokens": 0, "prompt_logprobs": 2}, "the model's log-probabilities are not finite"),
        ({"prompt_logprobs": 0}, "the model's log-probabilities are not finite"),
    ],
)
@pytest.mark.parametrize("padding", [0, 150])  # the longer prompt runs in several chunks
def test_a_request_that_meets_nan_fails_alone(engine, params, message, padding):
    clean = greedy("clean", CLEAN, 20, logprobs=1)
    _, alone = finish(engine, clean)
    sampling = SamplingParams(**({"max_tokens": 4} | params))
    hit = Request("hit", tuple(PROMPT + [100] * padding), sampling, cache_salt=str(params))
    last, tokens = finish(engine, clean, hit)
    assert last["hit"].finish_reason == "error" and message in last["hit"].error
    assert not last["hit"].prompt_logprobs and not tokens["hit"]
    assert tokens["clean"] == alone["clean"]
    for number in range(6):
        again = Request(str(number), tuple(CLEAN), clean.sampling, cache_salt=f"fresh {number}")
        assert finish(engine, again)[1][str(number)] == alone["clean"]


@pytest.mark.parametrize("make", [make_executor, eager])
@pytest.mark.parametrize("kind", ["memory_plus", "pkm", "peer", "moe"])
def test_nan_in_one_layer_is_an_error_after_layers_that_choose_rows(kind, make):
    torch.manual_seed(3)
    model = random_model(tiny_config(**feed_forward_changes("dense", kind, "moe", kind)))
    model.model.layers[0].mlp.down_proj.weight[:] = torch.nan
    engine = engine_of(model, EngineConfig(kv_cache_gib=0.01), make=make)
    last, _ = finish(engine, greedy("hit", CLEAN, 4), greedy("other", PROMPT, 4))
    assert [last[name].finish_reason for name in ("hit", "other")] == ["error"] * 2
