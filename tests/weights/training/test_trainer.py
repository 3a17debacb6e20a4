"""Training runs of tiny models: learning, stopping, resuming bit for bit, and failures."""

import copy
import errno
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.errors import ConfigError
from engine.model.layout import TokenLayout
from engine.model.memory_layer import half_scores
from server.cli import train
from tests.small_runs import CONFIG, KILLED, MEMORY, check_same, losses, records, run, tensors
from weights.checkpoints import checkpoint
from weights.checkpoints.checkpoint import load_model, table_origins
from weights.errors import CheckpointError, DataError, TrainingError
from weights.training import run_plan, trainer, training_texts
from weights.training.replicas import Replicas
from weights.training.row_reads import read_row_reads
from weights.training.run_folder import run_lock, saved_states
from weights.training.run_plan import plan_run
from weights.training.train_config import read_train_config
from weights.training.trainer import Trainer
from weights.training.training_data import prepare_data
from weights.training.training_texts import TrainingTexts


def test_the_last_checkpoint_has_a_record_of_row_reads(config, tmp_path):
    run(config(), tmp_path / "run")
    first, last = saved_states(tmp_path / "run" / "checkpoints")
    assert not (first / "row_reads.safetensors").exists()
    model, _ = load_model(last)
    reads = read_row_reads(last, model.config, table_origins(last))
    assert reads.num_documents == len(
        prepare_data(config().data, tmp_path / "run" / "data", 0).train
    )
    for table in reads.tables.values():
        # 2 heads read 4 rows for each token
        assert table.reads_R.sum() % 8 == 0 and table.documents_R.max() <= reads.num_documents
    run(config(memory=False), tmp_path / "dense")
    last = saved_states(tmp_path / "dense" / "checkpoints")[-1]
    assert not (last / "row_reads.safetensors").exists()


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_falls(config, tmp_path, memory, dtype):
    changes = ("run.steps=40", "run.checkpoint_every=40", f"run.dtype={dtype}")
    reports = run(config(*changes, memory=memory), tmp_path / "run")
    assert reports[0].loss == pytest.approx(math.log(300), rel=0.2)
    assert reports[-1].loss < 0.7 * reports[0].loss
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    evaluations = [record for record in log if record["kind"] == "evaluation"]
    assert [record["step"] for record in evaluations] == list(range(4, 41, 4))
    assert evaluations[-1]["perplexity"] < evaluations[0]["perplexity"]
    if memory:
        usage = [record["memory.table share"] for record in evaluations]
        assert all(0 < share <= 1 for share in usage)


KINDS = {
    "dense": [],
    "moe": ["model.num_local_experts=4", "model.num_experts_per_tok=2"],
    "pkm": ['model.memory.layers={"1"="pkm"}'],
    "memory_plus": [],
    "peer": ['model.memory.layers={"0"="peer", "1"="memory_plus"}'],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns_and_serves_the_same_logits(config, tmp_path, kind):
    has_memory = kind not in ("dense", "moe")
    made = Trainer(
        config("run.steps=30", *KINDS[kind], memory=has_memory), tmp_path / "run", resume=False
    )
    reports = []
    made.run(lambda report: reports.append(report) or True)
    assert reports[-1].loss < 0.8 * reports[0].loss
    served, checkpoint = load_model(saved_states(tmp_path / "run" / "checkpoints")[-1])
    assert kind in checkpoint.model.feed_forward
    ids = list(range(3, 20))
    layout = TokenLayout(torch.arange(17), (0, 17))
    with torch.no_grad():
        trained = made._model(torch.tensor(ids), layout, torch.arange(17), with_trace=True)
    found = served(torch.tensor(ids), layout, torch.arange(17), with_trace=True)
    torch.testing.assert_close(found.logits_LV, trained.logits_LV)
    for layer, trace in trained.memory.items():
        assert torch.equal(found.memory[layer].rows_THK, trace.rows_THK)


# there are more experts than the tokens of a step can choose
MANY_EXPERTS = ["model.num_local_experts=60", "model.num_experts_per_tok=1"]


@pytest.mark.parametrize(
    "changes",
    [[], [*MANY_EXPERTS, "run.tokens_per_step=16"], ["optimizer.moment_dtype=bfloat16"]],
)
def test_a_resumed_run_is_equal_bit_for_bit(config, tmp_path, changes):
    made = partial(config, *changes, memory="run.tokens_per_step=16" not in changes)
    run(made(), tmp_path / "whole")
    run(made(), tmp_path / "cut", until=5)
    run(made(), tmp_path / "cut", resume=True)
    check_same(tmp_path / "cut", tmp_path / "whole")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_steps_after_the_last_checkpoint_are_repeated(config, tmp_path, monkeypatch):
    run(config(), tmp_path / "whole")
    folder = tmp_path / "killed"
    made = Trainer(config(), folder, resume=False)

    def kill(report):
        if report.step == 6:
            raise KeyboardInterrupt
        return True

    with pytest.raises(KeyboardInterrupt):
        made.run(kill)
    # a partial checkpoint and an incomplete log line
    (folder / "checkpoints" / ".step-00000006.partial-1").mkdir()
    with open(folder / "log.jsonl", "a") as log:
        log.write('{"kind": "st')
    assert len(losses_of_whole_lines(folder)) == 6
    run(config(), folder, resume=True)
    check_same(folder, tmp_path / "whole")
    assert losses(folder) == losses(tmp_path / "whole")
    assert not list((folder / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_a_run_resumes_after_kill_9(config, tmp_path):
    run(config(), tmp_path / "whole")
    folder, config_file = tmp_path / "killed", tmp_path / "train.toml"
    # while writing the second checkpoint
    arguments = ["30", str(config_file), "--out", str(folder)]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], timeout=300)
    assert killed.returncode == -signal.SIGKILL
    assert list(folder.rglob(".*partial*"))
    assert len(saved_states(folder / "checkpoints")) == 1
    run(config(), folder, resume=True)
    check_same(folder, tmp_path / "whole")
    assert losses(folder) == losses(tmp_path / "whole")


def losses_of_whole_lines(folder):
    lines = (folder / "log.jsonl").read_text().splitlines(True)
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record["loss"] for record in records if record["kind"] == "step"]


