"""Runs lm-eval's command offline, and computes log-likelihoods without it."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from engine.model.transformer import Transformer
from tests.models import served_logits
from weights.checkpoints.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent.parent


def evaluate(
    tasks: Path,
    out: Path,
    kind: str,
    names: Sequence[str],
    *options: str,
    program: str = "tests.server.lm_eval_command",
    **arguments: Any,
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Run lm-eval with a model of this kind; return scores, and samples by task.

    ``program`` is ``lm_eval`` for the plain command, which starts ten seconds later.
    """
    given = ",".join(f"{name}={value}" for name, value in arguments.items())
    command = [sys.executable, "-m", program, "run", "--model", kind, "--model_args", given]
    command += ["--tasks", ",".join(names), "--include_path", str(tasks)]
    command += ["--output_path", str(out), "--log_samples", *options]
    cache = {"HF_HOME": str(out / "cache")}
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    environment = os.environ | offline | cache | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    (results,) = out.glob("*/results_*.json")
    samples = {}
    for name in names:
        (file,) = out.glob(f"*/samples_{name}_*.jsonl")
        samples[name] = [json.loads(line) for line in file.read_text().splitlines()]
    return json.loads(results.read_text())["results"], samples


@torch.inference_mode()
def direct_score(
    model: Transformer, tokenizer: Tokenizer, context: str, continuation: str
) -> tuple[float, bool]:
    """Log-likelihood of a continuation, and whether each of its tokens is the likeliest."""
    ids, start = tokenizer.encode(context + continuation), len(tokenizer.encode(context))
    likely = served_logits(model, ids).double().log_softmax(-1)[start - 1 : -1]
    chosen = torch.tensor(ids[start:])
    score = likely.gather(-1, chosen[:, None]).sum()
    return float(score), bool((likely.argmax(-1) == chosen).all())
