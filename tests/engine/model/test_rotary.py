"""Rotary frequencies, amplitudes and logits of every scaling equal those of transformers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from engine.model.rope_scaling import LinearScaling, Llama3Scaling, YarnScaling
from engine.model.rotary import rope_amplitude, rope_angles, rope_frequencies
from tests.conftest import TOLERANCE
from tests.models import plain_logits, served_logits
from weights.checkpoints.checkpoint import load_model
from weights.checkpoints.config_json import CheckpointConfig, config_to_json, parse_model

LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 8192,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SCALINGS = [
    *(LLAMA3, LINEAR, YARN, YARN | {"attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0}),
    YARN | {"truncate": False},
]


def of_transformers(head_dim, theta, scaling, max_positions=256):
    """(frequencies, amplitude) by transformers."""
    config = LlamaConfig(
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        rope_parameters=scaling | {"rope_theta": theta},
    )
    return ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu")


def ours(theta, scaling):
    """The scaling that we read from the same keys."""
    raw = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    raw |= {"num_attention_heads": 1, "rope_theta": theta, "rope_scaling": scaling}
    return parse_model(raw).rope_scaling


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("head_dim", [8, 64, 128])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_frequencies_and_amplitude_equal_transformers(scaling, head_dim, theta):
    expected, amplitude = of_transformers(head_dim, theta, scaling)
    found = ours(theta, scaling)
    torch.testing.assert_close(rope_frequencies(head_dim, theta, found), expected)
    assert rope_amplitude(found) == pytest.approx(amplitude)


@given(
    factor=st.floats(1.0, 64.0),
    original=st.integers(16, 2**17),
    head_dim=st.sampled_from([4, 16, 64, 96, 128]),
    beta_fast=st.floats(2.0, 64.0),
    beta_slow=st.floats(0.25, 2.0),
    truncate=st.booleans(),
)
def test_yarn_equals_transformers(factor, original, head_dim, beta_fast, beta_slow, truncate):
    scaling = {"rope_type": "yarn", "factor": factor, "beta_fast": beta_fast}
    scaling |= {"beta_slow": beta_slow, "truncate": truncate}
    scaling |= {"original_max_position_embeddings": original}
    expected, amplitude = of_transformers(head_dim, 1e4, scaling, original)
    found = ours(1e4, scaling)
    torch.testing.assert_close(rope_frequencies(head_dim, 1e4, found), expected)
    assert rope_amplitude(found) == pytest.approx(amplitude)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_served_model_has_the_logits_of_transformers(tmp_path, scaling):
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rope_parameters=scaling | {"rope_theta": 10_000.0},
    )
    torch.manual_seed(3)
    theirs = LlamaForCausalLM(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path / "model")
    ids = torch.randint(0, 60, (150,))
    with torch.inference_mode():
        expected = theirs(ids.unsqueeze(0)).logits[0]
    model, read = load_model(tmp_path / "model")
    _, atol = TOLERANCE[torch.float32]
    for logits in (plain_logits(model, ids.tolist()), served_logits(model, ids.tolist())):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=10 * atol)
    written = config_to_json(CheckpointConfig(read.model))
    assert parse_model(written) == read.model


def test_yarn_needs_a_theta_above_1():
    with pytest.raises(ValueError, match="^rope_theta: yarn needs more than 1, not 1"):
        ours(1.0, YARN)


def test_without_a_scaling_the_amplitude_is_1():
    positions, frequencies = torch.arange(5), torch.rand(4)
    plain = rope_angles(positions, frequencies)
    scaled = rope_angles(positions, frequencies, 1.5)
    for one, other in zip(plain, scaled, strict=True):
        torch.testing.assert_close(other, one * 1.5)
    assert rope_amplitude(None) == rope_amplitude(LinearScaling(3.0)) == 1.0


@pytest.mark.parametrize(
    ("kind", "arguments", "field"),
    [
        (LinearScaling, (0.0,), "factor"),
        (Llama3Scaling, (8.0, 4.0, 1.0, 8192), "high_freq_factor"),
        (YarnScaling, (-1.0, 64), "factor"),
        (YarnScaling, (4.0, 0), "original_max_position"),
        (YarnScaling, (4.0, 64, 0.0), "beta_fast"),
        (YarnScaling, (4.0, 64, 32.0, 1.0, 0.0), "attention_factor"),
    ],
)
def test_values_out_of_range_are_named(kind, arguments, field):
    with pytest.raises(ValueError, match=f"^{field}: "):
        kind(*arguments)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "'dynamic' with"),
        ({"rope_type": "longrope", "factor": 2.0}, "'longrope' with"),
        ({"rope_type": "linear"}, "linear requires factor"),
        ({"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}, r"'yarn' with .*mscale"),
        ({"rope_type": "yarn", "factor": "2"}, "rope_scaling.factor: expected float"),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": 1}, "rope_scaling.truncate: expected"),
        ({"rope_type": 3, "factor": 2.0}, "3 with"),
    ],
)
def test_what_is_not_supported_is_named(scaling, message):
    with pytest.raises(ValueError, match=message):
        ours(1e4, scaling)