def test_recomputed_activations_change_nothing(config, tmp_path):
    run(config("run.checkpoint_activations=true"), tmp_path / "anew")
    run(config(), tmp_path / "kept")
    check_same(tmp_path / "anew", tmp_path / "kept")
    assert losses(tmp_path / "anew") == losses(tmp_path / "kept")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's compiler
def test_compiled_layers_train_alike_and_resume_bit_for_bit(config, tmp_path):
    made = partial(config, "run.compile=true", "run.steps=4", "run.checkpoint_every=2")
    run(made(), tmp_path / "compiled")
    run(config("run.steps=4"), tmp_path / "plain")
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), abs=1e-4)
    run(made(), tmp_path / "cut", until=2)
    run(made("run.checkpoint_activations=true"), tmp_path / "cut", resume=True)
    check_same(tmp_path / "cut", tmp_path / "compiled")


def test_a_compiler_that_fails_is_reported(config, tmp_path, monkeypatch):
    def broken(function):
        def fail(x):
            raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand more")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ConfigError, match="run.compile: .* No working C.. compiler found$"):
        run(config("run.compile=true"), tmp_path / "run")


def test_gradients_of_passes_add_up_to_a_step(config, tmp_path):
    run(config("run.passes_per_step=4"), tmp_path / "passes")
    run(config(), tmp_path / "whole")
    for one, other in zip(losses(tmp_path / "passes"), losses(tmp_path / "whole"), strict=True):
        # passes cut a document that a whole step does not cut
        assert one == pytest.approx(other, rel=0.1)


