"""Two launches of torchrun, as on two machines: divided tables, a killed process, resuming."""

import socket
import subprocess
import sys

import pytest

from tests.small_runs import KILLED, losses, run
from weights.training.run_folder import saved_states


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def launch(node, port, script, *options):
    """Start the processes of one machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    command += ["--nproc-per-node", "1", "--node-rank", str(node), "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test"]
    command += ["--rdzv-conf", f"is_host={int(node == 0)}", str(script), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_a_killed_process_ends_both_launches_and_the_run_resumes(config, tmp_path):
    changes = "run.steps=4", "run.checkpoint_every=2", "run.table_sharding=columns"
    run(config(*changes), tmp_path / "one")
    folder, script, port = tmp_path / "run", tmp_path / "main.py", free_port()
    script.write_text(KILLED)
    options = [str(tmp_path / "train.toml"), "--out", str(folder)]
    options += [part for change in changes for part in ("--set", change)]
    # a checkpoint has three parts: killed in the middle of the second one
    started = [launch(node, port, script, kill, *options) for node, kill in enumerate(("0", "5"))]
    outputs = [one.communicate(timeout=300)[0] for one in started]
    assert all(one.returncode for one in started), outputs
    assert "SIGKILL" in outputs[1] and "a process of the run has ended" in outputs[0]
    (state,) = saved_states(folder / "checkpoints")
    assert state.name == "step-00000002"
    assert losses(folder) == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    run(config(*changes), folder, resume=True)
    assert losses(folder) == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    assert len(saved_states(folder / "checkpoints")) == 2
