"""Row patches in a running server: answers, bits, prefix sharing, limits, keys and restarts."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import httpx
import openai
import pytest

from engine.config import EngineConfig
from engine.errors import ConfigError
from server.config import EngineSettings
from server.engine_entry import build_engine
from server.model_options import ModelOptions
from tests.models import (
    HERMES_TEMPLATE,
    feed_forward_changes,
    plain_greedy,
    plain_logits,
    random_model,
    save_model,
    tiny_config,
)
from tests.server.http.test_completions import GREEDY, stream
from tests.server.running import Running, running
from tests.server.test_serve import engine_of
from tests.weights.patches.made import IDENTITY, saved_patch
from weights.checkpoints.checkpoint import load_model
from weights.models.named_models import ModelFolder
from weights.patches.apply import apply_patch
from weights.patches.model_identity import model_identity

ADMIN = {"Authorization": "Bearer root"}
TENANT = {"Authorization": "Bearer tenant"}
IDS = [77, 101, 109, 111, 114, 121]
LONG = [65 + place % 26 for place in range(40)]
OTHER = [66 + place % 25 for place in range(40)]
MODEL = "tiny-memory"
ROUTE = "/v1/memory/patches"


@pytest.fixture(scope="module")
def patch_dir(memory_plus_folder, tmp_path_factory) -> Path:
    """Patches of 40 rows: base and kept for the start; a, b and bad ones to load."""
    folder = tmp_path_factory.mktemp("patches")
    identity = model_identity(memory_plus_folder)
    for seed, name in enumerate(("base", "kept", "a", "b", "fifth", "sixth")):
        saved_patch(folder / name, model=identity, seed=seed, count=40)
    saved_patch(folder / "large", model=identity, seed=9, count=41)
    saved_patch(folder / "foreign", model=IDENTITY)
    saved_patch(folder / "truncated", model=identity, seed=8)
    file = folder / "truncated" / "patch.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    (folder / "outside").symlink_to(memory_plus_folder)
    return folder


@pytest.fixture(scope="module")
def server(memory_plus_folder, patch_dir):
    """A server with the default patch base and the patch kept; its client has an admin's key."""
    template = patch_dir / "hermes.jinja"
    template.write_text(HERMES_TEMPLATE)
    options = ("--patch", f"base={patch_dir}/base", f"kept={patch_dir}/kept")
    options += ("--default-patches", "base", "--patch-dir", str(patch_dir))
    options += ("--max-patches", "5", "--max-patch-rows", "40", "--engine-restarts", "2")
    options += ("--api-key", "root admin", "tenant patches=kept:a")
    options += ("--chat-template", str(template))

    def client(url: str) -> httpx.Client:
        return httpx.Client(base_url=url, timeout=60, headers=ADMIN)

    with running(memory_plus_folder, *options, client=client) as started:
        yield started


@pytest.fixture(scope="module")
def expected(memory_plus_folder, patch_dir, tmp_path_factory):
    """Greedy tokens and logits of the plain loop, on models that patches were written into."""
    parent = tmp_path_factory.mktemp("applied")
    models = {}

    def model(*names):
        folder = memory_plus_folder
        for depth, name in enumerate(names, 1):
            target = parent / "+".join(names[:depth])
            if not target.exists():
                apply_patch(folder, patch_dir / name, target)
            folder = target
        if names not in models:
            models[names] = load_model(folder)[0]
        return models[names]

    return model


def load(server: Running, name: str) -> httpx.Response:
    return server.http.post(ROUTE, json={"name": name})


def names(server: Running) -> list[str]:
    return [one["name"] for one in server.http.get(ROUTE).json()["data"]]


@pytest.fixture
def loaded(server):
    """Loads patches, and removes them after the test."""
    done = []

    def load_all(*wanted):
        for name in wanted:
            answer = load(server, name)
            assert answer.status_code == 200, answer.text
            done.append(name)

    yield load_all
    for name in done:
        if name in names(server):
            assert server.http.delete(f"{ROUTE}/{name}").status_code == 200


