"""The training configs of examples/: their plans, and short runs on texts of their own."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch

from engine.model.flops import forward_flops
from server.cli.main import main
from weights.available_memory import AvailableMemory
from weights.training import run_plan
from weights.training.new_model import model_config
from weights.training.run_folder import saved_states
from weights.training.train_config import read_train_config

EXAMPLES = Path(__file__).parent.parent / "examples"
TEXTS = "build/examples/texts"
TRAINED = ["dense", "memory_plus", "retrofit"]


@pytest.fixture(scope="module")
def write_texts():
    """The script that writes the texts, as a module."""
    spec = importlib.util.spec_from_file_location("write_texts", EXAMPLES / "write_texts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def texts(write_texts, tmp_path):
    library = tmp_path / "library"
    (library / "test").mkdir(parents=True)
    (library / "test" / "left_out.py").write_text('"""A test."""')
    for number in range(40):
        code = f'"""Module {number}."""\nclass A:\n    def f(self):\n        "Gives {number}."\n'
        (library / f"m{number}.py").write_text(code)
    documents = write_texts.docstrings(library)
    assert len(documents) == 40
    assert documents["m7"] == "m7\n\nModule 7.\n\nm7.A.f\n\nGives 7.\n"
    page = "# Page\n\nIt begins.\n" + "".join(f"## {n}\n\nThe number {n}\n" for n in range(24))
    (tmp_path / "page.md").write_text(page)
    sections = write_texts.sections([tmp_path / "page.md"])
    assert "".join(sections.values()) == page and sections["page-07"] == "## 6\n\nThe number 6\n"
    write_texts.write(tmp_path / TEXTS, "python", documents)
    write_texts.write(tmp_path / TEXTS, "memplus", sections)
    counts = {one.name: len(list(one.iterdir())) for one in (tmp_path / TEXTS).iterdir()}
    assert counts == {"python": 36, "python-held-out": 4, "memplus": 23, "memplus-held-out": 2}
    return tmp_path / TEXTS


def test_every_example_is_in_the_readme():
    readme = (EXAMPLES / "README.md").read_text()
    names = {path.stem for path in EXAMPLES.glob("*.toml")}
    assert names == {*TRAINED, "h100"}
    assert all(f"({name}.toml)" in readme for name in names)


def test_dense_and_memory_plus_differ_only_in_the_memory():
    dense, memory = (read_train_config(EXAMPLES / f"{name}.toml") for name in TRAINED[:2])
    assert dense.data == memory.data and dense.run == memory.run
    assert {key: memory.model[key] for key in dense.model} == dense.model
    totals = [
        sum(forward_flops(model_config(one.model, 4096), 50).values()) for one in (dense, memory)
    ]
    assert totals[1] == pytest.approx(totals[0], rel=0.05)


def test_the_large_example_has_a_plan_without_a_gpu(texts, monkeypatch, capsys):
    monkeypatch.chdir(texts.parents[2])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # the machine of a test has less than the disk that two checkpoints need
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 2**36))
    monkeypatch.setattr(run_plan, "available_memory", lambda: AvailableMemory(2**36, "as said"))
    assert main(["train", str(EXAMPLES / "h100.toml"), "--out", "run", "--plan"]) == 0
    said = capsys.readouterr().out
    assert "there is no CUDA device here" in said and "table rows 4.00 GiB" in said
    assert not Path("run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_an_example_trains_and_its_checkpoint_serves(name, texts, request, monkeypatch):
    if name == "retrofit":
        request.getfixturevalue("smollm2")  # skips the test if its package is missing
    monkeypatch.chdir(texts.parents[2])
    fewer = ["run.steps=4", "run.checkpoint_every=2", "run.tokens_per_step=128"]
    fewer += ["data.sequence_length=32"]
    fewer += [] if name == "retrofit" else ["data.vocab_size=300"]
    settings = [part for change in fewer for part in ("--set", change)]
    assert main(["train", str(EXAMPLES / f"{name}.toml"), "--out", "run", *settings]) == 0
    assert [one.name for one in saved_states(Path("run/checkpoints"))][-1] == "step-00000004"
    assert (Path("run/adapter").exists()) == (name == "retrofit")
    prompt = ["m7.A.f", "--max-tokens", "2"]
    assert main(["generate", "--model", "run", "--device", "cpu", *prompt]) == 0
