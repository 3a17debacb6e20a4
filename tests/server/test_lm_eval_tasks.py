"""lm-eval on the default model: tasks of our own, and tasks that lm-eval ships.

The latter keep their prompts and metrics, and ask made-up questions in the format of their data.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from server.config import EngineSettings
from server.engine_entry import build_engine
from server.model_options import ModelOptions
from tests.conftest import TOLERANCE
from tests.models import plain_greedy
from tests.server.lm_eval_runs import direct_score, evaluate
from tests.server.running import running
from weights.checkpoints.checkpoint import load_model
from weights.checkpoints.tokenizer import load_tokenizer
from weights.models.named_models import WORDNET, find_model
from weights.training.evaluate import Question, score_recall

pytestmark = pytest.mark.slow

MODEL = find_model(WORDNET, Path("unused"))
# its tokenizer begins every text with a token, as it did in training; lm-eval does so on request
CLIENT = {"model": WORDNET, "tokenizer": MODEL.folder, "add_bos_token": True, "max_length": 512}
EOS_ID = 2
TASKS = Path(__file__).parent / "lm_eval_tasks"
NOUNS = [json.loads(line) for line in (TASKS / "nouns.jsonl").read_text().splitlines()]
QUESTIONS = {
    "nq_open": [
        {"question": "what is the definition of a poem", "answer": ["a composition"]},
        {"question": "who wrote the origin of species", "answer": ["Charles Darwin", "Darwin"]},
    ],
    "triviaqa": [
        {"question": "Which is a large body of water", "answer": {"aliases": ["Ocean", "Sea"]}},
        {"question": "Who painted it", "answer": {"aliases": ["a painter"]}},
    ],
    "hellaswag": [
        {
            "ctx_a": "A man sits at a piano.",
            "ctx_b": "he",
            "activity_label": "Playing piano",
            "endings": ["plays [title] music.", "eats it.", "is a musical instrument.", "swims."],
            "label": "0",
        },
        {
            "ctx_a": "A dog runs.",
            "ctx_b": "the dog",
            "activity_label": "Pets",
            "endings": ["reads a book.", "barks.", "flies off.", "is a domestic animal kept."],
            "label": "1",
        },
        {
            "ctx_a": "Rain falls.",
            "ctx_b": "",
            "activity_label": "Weather",
            "endings": ["It is dry.", "It is wet.", "It is money.", "It is the act of paying."],
            "label": "3",
        },
    ],
    "piqa": [
        {"goal": "Open a jar", "sol1": "twist the lid", "sol2": "a lid", "label": 0},
        {"goal": "Cut paper", "sol1": "use a spoon", "sol2": "use a pair of scissors", "label": 1},
        {"goal": "Cool a drink", "sol1": "add ice", "sol2": "a state of matter", "label": 0},
    ],
}


@pytest.fixture(scope="module")
def server():
    with running(MODEL.folder, "--served-model-name", WORDNET, "--dtype", "float32") as started:
        yield started


@pytest.fixture(scope="module")
def direct():
    return load_model(MODEL.folder, "float32")[0], load_tokenizer(MODEL.folder)


def scored(direct, prompt, choices):
    return [direct_score(*direct, prompt, f" {choice}")[0] for choice in choices]


def best(scores):
    return scores.index(max(scores))


def test_a_task_of_our_own_has_the_accuracies_that_the_engine_computes(
    server, direct, tmp_path, monkeypatch
):
    # the task names its data from there
    monkeypatch.chdir(TASKS.parents[2])
    url = f"{server.url}/v1/completions"
    client = CLIENT | {"base_url": url, "num_concurrent": 4}
    names = ["definitions", "recall"]
    # the command of docs/evaluate.md as it is
    results, _ = evaluate(TASKS, tmp_path, "local-completions", names, program="lm_eval", **client)

    chosen = [best(scored(direct, f"{one['noun']} (noun):", one["choices"])) for one in NOUNS]
    right = sum(c == one["label"] for c, one in zip(chosen, NOUNS, strict=True))
    assert results["definitions"]["acc,none"] == right / len(NOUNS)
    assert 0 < right < len(NOUNS)

    questions = [Question(f"{one['noun']} (noun):", one["choices"][one["label"]]) for one in NOUNS]
    options = ModelOptions(dtype="float32")
    engine = build_engine(EngineSettings(options, MODEL, EngineConfig(kv_cache_gib=0.01)))
    recall = score_recall(engine, direct[1], questions).recall
    assert results["recall"]["exact_match,remove_whitespace"] == recall
    assert 0 < recall < 1


@pytest.fixture(scope="module")
def shipped_tasks(tmp_path_factory) -> Path:
    """lm-eval's own tasks, with our questions as their data."""
    folder = tmp_path_factory.mktemp("shipped-tasks")
    (package,) = importlib.util.find_spec("lm_eval").submodule_search_locations
    for task, file in [
        ("nq_open", "nq_open/nq_open.yaml"),
        ("triviaqa", "triviaqa/default.yaml"),
        ("hellaswag", "hellaswag/hellaswag.yaml"),
        ("piqa", "piqa/piqa.yaml"),
    ]:
        data = folder / f"{task}.jsonl"
        data.write_text("".join(f"{json.dumps(one)}\n" for one in QUESTIONS[task]))
        changed = {
            "include": str(Path(package) / "tasks" / file),
            "task": f"our_{task}",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"validation": str(data)}},
            "training_split": None,
        }
        (folder / f"{task}.yaml").write_text(json.dumps(changed))
    return folder


def test_the_tasks_that_it_ships_score_and_answer_like_the_model(
    server, direct, shipped_tasks, tmp_path
):
    client = CLIENT | {"base_url": f"{server.url}/v1/completions", "max_gen_toks": 16}
    names = [f"our_{task}" for task in QUESTIONS]
    results, samples = evaluate(shipped_tasks, tmp_path, "local-completions", names, **client)
    rtol, atol = TOLERANCE[torch.float32]

    for task, key in [("hellaswag", "choices"), ("piqa", None)]:
        right = 0
        for sample in samples[f"our_{task}"]:
            doc = sample["doc"]
            choices = doc[key] if key else [doc["sol1"], doc["sol2"]]
            prompt = sample["arguments"]["gen_args_0"]["arg_0"]
            expected = scored(direct, prompt, choices)
            found = [float(score) for ((score, _),) in sample["resps"]]
            assert found == pytest.approx(expected, rel=rtol, abs=atol)
            right += best(expected) == int(doc["label"])
        assert results[f"our_{task}"]["acc,none"] == right / len(QUESTIONS[task])

    model, tokenizer = direct
    for task in ("nq_open", "triviaqa"):
        assert len(samples[f"our_{task}"]) == len(QUESTIONS[task])
        for sample in samples[f"our_{task}"]:
            prompt = sample["arguments"]["gen_args_0"]["arg_0"]
            assert sample["doc"]["question"] in prompt
            ids = plain_greedy(model, tokenizer.encode(prompt), 16)
            text = tokenizer.decode(ids[: ids.index(EOS_ID) if EOS_ID in ids else None])
            for stop in ("\n", ".", ","):
                text = text.partition(stop)[0]
            assert sample["resps"] == [[text]]
        assert f"our_{task}" in results
