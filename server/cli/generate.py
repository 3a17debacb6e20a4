"""``memplus generate``: continues one prompt in the terminal, with an in-process engine."""

import sys
from contextlib import closing
from typing import TextIO

from engine.config import EngineConfig
from engine.errors import RequestError
from engine.request import Request
from engine.sampling.params import SamplingParams
from server.config import EngineSettings, cache_folder
from server.engine_entry import build_engine
from server.http.text_stream import TextStream
from server.model_options import ModelOptions
from weights.checkpoints.tokenizer import load_tokenizer
from weights.models.adapted_model import find_served


def generate(
    prompt: str,
    model: ModelOptions,
    engine_config: EngineConfig,
    sampling: SamplingParams,
    out: TextIO | None = None,
) -> None:
    """Write the continuation of ``prompt`` to ``out`` (default: stdout), token by token.

    Raises:
        CheckpointError: the model cannot be read.
        RequestError: the prompt or a sampling parameter does not fit the model.
    """
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise RequestError("text", "is not valid UTF-8")
    folder = find_served(model.model, model.memory_adapter, cache_folder())
    out = out or sys.stdout
    with closing(build_engine(EngineSettings(model, folder, engine_config))) as engine:
        tokenizer = load_tokenizer(folder.folder)
        prompt_ids = tuple(tokenizer.encode(prompt))
        engine.add(Request("generate", prompt_ids, sampling))
        text = TextStream(0, tokenizer, prompt_ids, sampling)
        while engine.has_work:
            for output in engine.step().outputs:
                if output.finish_reason == "error":
                    raise RuntimeError(output.error)
                out.write(text.push(output).text)
                out.flush()
    out.write("\n")
