"""Answers that follow grammars: every case with tiny and real models, ends, vocabularies."""

import numpy as np
import pytest
import torch

from engine.config import EngineConfig
from engine.errors import RequestError
from engine.request import Request
from engine.sampling.grammar import Grammar
from engine.sampling.params import SamplingParams
from server.config import EngineSettings
from server.engine_entry import build_engine
from server.model_options import ModelOptions
from tests.engine.test_company import Oracle
from tests.models import (
    EOS_ID,
    VOCAB_SIZE,
    byte_tokenizer,
    engine_of,
    random_model,
    tiny_config,
    train_sentencepiece,
)
from tests.weights.grammars.cases import grammar_cases
from weights.checkpoints.tokenizer import JsonTokenizer, SentencePieceTokenizer, load_tokenizer
from weights.grammars.compiler import GrammarCompiler
from weights.grammars.grammar_memory import MOST_GRAMMARS
from weights.models.named_models import ModelFolder

CASES = grammar_cases()
TOKENIZER = JsonTokenizer(byte_tokenizer())
OTHER_EOS_ID = EOS_ID + 2
ANYTHING = Grammar("regex", r"(?s:.)*")


def compiler(vocab_size=VOCAB_SIZE, eos_ids=(EOS_ID, OTHER_EOS_ID), tokenizer=TOKENIZER):
    return GrammarCompiler(lambda: tokenizer, vocab_size, frozenset(eos_ids))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(5)
    return random_model(tiny_config())


@pytest.fixture
def engine(model):
    return engine_with_grammars(model)


def engine_with_grammars(model, make_drafter=None, **config):
    sizes = {"block_size": 4, "max_num_seqs": 64, "max_model_len": 512}
    settings = EngineConfig(kv_cache_gib=0.01, **sizes, **config)
    eos_ids = frozenset({EOS_ID, OTHER_EOS_ID})
    options = {"grammars": compiler(), "make_drafter": make_drafter}
    return engine_of(model, settings, eos_ids, **options)


def answers(engine, requests):
    """The token ids and all outputs of each request."""
    for request in requests:
        engine.add(request)
    found = {request.request_id: [] for request in requests}
    while engine.has_work:
        for output in engine.step().outputs:
            found[output.request_id].append(output)
    engine.check_idle()
    return {name: ([i for o in outs for i in o.token_ids], outs) for name, outs in found.items()}


def answer(engine, kind, source, **sampling):
    """The token ids and the last output of one request."""
    params = SamplingParams(**({"max_tokens": 200, "seed": 3} | sampling))
    request = Request("a", (1, 2), params, grammar=Grammar(kind, source))
    ids, outputs = answers(engine, [request])["a"]
    return ids, outputs[-1]


def ids_of(text):
    return TOKENIZER.encode(text, add_special_tokens=False)