def test_a_full_disk_keeps_earlier_checkpoints(config, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    run(config(), folder, until=4)
    before = tensors(folder)
    write = checkpoint.write_tensors

    def full(path, *arguments):
        if path.name.startswith("trainer"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, *arguments)

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(CheckpointError, match="No space left"):
        run(config(), folder, resume=True)
    assert tensors(folder).keys() == before.keys()
    monkeypatch.undo()
    run(config(), folder, resume=True)
    run(config(), tmp_path / "whole")
    check_same(folder, tmp_path / "whole")


def test_a_nan_loss_stops_the_run_and_names_the_step(config, tmp_path, monkeypatch):
    losses, calls = trainer.batch_loss, []

    def broken(*arguments):
        calls.append(0)
        loss = losses(*arguments)
        return loss._replace(nats=loss.nats * (math.nan if len(calls) == 3 else 1))

    monkeypatch.setattr(trainer, "batch_loss", broken)
    with pytest.raises(TrainingError, match="step 3: the loss is nan"):
        run(config(), tmp_path / "run")


def test_a_nan_gradient_stops_the_run_and_names_the_step(config, tmp_path, monkeypatch):
    losses = trainer.batch_loss

    def broken(model, *arguments):
        model.model.norm.weight.register_hook(lambda gradient: gradient * math.inf)
        return losses(model, *arguments)

    monkeypatch.setattr(trainer, "batch_loss", broken)
    with pytest.raises(TrainingError, match="step 1: the gradients' norm is (nan|inf)"):
        run(config(), tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_and_saves_the_step(config, tmp_path, monkeypatch, capsys, number):
    losses, calls = trainer.batch_loss, []

    def interrupted(*arguments):
        calls.append(0)
        if len(calls) == 2:
            signal.raise_signal(number)
        return losses(*arguments)

    monkeypatch.setattr(trainer, "batch_loss", interrupted)
    before = signal.getsignal(number)
    assert train.run(config(), tmp_path / "run", resume=False) == 128 + number
    assert signal.getsignal(number) is before
    assert [state.name for state in saved_states(tmp_path / "run" / "checkpoints")] == [
        "step-00000002"
    ]
    assert "after step 2" in capsys.readouterr().out
    assert train.run(config(), tmp_path / "run", resume=True) == 0


@pytest.mark.parametrize("has_matplotlib", [True, False])
def test_a_finished_run_leaves_curves_and_a_model_card(
    config, tmp_path, monkeypatch, capsys, has_matplotlib
):
    if not has_matplotlib:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert train.run(config(), tmp_path / "run", resume=False) == 0
    printed = capsys.readouterr().out
    card = (tmp_path / "run" / "card.md").read_text()
    last = losses(tmp_path / "run")
    assert f"{sum(last) / 8:.4f} nats per token" in card and "8 steps, 1,024 tokens" in card
    assert "2 memory_plus" in card and "lr = 0.003" in card and "perplexity" in card
    assert "MFLOP per token forward" in printed and "card.md" in printed
    assert "texts: the run reads 1,024 tokens, " in printed
    assert re.search(r"step 8: held-out loss [\d.]+, perplexity [\d.e+]+\n", printed)
    assert printed.endswith(f"memplus serve --model {tmp_path / 'run'}\n")
    curves = tmp_path / "run" / "curves.png"
    assert curves.exists() == ("curves.png" in card) == has_matplotlib
    assert ("curves: not drawn" in printed) == (not has_matplotlib)
    assert f"serve --model {tmp_path / 'run'}\n" in card and "`checkpoints/step-00000008`" in card
    again = tmp_path / "again.toml"
    again.write_text(card.partition("```toml\n")[2].partition("```")[0])
    assert read_train_config(again) == config()
    if has_matplotlib:
        assert curves.read_bytes().startswith(b"\x89PNG")


def test_an_existing_run_is_not_overwritten(config, tmp_path):
    run(config(), tmp_path / "run", until=4)
    with pytest.raises(TrainingError, match="already has a run"):
        Trainer(config(), tmp_path / "run", resume=False)


def test_an_unwritable_log_is_an_error_with_its_name(config, tmp_path):
    made = Trainer(config(), tmp_path / "run", resume=False)
    (tmp_path / "run" / "log.jsonl").mkdir()
    with pytest.raises(TrainingError, match="step 1: log.jsonl: Is a directory"):
        made.run(lambda report: True)
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match="file"):
        Trainer(config(), tmp_path / "file" / "run", resume=False)


def test_a_users_copy_of_a_checkpoint_is_kept(config, tmp_path):
    folder = tmp_path / "run"
    run(config(), folder, until=2)
    (state,) = saved_states(folder / "checkpoints")
    copy = shutil.copytree(state, state.with_name(state.name + "-best"))
    run(config(), folder, resume=True)
    assert copy.exists() and [s.name for s in saved_states(folder / "checkpoints")] == [
        "step-00000004",
        "step-00000008",
    ]


@pytest.mark.parametrize("key", ["vocab_size", "attention_dropout", "torch_dtype"])
def test_a_model_key_that_would_be_ignored_is_refused(config, tmp_path, key):
    with pytest.raises(ConfigError, match=f"model.{key}: has no effect on training"):
        Trainer(config(f"model.{key}=3"), tmp_path / "run", resume=False)


def test_sequences_longer_than_max_positions_are_refused(config, tmp_path):
    with pytest.raises(ConfigError, match="data.sequence_length: must be at most .* 64, not 65"):
        Trainer(config("data.sequence_length=65"), tmp_path / "run", resume=False)


def test_held_out_texts_are_not_trained_on(config, tmp_path, texts):
    folder = tmp_path / "both"
    folder.mkdir()
    lines = texts.read_text().splitlines(True)
    (folder / "a.jsonl").write_text("".join(lines[:20]))
    (folder / "b.jsonl").write_text("".join(lines[20:]))
    changes = [f"data.train={folder}", f"data.validation={folder / 'b.jsonl'}"]
    data = prepare_data(config(*changes).data, tmp_path / "data", seed=0)
    assert (len(data.train), len(data.validation)) == (20, 16)
    with pytest.raises(DataError, match="all files are in data.validation"):
        changes[0] = changes[1].replace("validation", "train")
        prepare_data(config(*changes).data, tmp_path / "x", seed=0)


@pytest.mark.parametrize("tokens", ["train", "validation"])
def test_tokens_without_their_tokenizer_are_refused(config, tmp_path, tokens):
    folder, settings = tmp_path / "data", config().data
    prepare_data(settings, folder, seed=0)
    (folder / "tokenizer.model").unlink()
    shutil.rmtree(folder / ({"train", "validation"} - {tokens}).pop())
    message = f"^{folder / 'tokenizer.model'}: missing, .* in {folder}; remove this folder"
    for texts in (None, TrainingTexts(settings, seed=0)):
        with pytest.raises(DataError, match=message):
            prepare_data(settings, folder, seed=0, texts=texts)
    assert not (folder / "tokenizer.model").exists()
    shutil.rmtree(folder)
    assert len(prepare_data(settings, folder, seed=0).train) == 32


def test_a_bfloat16_pass_rounds_queries_like_the_server(config, tmp_path):
    made = Trainer(config("run.dtype=bfloat16"), tmp_path / "run", resume=False)
    layer = made._model.layers[0]
    memory, norm = layer.memory, layer.post_attention_layernorm
    x = torch.randn(9, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = memory.half_scores(norm(x))
    served = copy.deepcopy(memory).bfloat16()
    with torch.no_grad():
        q = torch.nn.functional.linear(
            norm(x).bfloat16(),
            served.query.weight,
            served.query.bias,
        )
        wanted = half_scores(q, served.subkeys, served.query_norm, served.norm_eps)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimizer.lr=1e-4", "optimizer.lr: must be 0.003 to resume .*, not 0.0001"),
        ("data.sequence_length=9", "data.sequence_length: must be 24 to resume"),
        ("model.hidden_size=18", "model.hidden_size: must be 16 to resume"),
        ("model.memory.top_k=3", "model.memory.top_k: must be 4 to resume"),
        ("run.seed=1", "run.seed: must be 0 to resume"),
        ("optimizer.moment_dtype=bfloat16", "optimizer.moment_dtype: must be 'float32' to resume"),
    ],
)
def test_a_run_does_not_resume_with_other_settings(config, tmp_path, change, message):
    run(config(), tmp_path / "run", until=2)
    with pytest.raises(TrainingError, match=message):
        Trainer(config(change), tmp_path / "run", resume=True)
    longer = Trainer(config("run.steps=9"), tmp_path / "run", resume=True)
    assert longer.step == 2
    with pytest.raises(ConfigError, match="run.steps: must be at least the 2 steps done, not 1"):
        train.run(config("run.steps=1"), tmp_path / "run", resume=True, only_plan=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_refused(config, tmp_path):
    with pytest.raises(ConfigError, match="run.device: cuda needs a CUDA device"):
        train.run(config("run.device=cuda"), tmp_path / "run", resume=False)


@pytest.mark.parametrize(("rank", "num_gpus"), [(1, 2), (2, 2)])
def test_a_process_takes_its_gpu_before_it_joins_the_others(monkeypatch, rank, num_gpus):
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: calls.append(index))
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    for name, result in (
        ("is_torchelastic_launched", True),
        ("get_rank", 3),
        ("get_world_size", 4),
        ("new_group", None),
        ("all_gather", None),
    ):
        monkeypatch.setattr(
            train.distributed, name, lambda *arguments, result=result, **options: result
        )
    monkeypatch.setattr(
        train.distributed, "init_process_group", lambda backend, timeout: calls.append(backend)
    )
    if rank == num_gpus:
        with pytest.raises(ConfigError, match="run.device: process 2 of this machine needs a GPU"):
            train._replicas("cuda", only_plan=False)
        return
    replicas = train._replicas("cuda", only_plan=False)
    assert calls == [1, "nccl"] and (replicas.rank, replicas.count) == (3, 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("tier", ["device", "host"])
def test_a_gpu_learns_the_same(config, tmp_path, tier):
    run(config(), tmp_path / "cpu")
    changes = ["run.device=cuda", f"run.table_tier={tier}"]
    assert train.run(config(*changes), tmp_path / "gpu", resume=False) == 0
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), abs=1e-3)
    run(config("run.steps=9"), tmp_path / "gpu", resume=True)


