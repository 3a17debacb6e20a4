"""lm-eval, unmodified: its scores and answers over HTTP equal those of the model itself."""

import json
from pathlib import Path

import openai
import pytest
import torch

from tests.conftest import TOLERANCE
from tests.models import plain_greedy
from tests.server.lm_eval_runs import direct_score, evaluate
from tests.server.running import running
from weights.checkpoints.checkpoint import load_model
from weights.checkpoints.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow

CHOICES = [
    ("The capital of France is", ["Paris", "a kind of fish", "Rome"], 0),
    ("Two plus two is", ["purple", "four"], 1),
    ("Snow is", ["hot", "white and cold", "a musical instrument", "2024"], 1),
    ("Das Wetter in Köln ist heute", ["schön", "日本"], 0),
]
OPEN_QUESTIONS = [("1, 2, 3, 4,", " 5, 6, 7, 8,"), ("Q: Name a colour.\nA:", " Blue")]
MOST_TOKENS = 12
STOP = "\n"


@pytest.fixture(scope="module")
def server(smollm2):
    options = "--served-model-name", "smollm2", "--dtype", "float32", "--kv-cache-gib", "0.2"
    with running(smollm2, *options) as started:
        yield started


@pytest.fixture(scope="module")
def direct(smollm2):
    model, _ = load_model(smollm2, "float32")
    return model, load_tokenizer(smollm2)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A folder with a task of choices, ``choose``, and one of open questions, ``answer``."""
    folder = tmp_path_factory.mktemp("tasks")
    questions = [{"question": q, "choices": c, "answer": a} for q, c, a in CHOICES]
    _write_task(folder, "choose", questions, "multiple_choice", "acc", {"doc_to_choice": "choices"})
    questions = [{"question": q, "answer": a} for q, a in OPEN_QUESTIONS]
    options = {"until": [STOP], "max_gen_toks": MOST_TOKENS, "do_sample": False, "temperature": 0}
    generation = {"generation_kwargs": options}
    _write_task(folder, "answer", questions, "generate_until", "exact_match", generation)
    return folder


def _write_task(folder, name, questions, kind, metric, options):
    lines = [json.dumps(question) for question in questions]
    (folder / f"{name}.jsonl").write_text("\n".join(lines))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
        "output_type": kind,
        "doc_to_text": "question",
        "doc_to_target": "answer",
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task | options))


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        (["--batch_size", "4"], {}),
        ([], {"tokenized_requests": False, "num_concurrent": 3}),
    ],
    ids=["batches of token ids", "concurrent texts"],
)
def test_local_completions_score_like_the_model(
    server, smollm2, direct, tasks, tmp_path, options, arguments
):
    results, samples = evaluate(
        tasks,
        tmp_path,
        "local-completions",
        ["choose", "answer"],
        *options,
        model="smollm2",
        base_url=f"{server.url}/v1/completions",
        tokenizer=smollm2,
        tokenizer_backend="huggingface",
        **arguments,
    )
    rtol, atol = TOLERANCE[torch.float32]
    num_right = 0
    for question, choices, right in CHOICES:
        (sample,) = [s for s in samples["choose"] if s["doc"]["question"] == question]
        expected = [direct_score(*direct, question, f" {choice}") for choice in choices]
        for ((score, is_greedy),), (likelihood, is_likeliest) in zip(
            sample["resps"], expected, strict=True
        ):
            assert float(score) == pytest.approx(likelihood, rel=rtol, abs=atol)
            assert is_greedy == str(is_likeliest)
        scores = [likelihood for likelihood, _ in expected]
        num_right += scores.index(max(scores)) == right
    assert 0 < num_right < len(CHOICES)
    assert results["choose"]["acc,none"] == num_right / len(CHOICES)

    model, tokenizer = direct
    matches = 0
    for question, target in OPEN_QUESTIONS:
        (sample,) = [s for s in samples["answer"] if s["doc"]["question"] == question]
        text = tokenizer.decode(plain_greedy(model, tokenizer.encode(question), MOST_TOKENS))
        assert sample["resps"] == [[text.split(STOP)[0]]]
        matches += text.split(STOP)[0] == target
    assert results["answer"]["exact_match,none"] == matches / len(OPEN_QUESTIONS) == 0.5


def test_local_chat_completions_answer_like_the_official_client(server, tasks, tmp_path):
    _, samples = evaluate(
        tasks,
        tmp_path,
        "local-chat-completions",
        ["answer"],
        "--apply_chat_template",
        model="smollm2",
        base_url=f"{server.url}/v1/chat/completions",
    )
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        for question, _ in OPEN_QUESTIONS:
            answer = client.chat.completions.create(
                model="smollm2",
                messages=[{"role": "user", "content": question}],
                max_tokens=MOST_TOKENS,
                temperature=0,
                stop=[STOP],
            )
            text = answer.choices[0].message.content
            (sample,) = [s for s in samples["answer"] if s["doc"]["question"] == question]
            assert text and sample["resps"] == [[text]]
