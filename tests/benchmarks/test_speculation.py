"""``memplus bench speculation``: a line per task and batch, and refused numbers."""

import json

import pytest

from benchmarks import speculation
from benchmarks.speculation_tasks import TASKS, Task
from engine.config import EngineConfig
from engine.engine import Engine
from engine.executors.executor import make_executor
from engine.request import Request
from engine.sampling.params import SamplingParams
from server.cli.main import main
from tests.engine.test_company import step_all, tokens
from weights.checkpoints.checkpoint import load_model
from weights.checkpoints.tokenizer import load_tokenizer


def test_every_task_and_batch_is_reported(memory_plus_folder, tmp_path, capsys, monkeypatch):
    tasks = (Task("copy", True, "a b c d " * 4), Task("other", False, "abc", temperature=1.0))
    monkeypatch.setattr(speculation, "TASKS", tasks)
    file = tmp_path / "out.json"
    options = ["--model", str(memory_plus_folder), "--dtype", "float32", "--batches", "1", "3"]
    options += ["--tokens", "24", "--rounds", "2", "--json", str(file)]
    assert main(["bench", "speculation", *options]) == 0
    results = json.loads(file.read_text())
    assert len(capsys.readouterr().out.splitlines()) == len(results) + 2
    given = [(result["task"], result["batch"]) for result in results]
    assert given == [("copy", 1), ("other", 1), ("copy", 3), ("other", 3)]
    for result in results:
        assert result["is_same"] and 0 < result["tokens"] <= 24 * result["batch"]
        assert min(result["plain_tokens_per_s"], result["tokens_per_s"], result["speedup"]) > 0
        assert 0 <= result["accepted_tokens"] <= result["draft_tokens"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batches", "1", "0"], "batches: must be at least 1, not 0"),
        (["--tokens", "1"], "tokens: must be at least 2, not 1"),
        (["--rounds", "0"], "rounds: must be at least 1, not 0"),
    ],
)
def test_a_wrong_option_is_refused_before_the_model_is_loaded(options, message, capsys):
    assert main(["bench", "speculation", "--model", "no-such-model", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_smollm2_copies_in_few_steps_and_says_the_same(smollm2):
    model, _ = load_model(smollm2, "float32")
    encode = load_tokenizer(smollm2).encode
    plain = EngineConfig(kv_cache_gib=0.1, max_model_len=1024)
    executor = make_executor(model, plain)
    for task in TASKS:
        params = SamplingParams(max_tokens=64, temperature=task.temperature, seed=1)
        outputs = []
        for config in (plain, EngineConfig(**(vars(plain) | {"speculate": "ngram"}))):
            engine = Engine(executor, config)
            engine.add(Request("a", tuple(encode(task.prompt)), params))
            outputs.append(step_all(engine)["a"])
        expected, found = outputs
        assert tokens(found) == tokens(expected), task.name
        drafted = sum(output.draft_tokens for output in found)
        if task.copies:
            # 12 rows take less than twice the time of one
            assert len(found) * 4 < len(expected), task.name
        else:
            # each draft costs a twentieth of a step or less
            assert len(found) + drafted / 20 < 1.03 * len(expected), task.name


def test_tasks_that_copy_and_others_are_measured():
    assert {task.copies for task in TASKS} == {True, False}
    for task in TASKS:
        assert not task.copies or task.start.split("=")[0].strip() in task.request
