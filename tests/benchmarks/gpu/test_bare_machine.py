"""The check on a machine with torch and triton alone: what it imports, and what it leaves out."""

import subprocess
import sys

import pytest

ABSENT = (
    *("fastapi", "uvicorn", "pydantic", "sentencepiece", "tqdm", "gguf"),
    *("prometheus_client", "tokenizers", "starlette", "jinja2", "uvloop", "httpx", "transformers"),
)
REFUSE = f"""
import sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Refused())
"""


def run(code):
    return subprocess.run([sys.executable, "-c", REFUSE + code], capture_output=True, text=True)


def test_the_help_needs_no_other_package():
    found = run("from server.cli.main import main\nmain(['bench', 'gpu', '--help'])")
    assert found.returncode == 0 and "--part" in found.stdout, found.stderr


@pytest.mark.parametrize(
    "part",
    [
        "correctness",
        *(pytest.param(part, marks=pytest.mark.slow) for part in ("kernels", "decode", "tables")),
        pytest.param("disk", marks=pytest.mark.slow),
        pytest.param("lookups", marks=pytest.mark.slow),
    ],
)
def test_each_part_imports_what_it_needs(part):
    pytest.importorskip("triton")
    code = f"""
from pathlib import Path
from benchmarks.gpu.card_limits import CardLimits
from benchmarks.gpu.part import PartSetup
from benchmarks.gpu.run import PART_MODULES
from benchmarks.kernel_shapes import Shapes
from benchmarks.memory.load import default_trace
import importlib
import torch
import engine.executors.executor

setup = PartSetup(
    CardLimits(1, 1, 1), False, lambda name: None, Shapes(), 0.1, default_trace(), "wordnet", Path()
)
tasks = list(importlib.import_module(PART_MODULES[{part!r}]).tasks(setup))
names = [name for task in tasks for name in task.names]
assert len(set(names)) == len(names), "a name of two figures"
print(len(names))
"""
    found = run(code)
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) > 10


def test_the_default_model_is_read_without_other_packages():
    code = "from benchmarks.gpu.model_checks import _wordnet\nprint(len(_wordnet().tables))"
    found = run(code)
    assert found.stdout == "1\n", found.stderr


@pytest.mark.parametrize(
    ("module", "reason"),
    [("http_serving", "needs fastapi, "), ("transformers_peer", "transformers is not installed")],
)
def test_parts_that_need_more_say_so(module, reason):
    code = f"""
import importlib.util
from benchmarks.gpu.part import Skipped
from benchmarks.gpu.{module} import tasks

class Setup:
    served_model = "wordnet"

find_spec = importlib.util.find_spec

def found(name):
    try:
        return find_spec(name)
    except ModuleNotFoundError:
        return None

importlib.util.find_spec = found
task = next(tasks(Setup()))
try:
    list(task.run(task.names))
except Skipped as skipped:
    print(skipped)
"""
    found = run(code)
    assert found.stdout.startswith(reason), found.stderr


@pytest.mark.slow
def test_training_is_timed_without_other_packages():
    code = """
import importlib.util
from benchmarks.training import measure
from benchmarks.training_scale import TrainingScale
from engine.model.config import ModelConfig

find_spec = importlib.util.find_spec

def found(name, package=None):
    # torch asks for packages that it may do without
    try:
        return find_spec(name, package)
    except ModuleNotFoundError:
        return None

importlib.util.find_spec = found
heads = dict(num_heads=2, num_kv_heads=2, head_dim=8)
model = ModelConfig(50, 16, 16, 3, **heads, max_positions=8, rope_theta=1e4, tie_embeddings=False)
measure(1, None, scale=TrainingScale("cpu", (64,), 64, 8, 64, 8, 2, model, 8))
"""
    found = run(code)
    assert found.returncode == 0, found.stderr
    assert "memory model" in found.stdout