def test_a_dense_model_gets_memory_layers(config, tmp_path):
    run(config(memory=False), tmp_path / "dense")
    dense = saved_states(tmp_path / "dense" / "checkpoints")[-1]
    text = CONFIG[CONFIG.index("[data]") :]
    path = tmp_path / "grown.toml"
    path.write_text(f"[model]\n{MEMORY}\n{text}".replace("{texts}", str(tmp_path / "texts.jsonl")))
    grown = read_train_config(path, [f"run.init_from={dense}"])
    made = Trainer(grown, tmp_path / "grown", resume=False)
    taken = load_file(dense / "model.safetensors")
    parameters = dict(made._model.named_parameters())
    shared = parameters.keys() & taken.keys()
    assert len(shared) == 14
    settings = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**settings, "eos_token_id": [2, 7]}))
    grown = read_train_config(path, [f"run.init_from={dense}", "run.seed=1"])
    made = Trainer(grown, tmp_path / "again", resume=False)
    for name in shared:
        assert torch.equal(parameters[name], taken[name])
    made.run(lambda report: True)
    _, kept = load_model(saved_states(tmp_path / "again" / "checkpoints")[-1])
    assert kept.eos_ids == {2, 7}
    with pytest.raises(ConfigError, match="run.init_from: tensor model.embed_tokens"):
        Trainer(
            read_train_config(path, [f"run.init_from={dense}", "model.hidden_size=18"]),
            tmp_path / "other",
            resume=False,
        )


def test_a_config_that_starts_from_a_folder_changes_only_named_keys(config, tmp_path):
    run(config(), tmp_path / "first")
    first = saved_states(tmp_path / "first" / "checkpoints")[-1]
    text = CONFIG[CONFIG.index("[data]") :].replace("{texts}", str(tmp_path / "texts.jsonl"))
    path = tmp_path / "next.toml"
    path.write_text(f"[model.memory]\ntop_k = 2\n{text}")
    again = Trainer(
        read_train_config(path, [f"run.init_from={first}"]), tmp_path / "next", resume=False
    )
    memory = again._model.config.memory
    assert (memory.top_k, memory.num_subkeys, memory.qk_norm) == (2, 8, True)


def test_trainer_and_server_choose_the_same_rows_and_give_the_same_logits(config, tmp_path):
    run(config(), tmp_path / "run")
    made = Trainer(config(), tmp_path / "run", resume=True)
    served, _ = load_model(saved_states(tmp_path / "run" / "checkpoints")[-1])
    ids = torch.arange(40) % 290
    layout = TokenLayout(torch.cat((torch.arange(25), torch.arange(15))), (0, 25, 40))
    with torch.no_grad():
        one, other = (
            model(ids, layout, torch.arange(40), with_trace=True) for model in (made._model, served)
        )
    torch.testing.assert_close(one.logits_LV, other.logits_LV)
    assert list(one.memory) == [0, 1]
    for layer, trace in one.memory.items():
        assert torch.equal(trace.rows_THK, other.memory[layer].rows_THK)


def torchrun(config_file, folder, *changes):
    """Run the real command in two processes."""
    memplus = Path(sys.executable).parent / "memplus"
    started = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    started += ["--standalone", "--no-python", str(memplus), "train", str(config_file)]
    options = [option for change in changes for option in ("--set", change)]
    return subprocess.run(
        [*started, "--out", str(folder), *options], capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_a_process_without_a_sequence_takes_part(config, tmp_path):
    # a pass often has only one sequence
    changes = ["run.tokens_per_step=12", "data.sequence_length=60", *KINDS["moe"]]
    run(config(*changes, memory=False), tmp_path / "one")
    done = torchrun(tmp_path / "train.toml", tmp_path / "two", *changes)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["memory_plus", "moe"])
def test_two_processes_train_like_one(config, tmp_path, kind):
    # the balancing loss differs between processes, so the test leaves it out
    changes = [*KINDS[kind], "run.passes_per_step=2"]
    changes += ["model.router_aux_loss_coef=0" if kind == "moe" else "run.table_sharding=rows"]
    run(config(*changes, memory=kind != "moe"), tmp_path / "one")
    done = torchrun(tmp_path / "train.toml", tmp_path / "two", *changes)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    found, wanted = tensors(tmp_path / "two"), tensors(tmp_path / "one")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-3, msg=name)
    run(config(*changes, "run.steps=9", memory=kind != "moe"), tmp_path / "two", resume=True)
    assert len(losses(tmp_path / "two")) == 9


def start(config, folder, resume=False) -> Trainer:
    return Trainer(config, folder, resume=resume)


def tokens(folder, name="train") -> bytes:
    return (folder / "data" / name / "tokens.bin").read_bytes()


WRONG = [
    *("model.hidden_siz=16", "model.num_attention_heads=3", "data.sequence_length=999"),
    *("data.tokenizer=nowhere", "data.train=nowhere", "run.freeze=['dense']"),
]


@pytest.mark.parametrize("wrong", [*WRONG, "run.init_from=nowhere"])
def test_a_wrong_setting_leaves_no_folder(config, tmp_path, wrong):
    folder = tmp_path / "new" / "run"
    with pytest.raises(
        (ConfigError, CheckpointError, DataError), match="siz|head|length|nowhere|free"
    ):
        start(config(wrong, memory=False), folder)
    assert not folder.parent.exists()


def test_a_failed_start_can_be_put_right(config, tmp_path):
    with pytest.raises(DataError, match="data.vocab_size: must be at most"):
        start(config("data.vocab_size=9000"), tmp_path / "run")
    assert start(config(), tmp_path / "run").step == 0


def test_other_settings_are_allowed_until_the_first_checkpoint(config, tmp_path):
    folder = tmp_path / "run"
    start(config(), folder)
    first = tokens(folder)
    other = start(config("data.vocab_size=301", "optimizer.lr=1e-4"), folder)
    assert tokens(folder) != first
    other.run(lambda report: False)
    with pytest.raises(TrainingError, match="optimizer.lr: must be 0.0001 to resume"):
        start(config("data.vocab_size=301"), folder, resume=True)


def rewrite(path, lines) -> None:
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    # as a later write would have: clocks of file systems are coarse
    later = path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(later, later))


def test_texts_that_changed_before_the_first_checkpoint_are_tokenised_again(
    config,
    texts,
    tmp_path,
):
    folder, held_out = tmp_path / "run", tmp_path / "held.txt"
    held_out.write_bytes(b"caf\xe9")
    changed = config(f'data.validation=["{held_out}"]', "data.validation_share=0")
    with pytest.raises(DataError, match="not UTF-8"):
        start(changed, folder)
    held_out.write_text("red green makes green red")
    again = start(changed, folder)
    first = tokens(folder)
    assert len(tokens(folder, "validation"))
    rewrite(texts, [f"{line} {line[::-1]}" for line in texts.read_text().splitlines()])
    assert start(changed, folder).step == again.step == 0
    second = tokens(folder)
    assert second != first and (folder / "data" / "tokenizer.model").exists()
    # the same texts are not tokenised again
    status = (folder / "data" / "train" / "tokens.bin").stat()
    start(changed, folder).run(lambda report: False)
    assert (folder / "data" / "train" / "tokens.bin").stat().st_ino == status.st_ino
    # a run that has begun keeps its tokens
    rewrite(texts, ["other texts"] * 400)
    assert start(changed, folder, resume=True).step == 1
    assert tokens(folder) == second


def test_an_incomplete_record_and_missing_texts(config, texts, tmp_path):
    folder = tmp_path / "run"
    start(config(), folder)
    (folder / "data" / "source.json").write_text("{")
    (folder / "data" / "tokenizer.model").write_bytes(b"of another set of texts")
    start(config(), folder)
    texts.unlink()
    with pytest.raises(DataError, match="no such file"):
        start(config(), folder)


def test_one_text_file_is_enough(config, tmp_path, caplog):
    text = tmp_path / "book.txt"
    text.write_text("".join(f"{a} and {b} make {a + b}. " for a in range(20) for b in range(20)))
    caplog.set_level("INFO", "weights.training")
    changes = [f"data.train={text}", "data.validation_share=0.01", "run.steps=4"]
    changes += ["data.vocab_size=280"]
    run(config(*changes), tmp_path / "run")
    assert "held out: the end of the longest document" in caplog.text
    assert records(tmp_path / "run")[-1]["perplexity"] > 1


def test_more_or_fewer_steps_keep_the_schedule(config, tmp_path, caplog):
    folder = tmp_path / "run"
    shares = [report.lr_share for report in run(config(), folder, until=4)]
    caplog.set_level("INFO", "weights.training")
    shares += [report.lr_share for report in run(config("run.steps=6"), folder, resume=True)]
    assert "schedule of the 8 steps that the run began with, and do not end it" in caplog.text
    assert "run.steps: was 8 when the run began, now 6" in caplog.text
    shares += [report.lr_share for report in run(config("run.steps=10"), folder, resume=True)]
    assert shares[:8] == [report.lr_share for report in run(config(), tmp_path / "whole")]
    assert shares[7:] == [pytest.approx(0.1)] * 3 and "at their final values" in caplog.text


