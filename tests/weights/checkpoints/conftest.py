"""The tokenizer of the tests' training runs."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models


@pytest.fixture
def tokenizer(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    made = Tokenizer(models.BPE({chr(33 + i): i for i in range(90)}, []))
    made.decoder = decoders.Fuse()
    made.add_special_tokens([AddedToken(name, special=True) for name in ("<bos>", "<eos>")])
    made.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder
