"""SmolLM2, a real model: logits and tokens against transformers, ids against llama.cpp."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.config import EngineConfig
from tests.models import engine_of, greedy, ragged_step, run
from weights.checkpoints.checkpoint import load_model
from weights.checkpoints.tokenizer import load_tokenizer

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
def served_logits(model, sequences):
    """Teacher-forced logits of the serving path: chunks of 33 tokens in scattered KV blocks."""
    config, size = model.config, 16
    blocks = [-(-len(ids) // size) for ids in sequences]
    order = torch.randperm(sum(blocks)).tolist()
    owned = [tuple(order[sum(blocks[:i]) :][:count]) for i, count in enumerate(blocks)]
    shape = (config.num_layers, len(order), 2, config.num_kv_heads, size, config.head_dim)
    dtype = model.model.norm.weight.dtype
    kv_blocks = torch.full(shape, torch.nan, dtype=dtype)
    logits = [[] for _ in sequences]
    for start in range(0, max(map(len, sequences)), 33):
        running = [i for i, ids in enumerate(sequences) if start < len(ids)]
        chunks = [(sequences[i][start : start + 33], start, owned[i]) for i in running]
        ids_T, layout = ragged_step(chunks, size)
        output = model(ids_T, layout, torch.arange(len(ids_T)), kv_blocks)
        parts = output.logits_LV.split([len(ids) for ids, *_ in chunks])
        for i, part in zip(running, parts, strict=True):
            logits[i].append(part)
    return [torch.cat(parts) for parts in logits]


@torch.inference_mode()
def reference_logits(reference, ids):
    return reference(torch.tensor([ids])).logits[0]


@pytest.mark.slow
def test_greedy_tokens_and_logits_equal_transformers(smollm2, reference, prompt_ids):
    model, _ = load_model(smollm2, "float32")
    engine = engine_of(model, EngineConfig(kv_cache_gib=0.5, max_model_len=512))
    requests = [greedy(str(i), ids, COUNT) for i, ids in enumerate(prompt_ids)]
    tokens = run(engine, {0: requests[:9], 5: requests[9:]})
    served = served_logits(model, [ids + tokens[str(i)][:-1] for i, ids in enumerate(prompt_ids)])
    for i, ids in enumerate(prompt_ids):
        # each token is the reference's greedy choice after those before it, so by induction the
        # whole answer equals the greedy answer of the reference
        whole = ids + tokens[str(i)]
        theirs = reference_logits(reference, whole[:-1])
        assert tokens[str(i)] == theirs[len(ids) - 1 :].argmax(-1).tolist(), PROMPTS[i]
        torch.testing.assert_close(served[i], theirs, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_bfloat16_logits_are_as_close_as_those_of_transformers(smollm2, reference, prompt_ids):
    model, _ = load_model(smollm2, "bfloat16")
    theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16).eval()

    def error(logits, exact):
        return float((logits.float() - exact).square().mean())

    errors = []
    for ids, ours in zip(prompt_ids, served_logits(model, prompt_ids), strict=True):
        exact = reference_logits(reference, ids)
        errors.append((error(ours, exact), error(reference_logits(theirs, ids), exact)))
        # the likeliest token in bf16 is nearly the likeliest in fp32
        likely = exact.log_softmax(-1)
        chosen = likely.gather(-1, ours.argmax(-1, keepdim=True))
        assert (likely.amax(-1, keepdim=True) - chosen).max() < 0.7
    our_error, their_error = (sum(column) ** 0.5 for column in zip(*errors, strict=True))
    assert our_error < 1.2 * their_error, (our_error, their_error)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        # the smollm pre-tokenizer splits off each digit before the merges
        ("1234", ["1", "2", "3", "4"]),
        ("in 2024", ["in", "Ġ", "2", "0", "2", "4"]),
        (" hello", ["Ġhello"]),
        ("  hello", ["Ġ", "Ġhello"]),
        ("def f(x):\n    return x", ["def", "Ġf", "(", "x", "):", "ĊĠĠĠ", "Ġreturn", "Ġx"]),
        ("<|im_start|>user", ["<|im_start|>", "user"]),
    ],
)
def test_text_is_split_like_the_models_pre_tokenizer(smollm2, text, pieces):
    tokenizer = load_tokenizer(smollm2)
    ids = tokenizer.encode(text)
    assert [tokenizer._tokenizer.id_to_token(i) for i in ids] == pieces
    shown = text.replace("<|im_start|>", "")
    assert tokenizer.decode(ids) == shown


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        # ids from llama.cpp with the file's vocabulary, merges and pre-tokenizer
        ("日本語の文章", [23274, 115, 40993, 179, 120, 248, 26453, 29184, 47287, 250]),
        ("中文 한국어", [28589, 29184, 216, 33085, 246, 181, 130, 251, 183, 240, 129]),
        (
            "\U0001f469\u200d\U0001f467\U0001f98a",
            [10813, 235, 119, 321, 231, 10813, 235, 117, 10813, 116, 228],
        ),
    ],
)
def test_text_beyond_ascii_has_the_ids_of_llama_cpp(smollm2, text, ids):
    assert load_tokenizer(smollm2).encode(text) == ids


@pytest.mark.parametrize("text", ["日本語と中文", "👩‍👩‍👧‍👦🦊", "naïve — ½", "\t\n  mixed \r\n"])
def test_text_beyond_ascii_survives_encoding_and_decoding(smollm2, text):
    tokenizer = load_tokenizer(smollm2)
    assert tokenizer.decode(tokenizer.encode(text)) == text
