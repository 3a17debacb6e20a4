"""Tiny random models of transformers' own classes, saved as their authors would."""

from pathlib import Path
from typing import Any

import torch
import transformers

from tests.models import byte_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
KINDS: dict[str, dict[str, Any]] = {
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 24},
    "qwen3 with biases": {"num_key_value_heads": 1, "head_dim": 8, "attention_bias": True},
    "mistral": {"num_key_value_heads": 2, "head_dim": 24, "sliding_window": None},
    "mistral with a window": {"num_key_value_heads": 4, "sliding_window": 24},
    "qwen2 with a window": {
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 24,
        "max_window_layers": 1,
    },
    "llama": {"num_key_value_heads": 2, "head_dim": 6, "attention_bias": True},
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def saved(kind: str, folder: Path) -> transformers.PreTrainedModel:
    """A random model of one of ``KINDS``, saved to ``folder`` with a tokenizer and a template."""
    config = transformers.AutoConfig.for_model(
        kind.split()[0],
        **SIZES,
        **KINDS[kind],
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=256,
    )
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
    model.save_pretrained(folder)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(), eos_token="<eos>", chat_template=CHAT_TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    return model


def greedy_answer(model: transformers.PreTrainedModel, ids: list[int], count: int) -> list[int]:
    """The next ``count`` tokens that transformers chooses; end tokens are tokens like others."""
    with torch.no_grad():
        answer = model.generate(
            torch.tensor([ids]), max_new_tokens=count, do_sample=False, eos_token_id=-1
        )
    return answer[0, len(ids) :].tolist()
