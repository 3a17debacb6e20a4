"""Files with byte order marks and Windows line ends are read like those without."""

import json
import os
import shutil

import pytest

from tests.models import byte_tokenizer
from weights.checkpoints.chat_template import load_chat_template
from weights.checkpoints.checkpoint import open_checkpoint
from weights.checkpoints.config_json import read_config
from weights.checkpoints.tokenizer import load_tokenizer
from weights.errors import CheckpointError
from weights.text_files import read_json_object, regular_file_bytes
from weights.training.train_config import read_train_config


def test_every_text_file_of_a_folder_may_begin_with_a_mark(tmp_path, memory_plus_folder):
    folder = tmp_path / "model"
    shutil.copytree(memory_plus_folder, folder)
    tokenizer = byte_tokenizer().to_str(pretty=True)
    (folder / "tokenizer.json").write_text(tokenizer.replace("<unused>", "<é>"))
    (folder / "tokenizer_config.json").write_text('{"pad_token": "<x>"}')
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<eos>"}')
    (folder / "added_tokens.json").write_text('{"<é>": 259}')
    (folder / "generation_config.json").write_text('{\n"eos_token_id": [3]\n}')
    tensors = open_checkpoint(folder)[1].values()
    weight_map = {one.name: one.file.name for one in tensors if one.name != "memory.table"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    plain = open_checkpoint(folder), load_tokenizer(folder).encode("a<é>\n")
    for path in folder.glob("*.json"):
        path.write_text(path.read_text().replace("\n", "\r\n"), encoding="utf-8-sig", newline="")
    assert (open_checkpoint(folder), load_tokenizer(folder).encode("a<é>\n")) == plain
    assert read_config(folder).eos_ids == {3}


def test_a_training_config_may_begin_with_a_mark(tmp_path):
    text = '[data]\r\ntrain = "a.txt"\r\n[model]\r\n[run]\r\nsteps = 1\r\n'
    (tmp_path / "train.toml").write_text(text, encoding="utf-8-sig", newline="")
    assert read_train_config(tmp_path / "train.toml").data.train == ("a.txt",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", "expected a JSON object"),
        (b"{", "not valid JSON"),
        ('{"a": 1}'.encode("utf-16"), "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"config.json: {message}"):
        read_json_object(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="No such file"):
        read_json_object(tmp_path / "none.json")


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
        "chat_template.json",
    ],
)
def test_a_file_that_is_no_regular_file_or_huge_is_refused(tmp_path, memory_plus_folder, name):
    folder = tmp_path / "model"
    shutil.copytree(memory_plus_folder, folder)
    file = folder / name

    def read():
        open_checkpoint(folder)
        load_tokenizer(folder)
        load_chat_template(folder)

    read()
    file.unlink(missing_ok=True)
    os.mkfifo(file)
    with pytest.raises(CheckpointError, match=f"{name}: is not a regular file"):
        read()
    file.unlink()
    file.touch()
    os.truncate(file, 2**40)  # sparse
    with pytest.raises(CheckpointError, match=f"{name}: has {2**40} bytes, more than"):
        read()


def test_the_size_of_a_file_is_that_of_the_file_behind_a_link(tmp_path):
    (tmp_path / "file").write_bytes(bytes(5))
    (tmp_path / "link").symlink_to("file")
    assert regular_file_bytes(tmp_path / "link", 5) == 5
    with pytest.raises(CheckpointError, match="link: has 5 bytes, more than 4"):
        regular_file_bytes(tmp_path / "link", 4)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match="loop: Too many levels of symbolic links"):
        regular_file_bytes(tmp_path / "loop")
