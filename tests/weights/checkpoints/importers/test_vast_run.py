"""A run whose table is larger than what its conversion may hold in memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.weights.checkpoints.importers import test_sparse_memory
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
    assert converted_bytes(folder, tmp_path / "out", tokenizer) < table.nbytes // 4


@pytest.mark.slow
def test_a_conversion_of_codes_holds_little_of_a_table(tmp_path, tokenizer):
    num_rows = NUM_SUBKEYS**2
    tensors, config = test_sparse_memory.golden()
    for layer in (1, 3):
        tensors[f"layers.{layer}.ffn.keys"] = torch.zeros(4, 2, NUM_SUBKEYS, 12)
    config["mem_n_keys"] = NUM_SUBKEYS
    files = {"values_q4.bin": bytes(num_rows * 24), "scales_q4.bin": bytes(num_rows * 2)}
    shape = num_rows, 48
    folder = test_sparse_memory.write_published(
        tmp_path / "source", tensors, config, files, shape=shape
    )
    # codes take a quarter of bf16 values
    assert converted_bytes(folder, tmp_path / "out", tokenizer) < num_rows * 48 * 2 // 8


def converted_bytes(source: Path, target: Path, tokenizer: Path) -> int:
    """Bytes of memory that the conversion of a folder takes."""
    command = [sys.executable, "-c", _CONVERT, source, target, tokenizer]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (target / "config.json").exists()
    return int(done.stdout)
