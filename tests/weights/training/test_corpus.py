"""Training texts: order of files, and errors of unreadable ones."""

import gzip
import json
import os
import sys

import pytest

from weights.errors import DataError
from weights.training import corpus
from weights.training.corpus import corpus_files, documents, other_files


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
        ("a.jsonl", b"\xff", "a.jsonl, line 1: not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n' * 999 + b"caf\xe9", "a.jsonl, line 1000: not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text"', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1: not JSON"),
        ("a.jsonl", b'["x"]', "line 1: expected a JSON object"),
        ("a.jsonl", b'{"text": 3}', "line 1: text: expected a string"),
        ("a.jsonl", b'{"body": "x", "id": 3}', "line 1: has no `text`; its keys are body, id"),
        ("a.jsonl.gz", b'{"text": "x"}', "a.jsonl.gz: not a whole gzip file"),
        ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], "a.txt.gz: not a whole gzip file"),
        ("a.parquet", b"text", "a.parquet: not a parquet file"),
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
    for name, message in (("", "no file of a known"), ("b", "no such"), ("a.pdf", "of no known")):
        with pytest.raises(DataError, match=message):
            corpus_files([str(tmp_path / name)])


def test_a_pipe_is_no_text_and_a_broken_link_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    os.mkfifo(tmp_path / "pipe.txt")
    assert corpus_files([str(tmp_path)]) == [tmp_path / "a.txt"]
    (tmp_path / "b.txt").symlink_to("nothing")
    with pytest.raises(DataError, match="b.txt: No such file"):
        list(documents(corpus_files([str(tmp_path)])))


def test_compressed_files_and_other_keys_are_read(tmp_path):
    lines = '{"body": "one", "text": 3}\r\n{"body": "two"}\n'
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode("utf-8-sig")))
    (tmp_path / "B.TXT").write_text("three")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"four\r\nfive", mtime=0))
    (tmp_path / "notes.md").touch()
    files = corpus_files([str(tmp_path)])
    assert list(documents(files, "body")) == ["three", "one", "two", "four\nfive"]
    assert other_files([str(tmp_path), str(tmp_path / "B.TXT")]) == [tmp_path / "notes.md"]


def test_a_parquet_column_is_read(tmp_path, monkeypatch):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"body": ["one", "two"], "size": [1, 2]})
    parquet.write_table(table, tmp_path / "a.parquet")
    files = corpus_files([str(tmp_path)])
    assert list(documents(files, "body")) == ["one", "two"]
    for key, message in (("text", "its keys are body, size"), ("size", "row 1: size: expected")):
        with pytest.raises(DataError, match=f"a.parquet.*{message}"):
            list(documents(files, key))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match="a.parquet: a parquet file needs pyarrow"):
        list(documents(files, "body"))


def test_huge_documents_are_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_MAX_CHARACTERS", 99)
    (tmp_path / "a.txt").write_text("x" * 99)
    assert len(next(documents(corpus_files([str(tmp_path)])))) == 99
    (tmp_path / "a.txt").write_text("x" * 100)
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n' + "x" * 200)
    for name, message in (("a.txt", "a.txt: has more than 99"), ("b.jsonl", "b.jsonl, line 2")):
        with pytest.raises(DataError, match=message):
            list(documents([tmp_path / name]))
