"""Other families behind a real server: the openai client gets the answers of transformers."""

import openai
import pytest
import transformers

from tests.hugging_face_models import greedy_answer, saved
from tests.server.running import running

MESSAGES = [{"role": "user", "content": "o"}]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "mistral", "mistral with a window"])
def test_chat_and_completions(kind, tmp_path):
    folder = tmp_path / "tiny"
    model = saved(kind, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    count = 24 - len(ids) if "window" in kind else 12
    expected = tokenizer.decode(greedy_answer(model, ids, count), skip_special_tokens=True)
    options = {"temperature": 0, "max_tokens": count, "extra_body": {"ignore_eos": True}}
    with running(folder) as server:
        url = f"{server.url}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            chat = client.chat.completions.create(model="tiny", messages=MESSAGES, **options)
            text = client.completions.create(model="tiny", prompt=ids, **options)
    assert chat.choices[0].message.content == text.choices[0].text == expected
    assert chat.usage.prompt_tokens == len(ids)
