"""Shapes of known models for models of drawn weights: SmolLM2-135M and Llama-3-8B."""

from engine.model.config import ModelConfig

SMOLLM2_SHAPE = ModelConfig(
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    max_positions=8192,
    rope_theta=100_000.0,
    tie_embeddings=True,
)
LLAMA_8B_SHAPE = ModelConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_positions=8192,
    rope_theta=500_000.0,
)
