"""``memplus eval --compare``: two tiny models with known answers, its report and its errors."""

import json
import weakref

import pytest
import torch

from server.cli import model_comparison
from server.cli.main import main
from tests.models import plain_greedy, random_model, save_model, tiny_config
from weights.checkpoints.tokenizer import load_tokenizer

PROMPTS = ["fox", "a red cat", "1 + 1 =", "snow is"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of two models, and for each a question per prompt that it answers."""
    folders, known = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = random_model(tiny_config(max_positions=64))
        folder = save_model(model, tmp_path_factory.mktemp("models") / f"model-{seed}")
        tokenizer = load_tokenizer(folder)
        folders.append(str(folder))
        known.append([question(model, tokenizer, prompt) for prompt in PROMPTS])
    return folders, known


def question(model, tokenizer, prompt):
    """A question that a model answers: the text up to a character that it generates."""
    text = tokenizer.decode(plain_greedy(model, tokenizer.encode(prompt), 12))
    for until in text[2:]:
        answer = text.strip().partition(until)[0].strip()
        if len(answer) > 1 and until.strip():
            return {"prompt": prompt, "answer": answer, "until": until}
    raise AssertionError(text)


def written(folder, lines):
    file = folder / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return str(file)


@pytest.fixture
def asked(models, tmp_path):
    """A file of three questions that A knows, two that B knows, and one that neither knows."""
    _, (known_a, known_b) = models
    unknown = {"prompt": "fox", "answer": "jumps"}
    return written(tmp_path, [*known_a[:3], *known_b[1:3], unknown])


@pytest.mark.slow
def test_it_prints_and_writes_what_only_one_model_knows(
    models, asked, tmp_path, capsys, monkeypatch
):
    (a, b), (known_a, known_b) = models
    monkeypatch.setattr(model_comparison, "_PRINTED", 2)
    out = tmp_path / "compared.json"
    assert main(["eval", "--compare", a, b, "--questions", asked, "--json", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        f"A  {a}: 3 of 6 right",
        f"B  {b}: 2 of 6 right",
        "both 0, only A 3, only B 2, neither 1",
        "",
    ]
    written = json.loads(out.read_text())
    assert written["models"] == {"a": a, "b": b}
    assert written["counts"] == {"both": 0, "only_a": 3, "only_b": 2, "neither": 1}
    assert [one["prompt"] for one in written["only_a"]] == PROMPTS[:3]
    assert [one["answer_b"] for one in written["only_b"]] == [k["answer"] for k in known_b[1:3]]
    wrong = [one["answer_b"] for one in written["only_a"]]
    assert lines[4:8] == [
        "only A knows 3:",
        *(
            f"  {k['prompt']!r}: {k['answer']!r}; B: {answer!r}"
            for k, answer in zip(known_a[:2], wrong[:2], strict=True)
        ),
        "  and 1 more; --json FILE writes them all",
    ]
    assert lines[8:10] == ["", "only B knows 2:"] and len(lines) == 12
    assert [one["answer"] for one in written["neither"]] == ["jumps"] and written["both"] == []


def test_a_model_knows_what_it_knows_itself(models, tmp_path, capsys):
    (a, _), (known_a, _) = models
    assert main(["eval", "--compare", a, a, "--questions", written(tmp_path, known_a)]) == 0
    assert "\nboth 4, only A 0, only B 0, neither 0\n" in capsys.readouterr().out


def test_the_first_model_is_freed_before_the_second_is_loaded(models, asked, monkeypatch):
    build, engines, alive = model_comparison.build_engine, [], []

    def watched(*arguments):
        alive.append([engine() is not None for engine in engines])
        engine = build(*arguments)
        engines.append(weakref.ref(engine))
        return engine

    monkeypatch.setattr(model_comparison, "build_engine", watched)
    assert main(["eval", "--compare", *models[0], "--questions", asked]) == 0
    assert alive == [[], [False]]


def test_long_and_unprintable_texts_stay_on_one_line():
    assert model_comparison._short("a\n\x1b[2Jb") == r"'a\n\x1b[2Jb'"
    assert model_comparison._short("x" * 101) == repr("x" * 100 + "...")


def test_mistakes_are_one_line_and_no_model_answers(models, asked, tmp_path, capsys, monkeypatch):
    (a, b), _ = models

    def refused(*arguments):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(model_comparison, "build_engine", refused)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "fox", "answer": "jumps"}')
    text = tmp_path / "text.txt"
    text.write_text("text")
    for arguments, message in [
        ((a, b), "compare: needs --questions FILE"),
        ((a, b, "--questions", asked, "--model", a), "model: --compare names both models"),
        ((a, b, "--questions", asked, "--json", tmp_path), f"json: {tmp_path} cannot be written"),
        ((a, b, "--questions", asked, "--json", tmp_path / "no" / "x"), "json: folder"),
        ((a, b, text, "--questions", asked), "compare: compares answers to questions"),
        ((a, b, "--questions", bad), "bad.jsonl, line 1: expected the keys prompt, answer"),
        ((a, b, "--questions", tmp_path / "none"), "none: No such file"),
        ((a, tmp_path / "none", "--questions", asked), f"{tmp_path / 'none'}: is neither"),
        ((a, tmp_path, "--questions", asked), f"{tmp_path / 'config.json'}: "),
    ]:
        assert main(["eval", "--compare", *map(str, arguments)]) == 2
        (line,) = [
            one for one in capsys.readouterr().err.splitlines() if one.startswith("memplus:")
        ]
        assert message in line


def test_a_question_that_is_too_long_names_the_model(models, tmp_path, capsys):
    (a, b), _ = models
    asked = written(tmp_path, [{"prompt": "fox " * 99, "answer": "jumps"}])
    assert main(["eval", "--compare", a, b, "--questions", asked]) == 2
    assert f"memplus: {a}: {asked}, line 1: " in capsys.readouterr().err