def allowed(grammars, mask):
    """The token ids that a mask allows, as it fills the second of two rows."""
    bitmask = np.zeros((2, -(-grammars._vocab_size // 32)), dtype=np.uint32)
    grammars.fill([(1, mask)], bitmask)
    assert not bitmask[0].any()
    alone = np.zeros_like(bitmask[1])
    mask.fill(alone)
    assert (alone == bitmask[1]).all()
    return np.unpackbits(alone.view(np.uint8), bitorder="little").nonzero()[0].tolist()


def check(engine, tokenizer, prompt, num_samples):
    """Every case ends by itself, with an answer that follows its grammar."""
    requests, cases = [], {}
    for case in CASES:
        for seed in range(num_samples):
            name = f"{case.name} {seed}"
            params = SamplingParams(max_tokens=400, seed=seed)
            requests.append(Request(name, tuple(prompt), params, grammar=case.grammar))
            cases[name] = case
    found = answers(engine, requests)
    texts = {name: tokenizer.decode(ids) for name, (ids, _) in found.items()}
    assert {name: text for name, text in texts.items() if not cases[name].follows(text)} == {}
    reasons = {name: outputs[-1].finish_reason for name, (_, outputs) in found.items()}
    assert {name: texts[name] for name, reason in reasons.items() if reason != "stop"} == {}


def test_every_case_with_a_tiny_model(engine):
    assert len(CASES) == 60
    check(engine, TOKENIZER, [1, 2, 3], num_samples=2)


@pytest.mark.slow
def test_every_case_with_smollm2(smollm2):
    config = EngineConfig(kv_cache_gib=0.5, max_num_seqs=30)
    settings = EngineSettings(ModelOptions(model=str(smollm2)), ModelFolder(smollm2), config)
    tokenizer = load_tokenizer(smollm2)
    check(build_engine(settings), tokenizer, tokenizer.encode("An example:\n"), 2)


def test_an_answer_ends_with_its_grammar(engine):
    ids, last = answer(engine, "choice", ("only",))
    # no step is spent on an end token
    assert ids == ids_of("only") and (last.finish_reason, last.stop_token_id) == ("stop", None)


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_an_end_token_ends_the_answer_where_the_grammar_may_end(engine, ignore_eos):
    ids, last = answer(engine, "regex", "[ab]{3,}", ignore_eos=ignore_eos)
    assert last.finish_reason == "stop" and ids[-1] in (EOS_ID, OTHER_EOS_ID)
    assert len(ids) > 3 and set(ids[:-1]) <= set(ids_of("ab"))


def test_end_tokens_are_allowed_exactly_where_a_grammar_may_end():
    grammars = compiler()
    mask = grammars.compile(Grammar("regex", "ab?"))
    ends = [EOS_ID, OTHER_EOS_ID]
    assert allowed(grammars, mask) == ids_of("a") and not mask.may_end
    mask.accept(ids_of("a"))
    assert allowed(grammars, mask) == [*ids_of("b"), *ends]
    assert mask.may_end and not mask.is_complete
    mask.accept([OTHER_EOS_ID])
    assert mask.is_complete
    mask.rollback(1)
    assert allowed(grammars, mask) == [*ids_of("b"), *ends] and not mask.is_complete
    mask.rollback(1)
    assert allowed(grammars, mask) == ids_of("a")


def test_a_longest_answer_that_completes_its_grammar_stops(engine):
    _, last = answer(engine, "choice", ("only",), max_tokens=4)
    assert last.finish_reason == "stop"
    _, last = answer(engine, "choice", ("only",), max_tokens=3)
    assert last.finish_reason == "length"


def test_rules_together_with_a_grammar(engine):
    ids, last = answer(engine, "choice", ("ab",), min_tokens=50)
    assert ids == ids_of("ab") and last.finish_reason == "stop"
    a, b = ids_of("ab")
    ids, last = answer(engine, "choice", ("a", "b"), bad_words=((a,),))
    assert ids == [b] and last.finish_reason == "stop"
    # neither b nor an end token is left, but the answer may end
    ids, last = answer(engine, "regex", "ab*", bad_words=((b,),), min_tokens=9)
    assert ids == [a] and last.finish_reason == "stop"
    ids, last = answer(engine, "choice", ("abc",), stop_token_ids=frozenset({b}))
    assert ids == [a, b] and (last.finish_reason, last.stop_token_id) == ("stop", b)


def test_rules_that_leave_no_token_of_a_grammar_are_the_requests_mistake(engine):
    a, b = ids_of("ab")
    ids, last = answer(engine, "choice", ("ab",), bad_words=((b,),))
    assert ids == [a] and last.finish_reason == "error"
    assert last.error_param == "structured_outputs" and "leaves no token" in last.error


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("json_schema", "{", "not valid JSON"),
        ("json_schema", "[1]", "an object or true"),
        ("json_schema", '{"not": {"type": "null"}}', "Unimplemented keys"),
        ("json_schema", '{"type": "string", "minLength": 3, "maxLength": 2}', "Unsatisfiable"),
        ("json_schema", '{"$ref": "#"}', "no text follows it"),
        ("regex", "(a", "unclosed group"),
        ("regex", "a(?=b)", "look-around"),
        ("grammar", "start: (", "wrong grammar"),
        ("grammar", "root = b", "neither Lark nor GBNF"),
    ],
)
def test_a_wrong_grammar_ends_only_its_request(engine, kind, source, message):
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    wrong = Request("wrong", (1,), params, grammar=Grammar(kind, source, "response_format"))
    found = answers(engine, [wrong, Request("free", (1,), params)])
    _, (last,) = found["wrong"]
    assert last.finish_reason == "error" and last.error_param == "response_format"
    assert message in last.error and len(last.error) < 400
    assert len(found["free"][0]) == 5


def test_drafts_change_no_answer(model):
    schema = '{"type": "array", "items": {"enum": ["Ada", "Bob"]}, "minItems": 3, "maxItems": 3}'
    choice = {"kind": "json_schema", "source": schema, "temperature": 0}
    ids, _ = answer(engine_with_grammars(model), **choice)
    oracle = Oracle([([1, 2], ids)])
    fast = engine_with_grammars(
        model, make_drafter=lambda: oracle, speculate="ngram", speculate_tokens=4
    )
    params = SamplingParams(max_tokens=200, temperature=0)
    request = Request("a", (1, 2), params, grammar=Grammar("json_schema", schema))
    found, outputs = answers(fast, [request])["a"]
    assert found == ids and len(outputs) < len(ids) / 2


def test_only_tokens_with_text_are_allowed():
    grammars = compiler(vocab_size=300)  # a model often has more ids than its tokenizer
    mask = grammars.compile(ANYTHING)
    specials = set(range(256, 300)) - {EOS_ID, OTHER_EOS_ID}
    assert not specials & set(allowed(grammars, mask))
    # the name of a special token is a text of other tokens
    name = grammars.compile(Grammar("choice", ("<bos>",)))
    assert allowed(grammars, name) == ids_of("<")
    name.accept([token_id for letter in "<bos>" for token_id in ids_of(letter)])
    assert name.is_complete


def test_sentencepiece_tokens_spell_their_texts(tmp_path):
    lines = ["the quick brown fox jumps over the lazy dog", "größe und maß {} [] :,"]
    tokenizer = SentencePieceTokenizer(train_sentencepiece(tmp_path, lines))
    vocab_size = tokenizer.processor.GetPieceSize() + 5
    eos_id = tokenizer.processor.eos_id()
    grammars = compiler(vocab_size, (eos_id,), tokenizer)
    mask = grammars.compile(Grammar("choice", (" the größe 🦊",)))
    anchor = tokenizer.encode("a")
    ids = [*anchor, *tokenizer.encode(" the größe 🦊", add_special_tokens=False)]
    # mid-text, where the first space counts
    spaced = tokenizer.encode("a the größe 🦊")
    assert tokenizer.decode(spaced) == "a the größe 🦊"
    mask.accept(spaced[len(anchor) :])
    assert mask.is_complete and ids[: len(anchor)] == spaced[: len(anchor)]
    free = grammars.compile(ANYTHING)
    unspelled = {i for i in range(vocab_size) if i not in allowed(grammars, free)}
    assert unspelled >= tokenizer.special_ids - {eos_id} | set(range(vocab_size - 5, vocab_size))


def test_masks_of_one_grammar_are_independent():
    grammars = compiler()
    grammar = Grammar("choice", ("ab", "cd"))
    masks = [grammars.compile(grammar) for _ in range(130)]
    for mask, text in zip(masks, ["a", "c"] * 65, strict=True):
        mask.accept(ids_of(text))
    assert allowed(grammars, masks[0]) == ids_of("b") and allowed(grammars, masks[-1]) == ids_of(
        "d"
    )


def test_grammars_in_memory_are_bounded_and_the_least_recently_used_is_dropped():
    grammars = compiler()

    def compiled(number):
        return grammars.compile(Grammar("choice", (str(number),)))

    for number in range(MOST_GRAMMARS + 5):
        compiled(number)  # its mask is dropped at once
        compiled(0)
    kept = [grammar.source[0] for grammar in grammars._templates]
    assert len(kept) == len(grammars._in_memory) == MOST_GRAMMARS and {"0", "6"} < set(kept)
    assert grammars.num_free == MOST_GRAMMARS
    masks = [compiled(number) for number in range(MOST_GRAMMARS - 1)]
    assert grammars.num_free == 1
    masks += [compiled(1) for _ in range(130)]  # more than share one copy of the grammar
    assert grammars.num_free < 1
    del masks
    assert grammars.num_free == MOST_GRAMMARS
    compiled("a")
    assert len(grammars._in_memory) <= MOST_GRAMMARS


def test_a_model_without_an_end_token_takes_no_grammar():
    with pytest.raises(RequestError, match="needs a model with an end-of-sequence token"):
        compiler(eos_ids=()).compile(ANYTHING)


def test_a_failed_mask_allows_nothing_and_says_why():
    grammars = compiler()
    mask = grammars.compile(Grammar("choice", ("ab",)))
    mask.accept(ids_of("x"))
    assert allowed(grammars, mask) == [] and not mask.is_complete and not mask.may_end
    assert mask.failure is not None and "doesn't satisfy the grammar" in mask.failure
    assert "<state>" not in mask.failure


def test_a_grammar_that_is_too_complex_on_the_way_ends_its_request(engine):
    source = "start: (" + "|".join(f"/[a-z]+{number}/" for number in range(4000)) + ")*"
    ids, last = answer(engine, "grammar", source, ignore_eos=True)
    assert last.finish_reason == "error" and last.error_param == "structured_outputs"
    assert "items; max is" in last.error and len(ids) == 1
