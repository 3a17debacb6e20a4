"""The training configs of examples/: their plans, and short runs on small texts."""

import importlib.util
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.model.flops import forward_flops
from server.cli.main import main
from weights.training import training_texts
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
    counts = {kind: len(names) for kind, names in written(tmp_path / TEXTS).items()}
    assert counts == {"python": 37, "python-held-out": 3, "memplus": 24, "memplus-held-out": 1}
    return tmp_path / TEXTS


def written(folder):
    """The names of the texts in each folder."""
    folders = [one for one in folder.iterdir() if one.is_dir()]
    return {one.name: {text.name for text in one.iterdir()} for one in folders}


def test_no_text_is_in_both_folders_after_a_second_write(write_texts, tmp_path):
    documents = {f"m{number}": "A text." for number in range(40)}
    write_texts.write(tmp_path, "python", documents)
    del documents["m34"], documents["m7"]
    write_texts.write(tmp_path, "python", {"first": "A text.", **documents})
    texts = written(tmp_path)
    assert texts["python-held-out"] == {"m5.txt", "m35.txt"}
    names = {"first.txt", *(f"{name}.txt" for name in documents)}
    assert texts["python"] == names - texts["python-held-out"]


def test_texts_of_others_are_not_deleted(write_texts, tmp_path):
    (tmp_path / "python-held-out").mkdir()
    (tmp_path / "python-held-out" / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match="python-held-out: has files that this script did not"):
        write_texts.write(tmp_path, "python", {"m1": "A text."})
    assert written(tmp_path) == {"python": set(), "python-held-out": {"mine.txt"}}


def test_every_example_is_in_the_readme():
    readme = (EXAMPLES / "README.md").read_text()
    names = {path.stem for path in EXAMPLES.glob("*.toml")}
    assert names == {*TRAINED, "h100"}
    assert all(f"({name}.toml)" in readme for name in names)


def test_dense_and_memory_plus_differ_only_in_the_memory():
    dense, memory = (read_train_config(EXAMPLES / f"{name}.toml") for name in TRAINED[:2])
    assert dense.data == memory.data and dense.run == memory.run
    assert {key: value for key, value in memory.model.items() if key != "memory"} == dense.model
    # only the table has this learning rate
    assert replace(memory.optimizer, table_lr=dense.optimizer.table_lr) == dense.optimizer
    totals = [
        sum(forward_flops(model_config(one.model, 4096), 50).values()) for one in (dense, memory)
    ]
    assert totals[1] == pytest.approx(totals[0], rel=0.05)


def test_the_large_example_has_a_plan_without_a_gpu(texts, monkeypatch, capsys):
    monkeypatch.chdir(texts.parents[2])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # the machine of a test has less than the disk that two checkpoints need
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 2**36))
    # the texts of a test are too few for its vocabulary
    monkeypatch.setattr(training_texts, "_QUICK_CHARACTERS", 0)
    config = EXAMPLES / "h100.toml"
    assert main(["train", str(config), "--out", "run", "--plan"]) == 0
    said = capsys.readouterr().out
    assert "there is no CUDA device here" in said and "table rows 4.00 GiB" in said
    # the card is one of 80 GB, and the file says what a checkpoint takes
    (memory,) = re.findall(r"and about ([\d.]+) GiB", said)
    (checkpoint,) = re.findall(r"\(2 of ([\d.]+) GiB\)", said)
    assert float(memory) * 2**30 < 80e9
    (claimed,) = re.findall(r"a checkpoint takes about (\d+) GB", config.read_text())
    assert round(float(checkpoint) * 2**30 / 1e9) == int(claimed)
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