def test_a_plan_writes_nothing(config, tmp_path, capsys):
    folder = tmp_path / "new" / "run"
    settings = config("optimizer.warmup_steps=20")
    assert train.run(settings, folder, only_plan=True) == 0
    printed = capsys.readouterr().out
    assert "memory: torch itself" in printed and "held out: 4 of these documents" in printed
    assert "warmup_steps: 20 is not less than run.steps 8; the warm-up takes 0 steps" in printed
    assert not (tmp_path / "new").exists()
    with pytest.raises(ConfigError, match="model: training needs at least"):
        train.run(config("model.memory.num_subkeys=65536"), folder)
    assert not (tmp_path / "new").exists()


def test_only_a_plan_of_a_new_run_needs_no_folder(config, capsys):
    assert train.run(config(), None, only_plan=True) == 0
    printed = capsys.readouterr().out
    assert "memory: torch itself" in printed and "disk:" not in printed
    assert "tokenizer: trained on these texts, 300 tokens (data.vocab_size)\n" in printed
    for options in ({}, {"resume": True}, {"resume": True, "only_plan": True}):
        with pytest.raises(ConfigError, match=r"^out: missing; give --out DIR \(only"):
            train.run(config(), None, **options)


@pytest.mark.parametrize("only_plan", [True, False])
def test_texts_too_few_for_the_vocabulary_are_found_before_anything_is_written(
    config, tmp_path, only_plan
):
    found = r"^data.vocab_size: must be at most (\d+) for these texts, not 9000$"
    with pytest.raises(DataError, match=found) as error:
        train.run(config("data.vocab_size=9000"), tmp_path / "run", only_plan=only_plan)
    assert not (tmp_path / "run").exists()
    most = re.search(found, str(error.value))[1]
    assert train.run(config(f"data.vocab_size={most}"), None, only_plan=True) == 0


def test_many_texts_leave_the_tokenizer_to_the_run(config, tmp_path, monkeypatch):
    monkeypatch.setattr(training_texts, "_QUICK_CHARACTERS", 100)
    monkeypatch.setattr(training_texts, "train_tokenizer", lambda *_: pytest.fail("trained"))
    lines = plan_run(config("data.vocab_size=9000"), tmp_path / "run", resume=False).lines
    assert "tokenizer: 9,000 tokens (data.vocab_size), not checked; the run trains it" in lines


def test_a_tokenizer_is_trained_once(config, tmp_path, monkeypatch):
    trained, made = training_texts.train_tokenizer, []
    monkeypatch.setattr(
        training_texts, "train_tokenizer", lambda *given: made.append(trained(*given)) or made[-1]
    )
    start(config(), tmp_path / "run")
    assert made == [(tmp_path / "run" / "data" / "tokenizer.model").read_bytes()]


def test_a_run_without_a_checkpoint_keeps_its_tokenizer(config, tmp_path, texts, monkeypatch):
    folder = tmp_path / "run"
    Trainer(config(), folder, resume=False)
    trained, made = training_texts.train_tokenizer, []
    monkeypatch.setattr(
        training_texts, "train_tokenizer", lambda *given: made.append(trained(*given)) or made[-1]
    )
    saved = folder / "data" / "tokenizer.model"
    line = f"tokenizer: {saved}, trained on these texts when the run began"
    for resume in (True, False):
        assert line in plan_run(config(), folder, resume=resume).lines
    start(config(), folder, resume=True)
    assert not made
    # other settings or texts need another tokenizer
    shutil.rmtree(folder / "checkpoints")
    assert line not in plan_run(config("data.vocab_size=290"), folder, resume=True).lines
    texts.write_text(texts.read_text().replace("red", "purple"))
    assert line not in plan_run(config(), folder, resume=True).lines
    assert len(made) == 2


@pytest.mark.parametrize("wrong", ["model.num_attention_heads=3", "data.sequence_length=999"])
def test_settings_are_checked_before_texts(config, wrong, monkeypatch):
    monkeypatch.setattr(run_plan, "TrainingTexts", lambda *_: pytest.fail("looked for texts"))
    with pytest.raises(ConfigError, match="model.head_dim|data.sequence_length"):
        train.run(config(wrong, "data.train=nowhere"), None, only_plan=True)


def test_a_host_table_needs_a_gpu_and_a_table(config, tmp_path):
    host = "run.table_tier=host"
    with pytest.raises(ConfigError, match="run.table_tier: host memory needs a GPU .*, not cpu"):
        train.run(config(host), tmp_path / "run", only_plan=True)
    with pytest.raises(ConfigError, match="run.table_tier: host is for tables, but the model has"):
        plan_run(config(host, "run.device=cuda", memory=False), tmp_path / "run", resume=False)


