"""SmolLM2, a real model: our tokens and logits against transformers', our ids against its own."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.config import EngineConfig
from engine.engine import Engine
from tests.models import greedy, plain_logits, run
from weights.checkpoint import load_model
from weights.tokenizer import load_tokenizer

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a small village,",
    "1, 1, 2, 3, 5, 8, 13,",
    "Dear Sir or Madam,\n\n",
    "import numpy as np\n\nx = np.",
    "日本の首都は",
    "🦊 is the emoji of a",
    "Q: What is 17 + 25?\nA:",
    "   leading spaces",
    "The quick brown fox jumps over the lazy dog. " * 6,
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
    "SELECT name FROM users WHERE",
    "La vie est belle, car",
    "Photosynthesis converts light into",
    "{\"name\": \"Ada\", \"born\": ",
    "To be, or not to be,",
    "Die Hauptstadt von Deutschland ist",
    "E = mc^2 means that",
    "a",
]  # fmt: skip
COUNT = 64


@pytest.fixture(scope="module")
def reference(smollm2):
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def prompt_ids(smollm2):
    tokenizer = load_tokenizer(smollm2)
    return [tokenizer.encode(prompt) for prompt in PROMPTS]


@torch.inference_mode()
def reference_logits(reference, ids):
    return reference(torch.tensor([ids])).logits[0]


def test_greedy_tokens_and_logits_equal_transformers(smollm2, reference, prompt_ids):
    model, _ = load_model(smollm2, "float32")
    engine = Engine(model, EngineConfig(kv_cache_gib=0.5, max_model_len=512))
    requests = [greedy(str(i), ids, COUNT) for i, ids in enumerate(prompt_ids)]
    tokens = run(engine, {0: requests[:9], 5: requests[9:]})
    for i, ids in enumerate(prompt_ids):
        # each token is the reference's greedy choice after those before it: by induction the
        # whole answer is what its own greedy loop gives
        whole = ids + tokens[str(i)]
        theirs = reference_logits(reference, whole[:-1])
        assert tokens[str(i)] == theirs[len(ids) - 1 :].argmax(-1).tolist(), PROMPTS[i]
        torch.testing.assert_close(plain_logits(model, whole[:-1]), theirs, rtol=0, atol=1e-3)


def test_bfloat16_logits_are_as_near_as_transformers_own(smollm2, reference, prompt_ids):
    model, _ = load_model(smollm2, "bfloat16")
    theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16).eval()

    def error(logits, exact):
        return float((logits.float() - exact).square().mean())

    errors = []
    for ids in prompt_ids:
        exact = reference_logits(reference, ids)
        ours = plain_logits(model, ids)
        errors.append((error(ours, exact), error(reference_logits(theirs, ids), exact)))
        # what bf16 takes for the likeliest token is nearly as likely in fp32
        likely = exact.log_softmax(-1)
        chosen = likely.gather(-1, ours.argmax(-1, keepdim=True))
        assert (likely.amax(-1, keepdim=True) - chosen).max() < 0.7
    our_error, their_error = (sum(column) ** 0.5 for column in zip(*errors, strict=True))
    assert our_error < 1.2 * their_error, (our_error, their_error)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        # the smollm pre-tokeniser splits digits one by one, whatever the merges say
        ("1234", ["1", "2", "3", "4"]),
        ("in 2024", ["in", "Ġ", "2", "0", "2", "4"]),
        (" hello", ["Ġhello"]),
        ("  hello", ["Ġ", "Ġhello"]),
        ("def f(x):\n    return x", ["def", "Ġf", "(", "x", "):", "ĊĠĠĠ", "Ġreturn", "Ġx"]),
        ("<|im_start|>user", ["<|im_start|>", "user"]),
    ],
)
def test_text_is_split_as_the_models_own_pre_tokenizer_does(smollm2, text, pieces):
    tokenizer = load_tokenizer(smollm2)
    ids = tokenizer.encode(text)
    assert [tokenizer._tokenizer.id_to_token(i) for i in ids] == pieces
    shown = text.replace("<|im_start|>", "")
    assert tokenizer.decode(ids) == shown


@pytest.mark.parametrize("text", ["日本語と中文", "👩‍👩‍👧‍👦🦊", "naïve — ½", "\t\n  mixed \r\n"])
def test_text_beyond_ascii_comes_back(smollm2, text):
    tokenizer = load_tokenizer(smollm2)
    assert tokenizer.decode(tokenizer.encode(text)) == text