def until_deadline():
    """Yields for a minute, then fails: what a test waits for should have happened by then."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        yield
    pytest.fail("it did not happen within a minute")


def ids(server: Running, count=12, **body) -> list[int]:
    """Greedy token ids of an answer to IDS."""
    options = {"prompt": IDS, "max_tokens": count, "return_token_ids": True, **GREEDY}
    answer = server.complete(**options | body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["token_ids"]


def test_answers_are_those_of_models_that_patches_were_written_into(server, expected, loaded):
    loaded("a")
    for body, patches in (
        ({}, ("base",)),
        ({"model": MODEL}, ("base",)),
        ({"memory_patches": []}, ()),
        ({"memory_patches": ["a"]}, ("a",)),
        ({"model": f"{MODEL}+a"}, ("a",)),
        ({"memory_patches": ["kept", {"name": "a", "scale": 1}]}, ("a", "kept")),
    ):
        assert ids(server, **body) == plain_greedy(expected(*patches), IDS, 12), body
    assert len({tuple(ids(server, memory_patches=one)) for one in ([], ["a"], ["kept"])}) == 3
    body = {"prompt": IDS, "max_tokens": 0, "echo": True, "logprobs": 1}
    scored = server.complete(**body, memory_patches=["a"]).json()["choices"][0]["logprobs"]
    plain = plain_logits(expected("a"), IDS).log_softmax(-1)
    wanted = [float(plain[at, token]) for at, token in enumerate(IDS[1:])]
    assert scored["token_logprobs"][1:] == pytest.approx(wanted, rel=1e-4, abs=1e-4)


def test_streams_chat_and_the_openai_client(server, expected, loaded):
    loaded("a")
    wanted = plain_greedy(expected("a"), IDS, 12)
    body = {"prompt": IDS, "max_tokens": 12, "return_token_ids": True, **GREEDY}
    events = stream(server, **body, model=f"{MODEL}+a")
    assert [i for one in events for i in one["choices"][0]["token_ids"]] == wanted
    assert {one["model"] for one in events} == {f"{MODEL}+a"}

    message = {"role": "user", "content": "who"}
    for model, patches in ((f"{MODEL}+a", None), (MODEL, ["a"])):
        chat = {"messages": [message], "model": model, "memory_patches": patches, "max_tokens": 9}
        answer = server.http.post(
            "/v1/chat/completions", json=chat | GREEDY | {"return_token_ids": True}
        ).json()
        assert answer["model"] == model
        prompt = answer["prompt_token_ids"]
        assert answer["choices"][0]["token_ids"] == plain_greedy(expected("a"), prompt, 9)

    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="root", max_retries=0)
    extra = {"ignore_eos": True, "return_token_ids": True}
    for model, patches in ((f"{MODEL}+a", {}), (MODEL, {"memory_patches": ["a"]})):
        one = client.completions.create(
            model=model, prompt=IDS, max_tokens=12, temperature=0, extra_body=extra | patches
        )
        assert one.choices[0].token_ids == wanted
    assert {f"{MODEL}+a", f"{MODEL}+base"} < {one.id for one in client.models.list().data}
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model=f"{MODEL}+none", prompt="x")


def test_a_patch_that_is_not_asked_for_changes_no_bit(server, memory_server):
    def bits(one, **body):
        options = {"prompt": [IDS, LONG], "max_tokens": 8, "logprobs": 3, "seed": 5, "n": 2}
        return [c["logprobs"] for c in one.complete(**options | body).json()["choices"]]

    before = bits(memory_server)
    assert bits(server, memory_patches=[]) == before
    assert load(server, "a").status_code == 200
    assert bits(server, memory_patches=[]) == before
    assert bits(server, memory_patches=["a"]) != before
    assert bits(server, memory_patches=[{"name": "a", "scale": 0}]) == before
    assert server.http.delete(f"{ROUTE}/a").status_code == 200
    assert bits(server, memory_patches=[]) == before
    assert bits(server) != before  # the default patch


def test_patches_come_and_go_while_streams_run(server, expected):
    """A stream without patches is not changed by a load, and one with a patch finishes with it."""
    body = {"prompt": IDS, "max_tokens": 400, "return_token_ids": True, "stream": True, **GREEDY}

    def tokens_of(event):
        return json.loads(event.removeprefix("data: "))["choices"][0]["token_ids"]

    def streamed(change, undo, **patches):
        """Tokens of a stream that still runs when the change is answered."""
        for _ in range(10):
            with server.http.stream("POST", "/v1/completions", json=body | patches) as response:
                events = (line for line in response.iter_lines() if line)
                tokens = tokens_of(next(events))
                change()
                is_running = server.metric("memplus:num_requests_running") == 1
                for event in events:
                    tokens += [] if event == "data: [DONE]" else tokens_of(event)
            if is_running:
                return tokens
            undo()
        pytest.fail("each stream had ended before the change was answered")

    def load_a():
        assert load(server, "a").status_code == 200

    def remove_a():
        assert server.http.delete(f"{ROUTE}/a").status_code == 200

    wanted = ids(server, count=400, memory_patches=[])
    assert streamed(load_a, remove_a, memory_patches=[]) == wanted
    with_a = ids(server, count=400, memory_patches=["a"])
    assert streamed(remove_a, load_a, memory_patches=["a"]) == with_a
    assert with_a[:12] == plain_greedy(expected("a"), IDS, 12) and with_a != wanted
    assert server.complete(prompt="x", memory_patches=["a"]).status_code == 400


def test_another_patch_under_a_removed_name_shares_no_prefix(server, patch_dir, expected, loaded):
    shutil.copytree(patch_dir / "a", patch_dir / "reused")
    loaded("reused")

    def answer(*patches):
        body = {"prompt": OTHER, "max_tokens": 5, "return_token_ids": True, **GREEDY}
        found = server.complete(**body, memory_patches=list(patches)).json()
        cached = found["usage"]["prompt_tokens_details"]["cached_tokens"]
        return found["choices"][0]["token_ids"], cached

    wanted = plain_greedy(expected("a"), OTHER, 5)
    assert answer("reused") == (wanted, 0)
    assert answer("reused") == (wanted, 32)
    # the same content under another name is the same patch
    loaded("a")
    assert answer("a") == (wanted, 32)
    assert answer("a", "kept")[1] == answer({"name": "a", "scale": 0.5})[1] == 0
    for name in ("reused", "a"):
        assert server.http.delete(f"{ROUTE}/{name}").status_code == 200
    shutil.rmtree(patch_dir / "reused")
    shutil.copytree(patch_dir / "b", patch_dir / "reused")
    loaded("reused")
    assert answer("reused") == (plain_greedy(expected("b"), OTHER, 5), 0)


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("none", 404, "no such folder"),
        ("outside", 400, "symbolic link"),
        ("foreign", 400, "row_choice"),
        ("truncated", 400, "patch.safetensors"),
        ("large", 400, "--max-patch-rows"),
        ("base", 409, "already loaded"),
    ],
)
def test_refused_patches_are_errors_and_nothing_changes(server, patch_dir, name, status, message):
    before = ids(server), names(server)
    answer = load(server, name)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert message in error["message"], error
    assert error["param"] == "name" and name in error["message"]
    assert str(patch_dir) not in error["message"]
    assert (ids(server), names(server)) == before


def test_the_number_of_patches_is_limited(server, patch_dir, loaded):
    loaded("a", "b", "fifth")
    refused = load(server, "sixth")
    assert refused.status_code == 400
    assert "--max-patches" in refused.json()["error"]["message"]
    assert server.http.delete(f"{ROUTE}/fifth").status_code == 200
    # another name of the same content
    shutil.copytree(patch_dir / "a", patch_dir / "copy")
    loaded("copy")
    assert ids(server, memory_patches=["copy"]) == ids(server, memory_patches=["a"])
    assert load(server, "sixth").status_code == 400
    assert server.http.delete(f"{ROUTE}/copy").status_code == 200
    loaded("sixth")


def test_a_limited_key_uses_only_its_patches(server, expected, loaded):
    loaded("a", "b")

    def asked(**body):
        options = {"prompt": IDS, "max_tokens": 12, "return_token_ids": True, **GREEDY}
        return server.http.post("/v1/completions", json=options | body, headers=TENANT)

    wanted = {names: plain_greedy(expected(*names), IDS, 12) for names in ((), ("a",))}
    for body, patches in (({}, ()), ({"model": f"{MODEL}+a"}, ("a",))):
        assert asked(**body).json()["choices"][0]["token_ids"] == wanted[patches]
    for body in ({"memory_patches": ["a", "b"]}, {"model": f"{MODEL}+b"}):
        answer = asked(**body)
        assert answer.status_code == 403 and "'b'" in answer.json()["error"]["message"]
    listed = server.http.get("/v1/models", headers=TENANT).json()["data"]
    assert [one["id"] for one in listed] == [MODEL, f"{MODEL}+a", f"{MODEL}+kept"]
    for answer in (
        server.http.post(ROUTE, json={"name": "fifth"}, headers=TENANT),
        server.http.delete(f"{ROUTE}/a", headers=TENANT),
    ):
        assert answer.status_code == 403


def patch_metrics(server: Running, name: str) -> dict[str, float]:
    """Values of the metrics of a patch."""
    lines = server.http.get("/metrics").text.splitlines()
    found = [line for line in lines if "patch_" in line and f'patch="{name}"' in line]
    return {
        line.partition("{")[0].removeprefix("memplus:"): float(line.split()[-1]) for line in found
    }


def test_metrics_count_reads_and_hits_until_the_name_is_removed(server, loaded):
    loaded("a")
    assert patch_metrics(server, "a")["patch_rows"] == 40
    # two memory layers, 2 heads and 3 rows; the statistics are refreshed about once a second
    for _ in until_deadline():
        ids(server, count=11, memory_patches=["a"])
        if patch_metrics(server, "a")["patch_reads_total"] >= 12 * 16:
            break
    found = patch_metrics(server, "a")
    assert 0 < found["patch_hits_total"] < found["patch_reads_total"]
    assert server.http.delete(f"{ROUTE}/a").status_code == 200
    assert patch_metrics(server, "a") == {}


@pytest.mark.slow
def test_a_restarted_engine_has_the_patches_that_are_still_in_their_folders(
    server, patch_dir, expected, loaded
):
    shutil.copytree(patch_dir / "a", patch_dir / "vanishing")
    loaded("b", "vanishing")
    before = ids(server), ids(server, memory_patches=["b"])
    shutil.rmtree(patch_dir / "vanishing")
    os.kill(engine_of(server), signal.SIGKILL)
    for is_ready in (False, True):
        for _ in until_deadline():
            if server.http.get("/ready").is_success == is_ready:
                break
    assert (ids(server), ids(server, memory_patches=["b"])) == before
    assert names(server) == ["b", "base", "kept"]
    answer = server.complete(prompt="x", memory_patches=["vanishing"])
    assert answer.status_code == 400
    assert load(server, "vanishing").status_code == 404


def test_a_server_does_not_start_with_a_patch_that_it_cannot_use(memory_plus_folder, patch_dir):
    options = ("--patch", f"law={patch_dir}/foreign")
    with pytest.raises(AssertionError) as raised, running(memory_plus_folder, *options):
        pass
    assert str(raised.value).splitlines()[-1].startswith("memplus: --patch: law: ")


@pytest.mark.parametrize("kind", ["dense", "peer"])
def test_a_model_that_takes_no_patches_is_not_served_with_them(tmp_path, kind):
    folder = save_model(random_model(tiny_config(**feed_forward_changes(kind))), tmp_path / "m")
    settings = EngineSettings(ModelOptions(model=str(folder)), ModelFolder(folder), EngineConfig())
    with pytest.raises(ConfigError, match="^patch_dir: .* start without --patch and --patch-dir$"):
        build_engine(settings, serves_patches=True)


def test_patches_are_not_served_with_weights_that_are_rounded_at_load(memory_plus_folder):
    model = ModelOptions(model=str(memory_plus_folder), weight_dtype="int8")
    settings = EngineSettings(model, ModelFolder(memory_plus_folder), EngineConfig())
    with pytest.raises(ConfigError, match="^weight_dtype: cannot be used with row patches"):
        build_engine(settings, serves_patches=True)
