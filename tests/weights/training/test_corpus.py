"""Training texts: order of files, and errors of unreadable ones."""

import json

import pytest

from weights.errors import DataError
from weights.training.corpus import corpus_files, documents


def test_folders_and_files_are_read_in_order(tmp_path):
    (tmp_path / "b.txt").write_text("two\nlines\n")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "zwei\\n", "id": 3}\n')
    (tmp_path / "notes.md").write_text("no")
    wanted = ["one", "zwei\n", "two\nlines\n"]
    assert list(documents(corpus_files([str(tmp_path)]))) == wanted
    files = [str(tmp_path / "b.txt"), str(tmp_path / "a.jsonl")]
    assert list(documents(corpus_files(files))) == [wanted[2], *wanted[:2]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt: is empty"),
        ("a.txt", b" \n", "a.txt: is empty"),
        ("a.txt", b"caf\xe9", r"a.txt: not UTF-8 \(byte 3\)"),
        ("a.jsonl", b"", "a.jsonl: is empty"),
        ("a.jsonl", b"\xff", "a.jsonl: not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text"', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1: not JSON"),
        ("a.jsonl", b'["x"]', "line 1: expected a JSON object"),
        ("a.jsonl", b'{"text": 3}', "line 1: expected a JSON object with a string"),
        ("a.jsonl", json.dumps({"text": ""}).encode(), "line 1: is empty"),
        ("a.jsonl", rb'{"text": "x \ud83d"}', "line 1: has a lone surrogate"),
        ("a.txt", "text".encode("utf-16"), r"a.txt: not UTF-8 \(byte 0\)"),
    ],
)
def test_invalid_texts_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(documents(corpus_files([str(tmp_path)])))


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_byte_order_marks_and_line_ends_are_not_text(tmp_path, mark, ends):
    lines = mark + '{"text": "one"}\n' + mark + '{"text": "two \ufeff"}\n' + mark + "\n"
    (tmp_path / "a.jsonl").write_bytes(lines.replace("\n", ends).encode())
    (tmp_path / "b.txt").write_bytes(f"{mark}two\nlines\n".replace("\n", ends).encode())
    wanted = ["one", "two \ufeff", "two\nlines\n"]
    assert list(documents(corpus_files([str(tmp_path)]))) == wanted


def test_missing_paths_are_refused(tmp_path):
    (tmp_path / "a.pdf").touch()
    for name, message in (("", "has no .txt"), ("b", "no such"), ("a.pdf", "neither")):
        with pytest.raises(DataError, match=message):
            corpus_files([str(tmp_path / name)])