def test_a_plan_names_the_disk_for_the_checkpoints_to_come(config, tmp_path):
    def disk(*changes):
        plan = plan_run(config(*changes), folder, resume=folder.exists())
        return [line.split("(")[1].split(" of")[0] for line in plan.lines if "disk:" in line]

    folder = tmp_path / "run"
    assert (disk("run.steps=4"), disk("run.steps=5"), disk("run.steps=99")) == (["1"], ["2"], ["3"])
    run(config("run.checkpoint_every=2"), folder, until=2)
    assert disk("run.steps=99") == ["2"] and not disk("run.steps=2")
    run(config("run.checkpoint_every=2"), folder, resume=True, until=4)
    assert disk("run.steps=99") == ["1"]


def test_only_the_first_process_prints_a_plan(config, tmp_path, monkeypatch, capsys):
    left = []
    monkeypatch.setattr(train, "_replicas", lambda device, only_plan: Replicas(1, 2))
    monkeypatch.setattr(train.distributed, "destroy_process_group", lambda: left.append("group"))
    monkeypatch.setattr(train, "_exit_now", left.append)
    settings = config("data.train=nowhere")  # it does not read texts
    assert train.run(settings, tmp_path / "run", only_plan=True) == 0
    assert left == ["group", 0] and not capsys.readouterr().out


def test_a_plan_without_a_known_memory_warns(config, tmp_path, monkeypatch, caplog):
    def unknown():
        raise ValueError("meminfo: has no MemAvailable")

    monkeypatch.setattr(run_plan, "available_memory", unknown)
    lines = plan_run(config(), tmp_path / "run", resume=False).lines
    assert any(line.startswith("memory: torch itself") for line in lines)
    assert not any("available" in line for line in lines)
    assert "memory is not checked: cannot read available memory: meminfo: has" in caplog.text


def test_a_second_process_does_not_train_in_the_folder(config, tmp_path):
    with run_lock(tmp_path / "run"), pytest.raises(TrainingError, match="another process trains"):
        train.run(config(), tmp_path / "run")


def test_texts_without_two_tokens_are_refused(config, tmp_path, texts):
    # the tokenizer of a checkpoint, without marks of begin and end
    run(config("run.steps=1"), tmp_path / "run")
    (state,) = saved_states(tmp_path / "run" / "checkpoints")
    settings = json.loads((state / "config.json").read_text())
    (state / "config.json").write_text(
        json.dumps(settings | {"bos_token_id": None, "eos_token_id": None})
    )
    (tmp_path / "short.txt").write_text("1")
    for key, other in (("train", "validation"), ("validation", "train")):
        changes = f"data.{key}={tmp_path / 'short.txt'}", f"data.{other}={texts}"
        with pytest.raises(DataError, match=f"data.{key}: no document has two tokens"):
            start(config(*changes, f"data.tokenizer={state}"), tmp_path / key)


def test_a_run_resumes_without_the_model_that_it_started_from(config, tmp_path, caplog):
    run(config("run.steps=1"), tmp_path / "first")
    grown = config(f"run.init_from={tmp_path / 'first'}", "run.steps=2")
    assert train.run(grown, tmp_path / "run") == 0
    shutil.rmtree(tmp_path / "first")
    wrong = config(f"run.init_from={tmp_path / 'frist'}", "run.steps=3")
    with pytest.raises(TrainingError, match="run.init_from: must be .*first/checkpoints"):
        train.run(wrong, tmp_path / "run", resume=True)
    grown = config(f"run.init_from={tmp_path / 'first'}", "run.steps=3")
    assert train.run(grown, tmp_path / "run", resume=True) == 0
    assert "the run resumes without it" in caplog.text
    with pytest.raises(CheckpointError, match="first"):
        train.run(grown, tmp_path / "new")


@pytest.mark.parametrize(
    ("name", "folder", "is_of_name"),
    [
        ("a/b", "a/b", True),
        ("a/run", "a/run/checkpoints/step-00000001", True),
        ("org/it@main", "/cache/models--org--it/snapshots/0a", True),
        ("org/other", "/cache/models--org--it/snapshots/0a", False),
        ("smollm2", "/cache/models/smollm2-135m-instruct-bfloat16-1", True),
        ("wordnet", "/cache/models/smollm2-135m-instruct-bfloat16-1", False),
    ],
)
def test_the_saved_model_is_known_by_the_name_that_was_given(name, folder, is_of_name):
    assert train._is_of_name(folder, name) == is_of_name
