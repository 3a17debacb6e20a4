"""Text that a model writes itself, to be replayed while it learns."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from engine.config import EngineConfig
from engine.engine import Engine
from engine.executors.executor import make_executor
from engine.model.transformer import Transformer
from engine.request import Request
from engine.sampling.params import SamplingParams
from weights.errors import TrainingError
from weights.learning.background import DOCUMENT_TOKENS
from weights.training.packing import Passage

_IDS, _LENGTHS = "replay.ids", "replay.lengths"


def generated_passages(
    model: Transformer,
    first_ids: Sequence[int],
    eos_ids: frozenset[int],
    num_tokens: int,
    length: int,
    seed: int,
) -> list[Passage]:
    """Documents sampled at temperature 1, until they have ``num_tokens`` tokens.

    Each document begins with a random one of ``first_ids``. It ends with one of ``eos_ids``, or
    after ``length`` tokens (at most 256).

    Raises:
        ConfigError: the machine has too little memory for keys and values.
        TrainingError: a document failed.
    """
    length = min(length, DOCUMENT_TOKENS, model.config.max_positions - 1)
    config = EngineConfig(max_model_len=length + 1)
    engine = Engine(make_executor(model, config, dtype=torch.float32), config, eos_ids)
    draws = np.random.default_rng(seed)
    documents: list[list[int]] = []
    num_done = num_running = 0
    with tqdm(total=num_tokens, desc="writing", unit="token", leave=False) as bar:
        while engine.has_work or num_done < num_tokens:
            while num_running < config.max_num_seqs and num_done < num_tokens:
                first = first_ids[int(draws.integers(len(first_ids)))]
                sampling = SamplingParams(max_tokens=length, seed=int(draws.integers(2**32)))
                engine.add(Request(str(len(documents)), (first,), sampling))
                documents.append([first])
                num_running += 1
            for output in engine.step().outputs:
                if output.error is not None:
                    raise TrainingError(f"background: text was not generated: {output.error}")
                documents[int(output.request_id)] += output.token_ids
                num_running -= output.finish_reason is not None
                num_done += len(output.token_ids)
                bar.update(len(output.token_ids))
    # keep documents in the order in which they started: the first to end are the short ones
    ends = np.cumsum([len(ids) - 1 for ids in documents])
    needed = int(np.searchsorted(ends, num_tokens)) + 1
    return [Passage(tuple(ids)) for ids in documents[:needed]]


def passage_tensors(passages: Sequence[Passage]) -> dict[str, Tensor]:
    """Generated passages as tensors, to be saved."""
    return {
        _IDS: torch.tensor([id_ for passage in passages for id_ in passage.ids]),
        _LENGTHS: torch.tensor([len(passage.ids) for passage in passages]),
    }


def take_passages(tensors: dict[str, Tensor]) -> list[Passage]:
    """Remove the tensors of generated passages from saved ones, and return the passages.

    Raises:
        TrainingError: they are missing or malformed.
    """
    ids_T, lengths_S = tensors.pop(_IDS, None), tensors.pop(_LENGTHS, None)
    if (
        ids_T is None
        or lengths_S is None
        or not ids_T.dtype == lengths_S.dtype == torch.int64
        or not ids_T.ndim == lengths_S.ndim == 1
        or bool((lengths_S < 2).any())
        or int(lengths_S.sum()) != len(ids_T)
    ):
        raise TrainingError("the saved state has no valid text to replay")
    return [Passage(tuple(part.tolist())) for part in torch.split(ids_T, lengths_S.tolist())]
