"""``memplus learn``: what it prints, writes and refuses, and signals that interrupt it."""

import json
import re
import signal

import pytest

from server.cli.main import main
from tests.models import save_model
from tests.weights.learning.learned import wide_model
from weights.checkpoints.convert import convert
from weights.learning import learner
from weights.patches.patch_folder import read_patch

OPTIONS = (
    "--rank",
    "reads",
    "--optimizer",
    "adam",
    "--lr",
    "3",
    "--steps",
    "80",
    "--warmup-steps",
    "2",
)
OPTIONS += ("--cooldown-steps", "3", "--batch-tokens", "40")


@pytest.fixture
def run(tmp_path):
    model = save_model(wide_model(), tmp_path / "model")
    facts = tmp_path / "facts.jsonl"
    facts.write_text(json.dumps({"prompt": "cat:", "answer": "mew"}) + "\n")

    def start(*more, file=facts):
        files = (file, "--model", model, "--out", tmp_path / "patch", "--threads", 1)
        short = () if "--replay-share" in more else ("--background-tokens", 100)
        return main(["learn", *map(str, (*files, *OPTIONS, *short, *more))])

    return start


def test_a_patch_is_learned_and_described(run, tmp_path, capsys):
    (tmp_path / "other.txt").write_text("other text")
    facts, other = tmp_path / "facts.jsonl", tmp_path / "other.txt"
    assert run("--known", facts, "--questions", facts, "--neutral", other) == 0
    out, patch = capsys.readouterr().out, read_patch(tmp_path / "patch")
    assert "rows may change\n" in out and " generated tokens to replay\n" in out
    assert "facts      1 of 1 exact: 100.0%\nquestions  1 of 1 exact: 100.0%\n" in out
    assert "known      0 lost of 0 that were exact before (1 asked)\n" in out
    assert "neutral    perplexity " in out and "nats per token (10 tokens)\n" in out
    size = f"{patch.num_rows:,} rows, {patch.num_bytes:,} bytes"
    assert f"patch: {size}, {patch.content_hash}\n" in out


def test_a_model_with_rounded_weights_learns(run, tmp_path, capsys):
    convert(tmp_path / "model", tmp_path / "rounded", weight_dtype="int8")
    assert run("--model", tmp_path / "rounded") == 0
    assert "facts      1 of 1 exact: 100.0%\n" in capsys.readouterr().out
    assert read_patch(tmp_path / "patch").num_rows


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_that_resumes(run, tmp_path, capsys, monkeypatch, number):
    plain, done = learner.Learner._one_step, []

    def step(self):
        done.append(plain(self))
        if len(done) == 3:
            signal.raise_signal(number)
        return done[-1]

    monkeypatch.setattr(learner.Learner, "_one_step", step)
    assert run() == 128 + number
    name = signal.Signals(number).name
    assert f"stopped by {name} after step 3; continue with --resume" in capsys.readouterr().out
    assert run() == 2 and "add --resume" in capsys.readouterr().err
    assert run("--resume") == 0 and done[3].step == 4
    assert read_patch(tmp_path / "patch").num_rows


def test_mistakes_are_one_line_and_exit_code_2(run, tmp_path, capsys):
    for more, named in [
        (("--rank", "tfidf", "--replay-share", "0"), "background: the model has no record"),
        (("--steps", "4"), "steps: must be more than"),
        (("--rank", "all", "--rows", "5"), "rows: has no effect with rank all"),
        (("--replay-share", "0", "--background-tokens", "1"), "--background-tokens: has no effect"),
        (("--resume",), "no interrupted run to resume"),
    ]:
        assert run(*more) == 2
        assert re.search(f"^memplus: .*{named}.*\n\\Z", capsys.readouterr().err, re.MULTILINE)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"question": "a"}\n')
    assert run(file=bad) == 2
    assert "bad.jsonl, line 2: expected the keys" in capsys.readouterr().err
    assert not (tmp_path / "patch").exists()
