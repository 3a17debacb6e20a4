"""config.json with absurd values: refused in one line, before anything is allocated."""

import copy
import json
import math
import os
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.models import feed_forward_changes, random_model, save_model, tiny_config
from tests.weights.checkpoints.refusals import refusal
from weights.checkpoints.checkpoint import open_checkpoint
from weights.checkpoints.config_json import read_config
from weights.errors import CheckpointError

MIB = 2**20
SIZES = [
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
    *("num_local_experts", "num_experts_per_tok", "moe_intermediate_size"),
    *("memory.num_heads", "memory.num_subkeys", "memory.top_k", "memory.query_dim"),
    "memory.value_dim",
]
NUMBERS = ["rms_norm_eps", "rope_theta", "router_aux_loss_coef", "rope_scaling.factor"]
ABSURD = [
    *(10**9, 10**12, 2**31, 2**63, 2**64, 10**400, -1, -(10**9), -(10**400)),
    *(math.nan, math.inf, -math.inf, 1e308, "4", "", [4], [], {}, {"a": 1}, True),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with experts and a memory whose config.json a test may change."""
    kinds = feed_forward_changes("dense", "moe", "memory_plus")
    model = random_model(tiny_config(**kinds))
    return save_model(model, tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def config(folder):
    raw = json.loads((folder / "config.json").read_text())
    return raw | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}


def write(folder, config, **changes):
    """Write a config with some keys changed; a dot separates the key of an object within."""
    changed = copy.deepcopy(config)
    for key, value in changes.items():
        *outer, inner = key.split(".")
        (changed[outer[0]] if outer else changed)[inner] = value
    (folder / "config.json").write_text(json.dumps(changed))


def peak(read, *arguments):
    """The refusal of a call that must not allocate more than a few MiB."""
    tracemalloc.start()
    message = refusal(read, *arguments)
    allocated = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert allocated < 4 * MIB
    return message


def test_the_config_is_read_without_changes(folder, config):
    write(folder, config)
    assert open_checkpoint(folder)[0].model.num_layers == 3


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("value", [*ABSURD, 0, 1.5, 16.0], ids=lambda value: str(value)[:20])
def test_absurd_sizes_are_named(folder, config, key, value):
    write(folder, config, **{key: value})
    assert key.rpartition(".")[2] in peak(read_config, folder)


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize(
    "value", [v for v in ABSURD if v not in (10**9, 10**12, 2**31, 2**63, 2**64)], ids=str
)
def test_absurd_numbers_are_named(folder, config, key, value):
    write(folder, config, **{key: value})
    assert key.rpartition(".")[2] in peak(read_config, folder)


@pytest.mark.parametrize("key", SIZES)
def test_sizes_at_their_limit_are_refused_by_the_tensors(folder, config, key):
    # no limit of one size bounds the products of sizes, or the number of modules
    for value in (2**16, 2**20, 2**24):
        write(folder, config, **{key: value})
        if key != "max_position_embeddings":
            assert str(folder) in peak(open_checkpoint, folder)


def test_all_sizes_at_their_limits_do_not_overflow(folder, config):
    largest = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), 2**24)
    largest |= dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim"), 2**16)
    largest |= {"moe_intermediate_size": 2**24, "memory.value_dim": 2**24}
    largest |= {"memory.num_subkeys": 2**16, "memory.query_dim": 2**16, "memory.num_heads": 1024}
    write(folder, config, **largest)
    assert "requires" in peak(open_checkpoint, folder)


def test_heads_whose_product_overflows_are_refused(folder, config):
    heads = dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 2**24)
    for changes in (heads, {"head_dim": 2**24}, heads | {"head_dim": 2**24}):
        write(folder, config, **changes)
        assert "is more than 65536" in peak(read_config, folder)


@pytest.mark.parametrize("layers", [10**12, "3", 3.0, None, [3], -1, {}])
def test_layer_types_do_not_multiply_a_number_that_is_unchecked(folder, config, layers):
    types = ["full_attention"] * 3
    write(folder, config, num_hidden_layers=layers, layer_types=types)
    assert "num_hidden_layers" in peak(read_config, folder)
    write(folder, config, layer_types=["full_attention"] * 2)
    assert "layer_types" in peak(read_config, folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("a\nmemplus: all is well", 1),
        ("\x1b[2J", 1),
        ("hidden_act", "a\nb" * 1000),
        ("hidden_act", "x" * MIB),
        ("k" * MIB, 1),
        ("model_type", ["llama"]),
        ("model_type", {"a": []}),
        ("architectures", []),
        ("architectures", [[]]),
        ("architectures", "LlamaForCausalLM"),
        ("memory.layers", {"9" * 5000: "pkm"}),
        ("memory.layers", {"٣": "pkm"}),
        ("memory.layers", {"-1": "pkm"}),
        ("memory.layers", {"1": {}}),
        ("memory.layers", {"1": "x" * MIB}),
        ("memory.layers", [1]),
        ("memory.unknown", 1),
        ("memory", [1]),
        ("moe_layers", [10**9]),
        ("moe_layers", [1, 1]),
        ("moe_layers", {"1": 1}),
        ("moe_layers", [[1]]),
        ("rope_scaling", [1]),
        ("rope_scaling", "linear"),
        ("rope_scaling.rope_type", ["linear"]),
        ("rope_scaling.rope_type", {}),
        ("rope_scaling.rope_type", "x" * MIB),
        ("rope_scaling.unknown", 1),
        ("rope_parameters", {"rope_type": "yarn", "factor": 10**400}),
        ("eos_token_id", [10**9]),
        ("eos_token_id", "2"),
        ("eos_token_id", [[2]]),
        ("bos_token_id", {"a": 1}),
        ("bos_token_id", math.nan),
        ("torch_dtype", ["bfloat16"]),
        ("quantization_config", {"a": "x" * MIB}),
        ("tie_word_embeddings", 1),
        ("attention_bias", "yes"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_other_keys_are_refused_in_one_line(folder, config, key, value):
    write(folder, config, **{key: value})
    assert "config.json: " in refusal(read_config, folder)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "3", "null", "[" * 100_000, '{"a":' * 100_000, '{"vocab_size": 1e999}'),
        '{"vocab_size": ' + "9" * 5000 + "}",
        '{"vocab_size": 4, "vocab_size": 260}',
    ],
    ids=lambda text: text[:20],
)
def test_a_config_of_another_form_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    assert "config.json: " in peak(read_config, folder)


def test_a_huge_config_is_refused_before_it_is_read(folder):
    os.truncate(folder / "config.json", 2**30)
    assert f"config.json: has {2**30} bytes" in peak(read_config, folder)


KEYS = [*SIZES, *NUMBERS, "eos_token_id", "memory.layers", "moe_layers", "memory", "rope_scaling"]
VALUES = st.one_of(
    st.sampled_from([*ABSURD, None, 0, 1, 2**14, 2**24, 1e-300, 1e300]),
    st.integers(-3, 70_000),
    st.floats(),
    st.recursive(
        st.one_of(st.integers(), st.text(max_size=3), st.none(), st.booleans()),
        lambda inner: st.one_of(
            st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=2), inner, max_size=2)
        ),
        max_leaves=3,
    ),
)


def is_refused_or_whole(folder) -> bool:
    """Whether a folder is refused in one line, or has the tensors that it had."""
    try:
        _, stored = open_checkpoint(folder)
    except CheckpointError as error:
        return str(error).isprintable()
    return "memory.table" in stored


@given(changes=st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=4))
def test_a_changed_config_is_refused_or_describes_the_same_tensors(folder, config, changes):
    whole = {key: value for key, value in changes.items() if "." not in key}
    # an object that is replaced has no keys to change
    inner = {k: v for k, v in changes.items() if "." in k and k.partition(".")[0] not in whole}
    write(folder, config, **whole, **inner)
    assert is_refused_or_whole(folder)


ROPE_KEYS = [
    *("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    *("beta_fast", "beta_slow", "attention_factor", "truncate"),
]


@given(
    kind=st.sampled_from(["linear", "llama3", "yarn"]),
    values=st.dictionaries(st.sampled_from(ROPE_KEYS), VALUES, min_size=1),
    theta=VALUES,
)
def test_absurd_rotary_scalings_are_refused_or_load(folder, config, kind, values, theta):
    usual = [8.0, 1.0, 4.0, 64, 32.0, 1.0, 1.0, True]
    chosen = {
        "linear": ROPE_KEYS[:1],
        "llama3": ROPE_KEYS[:4],
        "yarn": [ROPE_KEYS[0], *ROPE_KEYS[3:]],
    }
    scaling = {key: one for key, one in zip(ROPE_KEYS, usual, strict=True) if key in chosen[kind]}
    scaling |= {key: value for key, value in values.items() if key in scaling}
    write(folder, config, rope_scaling={"rope_type": kind, **scaling}, rope_theta=theta)
    assert is_refused_or_whole(folder)
