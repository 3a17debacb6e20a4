"""The modules of docs/library.md, as a program that uses memory_ops alone would run them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "library.md").read_text(), re.DOTALL)
MODULE = BLOCKS[0].partition("torch.manual_seed")[0]
STEPS = """
import sys
torch.manual_seed(0)
memory = ProductKeyMemory(width=32, num_subkeys=16)
call = torch.compile(memory) if sys.argv[1] == "compiled" else memory
optimizer = torch.optim.SparseAdam(memory.values.parameters(), lr=1e-2)
x = torch.randn(64, 32)
for step in range(3):
    loss = (call(x) - 1).square().mean()
    loss.backward()
    optimizer.step()
    memory.zero_grad()
print(f"{loss.item():.5f}")
"""
SHARED = """
import sys
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from weights.training.replicas import Replicas
rank, rendezvous = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=2)
torch.manual_seed(0)
memory, recorded = ProductKeyMemory(32, 16), RecordedMemory(32, 16)
recorded.load_state_dict(memory.state_dict(), strict=False)
recorded.table.table_RV.copy_(memory.values.weight.detach())
alone = ProductKeyMemory(32, 16)
alone.load_state_dict(memory.state_dict())
both = [DistributedDataParallel(memory), DistributedDataParallel(recorded)]
x, target = torch.randn(64, 32), torch.randn(64, 32)
table = TableOptimizer([recorded.table], betas=(0.9, 0.999), replicas=Replicas.of_group("cpu"))
sparse = [torch.optim.SparseAdam(one.values.parameters(), lr=1e-2) for one in (memory, alone)]
part = slice(32 * rank, 32 * rank + 32)
for _ in range(3):
    for call, rows in ((both[0], part), (both[1], part), (alone, slice(None))):
        (call(x[rows]) - target[rows]).square().mean().backward()
    table.collect()
    table.step(1e-2, scale=1 / 2)
    for one in sparse:
        one.step()
        one.zero_grad()
for values in (memory.values.weight, recorded.table.table_RV):
    torch.testing.assert_close(values, alone.values.weight, rtol=1e-4, atol=1e-5)
distributed.destroy_process_group()
"""


def test_both_modules_learn():
    losses: list[float] = []
    namespace: dict[str, object] = {"losses": losses}
    for block in BLOCKS:
        lines = block.replace("loss.backward()", "losses.append(loss.item()); loss.backward()")
        exec(compile(lines, "library.md", "exec"), namespace)
    assert len(losses) == 40
    assert losses[19] < losses[0] and losses[39] < losses[20]


def test_the_first_module_has_40_lines():
    assert len(BLOCKS[0].strip().splitlines()) <= 40


def start(folder: Path, code: str, *arguments: str) -> subprocess.Popen[str]:
    script = folder / "script.py"
    script.write_text(code)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "cold"),
    }
    return subprocess.Popen(
        [sys.executable, str(script), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_the_module_compiles_without_options_or_warnings(tmp_path):
    outputs = []
    for kind in ("eager", "compiled"):
        process = start(tmp_path, MODULE + STEPS, kind)
        outputs.append(process.communicate(timeout=300)[0])
    assert float(outputs[0]) == pytest.approx(float(outputs[1]), abs=1e-4)


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path):
    classes = BLOCKS[1].partition("memory = ")[0]
    code = "\n".join((MODULE, classes, SHARED))
    processes = [start(tmp_path, code, str(rank), str(tmp_path / "meet")) for rank in range(2)]
    for process in processes:
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output


def test_a_table_with_a_gradient_breaks_the_graph_and_a_frozen_one_does_not():
    namespace: dict[str, object] = {}
    exec(compile(MODULE, "library.md", "exec"), namespace)
    memory = namespace["ProductKeyMemory"](32, 16)
    x = torch.randn(3, 32)
    whole = torch.compile(memory, backend="aot_eager", fullgraph=True)
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match="memory_ops: the gradient of the table is sparse"
    ):
        whole(x)
    memory.values.requires_grad_(False)
    torch.testing.assert_close(whole(x), memory(x))
