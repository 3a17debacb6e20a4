"""A server whose table file is touched, then changed: answers and /health."""

import os
import shutil

import pytest

from memory_ops.native import disk_rows
from tests.server.running import running
from weights.checkpoints.tensor_files import list_tensors


@pytest.mark.skipif(not disk_rows.is_available(), reason="built without a compiler")
def test_health_is_a_503_that_names_a_changed_table_but_not_a_touched_one(
    memory_plus_folder, tmp_path
):
    folder = tmp_path / "model"
    shutil.copytree(memory_plus_folder, folder)
    (file,) = folder.glob("table-*")
    (stored,) = (one for one in list_tensors(folder).values() if one.file == file)
    with running(folder, "--table-tier", "disk", "--table-cache", "64KiB") as server:
        answer = server.complete(prompt="hello", max_tokens=8, temperature=0)
        os.utime(file, ns=(0, 0))
        again = server.complete(prompt="hello", max_tokens=8, temperature=0)
        assert (answer.status_code, again.status_code) == (200, 200)
        assert again.json()["choices"] == answer.json()["choices"]
        assert server.http.get("/health").status_code == 200
        with file.open("r+b") as opened:
            opened.seek(stored.offset)
            opened.write(b"x" * stored.num_bytes)
        os.utime(file, ns=(1, 1))
        assert server.complete(prompt="hello", max_tokens=8).status_code == 500
        health = server.http.get("/health")
        assert health.status_code == 503
        message = health.json()["error"]["message"]
        changed = "the file changed after it was opened: reload the table"
        assert message == f"value tables are lost: {file}: {changed}"
        assert server.complete(prompt="hello", max_tokens=8).status_code == 500
