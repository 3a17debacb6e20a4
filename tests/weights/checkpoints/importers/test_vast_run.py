"""A run whose table is larger than what its conversion may hold in memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.weights.checkpoints.importers.sharded_files import write_shards
from tests.weights.checkpoints.importers.test_lingua import FIRST, SECOND, golden, write_run

NUM_SUBKEYS = 3300  # 10.9 million rows of 48 in fp16: 1 GiB
_CONVERT = """
import sys, threading
from pathlib import Path
from weights.checkpoints.convert import convert

def anonymous():
    text = Path("/proc/self/status").read_text()
    return int(text.partition("RssAnon:")[2].split()[0]) * 1024

before, peaks, done = anonymous(), [0], threading.Event()
def watch():
    while not done.wait(0.005):
        peaks.append(anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
convert(Path(sys.argv[1]), Path(sys.argv[2]), tokenizer=Path(sys.argv[3]))
done.set()
watcher.join()
print(max(peaks) - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_conversion_holds_little_of_a_table(tmp_path, tokenizer, is_sharded):
    tensors, params = golden("memory_plus")
    params["model"]["productkey_args"]["mem_n_keys"] = NUM_SUBKEYS
    for prefix in (FIRST, SECOND):
        tensors[f"{prefix}keys"] = torch.zeros(6 * NUM_SUBKEYS, 12)
    table = torch.zeros(NUM_SUBKEYS**2, 48, dtype=torch.float16)
    tensors[f"{FIRST}values.weight"] = table
    folder = tmp_path / "run"
    if is_sharded:
        # the second layer repeats the table, which is compared with the first in parts
        tensors[f"{SECOND}values.weight"] = table
        write_shards(folder, {f"model.{name}": one for name, one in tensors.items()}, 3)
        (folder / "params.json").write_text(json.dumps(params))
    else:
        write_run(folder, tensors, params)
    command = [sys.executable, "-c", _CONVERT, folder, tmp_path / "out", tokenizer]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < table.nbytes // 4
    assert Path(tmp_path / "out" / "config.json").exists()
