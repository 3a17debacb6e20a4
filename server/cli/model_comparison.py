"""Answers of two models to the same questions, compared and printed."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from engine.config import EngineConfig
from engine.errors import ConfigError
from server.config import EngineSettings, cache_folder
from server.device import chosen_device
from server.engine_entry import build_engine
from server.model_options import ModelOptions
from weights.checkpoints.config_json import read_config
from weights.checkpoints.tokenizer import load_tokenizer
from weights.errors import DataError
from weights.models.named_models import find_model
from weights.models.prepare import prepare
from weights.training.comparison import Answered, Comparison, compare_answers
from weights.training.evaluate import Question, greedy_answers, read_questions

_ENGINE = EngineConfig(max_patches=0)
# questions of a list that are printed; the JSON has all
_PRINTED = 10
# characters of a prompt or an answer that are printed
_PRINTED_LENGTH = 100


def compare_models(
    options: ModelOptions,
    names: Sequence[str],
    texts: Sequence[str],
    questions_file: Path | None,
) -> dict[str, Any]:
    """Ask two models the same questions, print what only one of them knows, and return it all.

    The models are loaded one after the other, both with these options.

    Args:
        options: settings of both models; ``model`` is not read.
        names: names, folders, GGUF files or Hub names (``org/name``) of model A and model B.
        texts: must be empty.
        questions_file: see ``read_questions``.

    Raises:
        ConfigError: texts are given, or no questions; or a setting does not fit a model.
        CheckpointError: a model cannot be read.
        DataError: the questions cannot be read, or one is too long for a model.
    """
    if texts:
        raise ConfigError("compare: compares answers to questions; leave the texts out")
    if questions_file is None:
        raise ConfigError("compare: needs --questions FILE")
    questions = read_questions(questions_file)
    device = chosen_device(options, _ENGINE)
    folders = [find_model(name, cache_folder()) for name in names]
    # report a wrong second model now, before the first one answers for minutes
    for folder in folders:
        read_config(prepare(folder))
    answers = []
    for name, folder in zip(names, folders, strict=True):
        settings = EngineSettings(replace(options, model=name), folder, _ENGINE)
        try:
            answers.append(_answers(settings, device, questions))
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
        # an engine has reference cycles; free this one before the next model is loaded
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the next model's placement looks at the free memory
    found = compare_answers(questions, *answers)
    print("\n".join(_report(found, names)))
    return _as_json(found, names)


def _answers(
    settings: EngineSettings, device: torch.device, questions: Sequence[Question]
) -> list[str]:
    with closing(build_engine(settings, device)) as engine:
        engine.warm_up()
        return greedy_answers(engine, load_tokenizer(settings.folder.folder), questions)


def _report(found: Comparison, names: Sequence[str]) -> Iterator[str]:
    both, only_a, only_b = len(found.both), len(found.only_a), len(found.only_b)
    total = both + only_a + only_b + len(found.neither)
    yield f"A  {names[0]}: {both + only_a} of {total} right"
    yield f"B  {names[1]}: {both + only_b} of {total} right"
    yield f"both {both}, only A {only_a}, only B {only_b}, neither {len(found.neither)}"
    if found.only_a:
        yield f"\nonly A knows {only_a}:"
        yield from _list(found.only_a, [("B", one.answer_b) for one in found.only_a])
    if found.only_b:
        yield f"\nonly B knows {only_b}:"
        yield from _list(found.only_b, [("A", one.answer_a) for one in found.only_b])


def _list(known: Sequence[Answered], wrong: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Lines of some questions, with the name and the answer of the model that is wrong."""
    for one, (name, answer) in list(zip(known, wrong, strict=True))[:_PRINTED]:
        question = one.question
        yield f"  {_short(question.prompt)}: {_short(question.answer)}; {name}: {_short(answer)}"
    if len(known) > _PRINTED:
        yield f"  and {len(known) - _PRINTED} more; --json FILE writes them all"


def _short(text: str) -> str:
    """A text in quotes, without line breaks and control characters, cut if it is long."""
    return repr(text if len(text) <= _PRINTED_LENGTH else f"{text[:_PRINTED_LENGTH]}...")


def _as_json(found: Comparison, names: Sequence[str]) -> dict[str, Any]:
    groups = {field.name: getattr(found, field.name) for field in fields(Comparison)}
    return {
        "models": {"a": names[0], "b": names[1]},
        "counts": {group: len(answered) for group, answered in groups.items()},
        **{
            group: [
                {
                    "prompt": one.question.prompt,
                    "answer": one.question.answer,
                    "answer_a": one.answer_a,
                    "answer_b": one.answer_b,
                }
                for one in answered
            ]
            for group, answered in groups.items()
        },
    }
