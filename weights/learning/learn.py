"""Learns a row patch from facts: reads texts, chooses rows, runs the loop, scores, writes."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from engine.errors import ConfigError
from engine.model.transformer import Transformer, converted
from weights.checkpoints.checkpoint import load_model, open_checkpoint, serving_dtype
from weights.errors import DataError, PatchError, TrainingError
from weights.learning.exams import Exams
from weights.learning.facts import fact_passages, read_asked, read_facts
from weights.learning.learner import Learner, LearningReport
from weights.learning.learning_config import LearningConfig, RowConfig
from weights.learning.row_ranks import chosen_rows
from weights.learning.row_student import RowStudent, saved_rows
from weights.learning.saved_state import load_state, save_state, state_file
from weights.learning.scores import SCORED_TOKENS
from weights.patches.description import PatchDescription
from weights.patches.model_identity import ModelIdentity, model_identity
from weights.patches.patch_folder import StoredPatch, stored_patch, write_patch
from weights.training.corpus import corpus_files, documents
from weights.training.packing import Passage, cut
from weights.training.row_reads import RowReads, count_reads, read_row_reads
from weights.training.training_data import TextTokens, checkpoint_text


@dataclass(frozen=True)
class LearningTexts:
    """Files of a learning run.

    Attributes:
        facts: facts to learn; see ``read_facts``.
        background: texts for ranking rows and for replay; without them the model's own record of
            row reads ranks rows, and nothing is replayed.
        questions: facts in other phrasings, to score; see ``read_questions``.
        neutral: texts that should not change, to score.
        known: facts that the model may know, to score.
    """

    facts: Path
    background: tuple[str, ...] = ()
    questions: Path | None = None
    neutral: tuple[str, ...] = ()
    known: Path | None = None


class PatchLearner:
    """A learning run for one patch folder, new or resumed.

    Attributes:
        learner: the loop.
        background: passages that are replayed.
        chosen: rows that may change, by table name.
    """

    def __init__(
        self,
        model: Path,
        target: Path,
        texts: LearningTexts,
        learning: LearningConfig,
        rows: RowConfig,
        *,
        resume: bool = False,
    ) -> None:
        """Read model and texts, choose rows, and load a saved state with ``resume``.

        Raises:
            PatchError: the target exists, or the model takes no patches.
            CheckpointError: the model or its record of row reads cannot be read.
            DataError: a text cannot be read, or a fact is too long; the message names it.
            ConfigError: nothing ranks the rows, or there is no state to resume.
            TrainingError: a setting differs from those of the saved state; or a state exists and
                ``resume`` is not set.
        """
        if target.exists():
            raise PatchError(f"{target}: exists already")
        self._target, self._state_file = target, state_file(target)
        if resume != self._state_file.exists():
            raise TrainingError(_wrong_resume(self._state_file, resume))
        self._identity = model_identity(model)
        self._learning, self._rows = learning, rows
        config, stored = open_checkpoint(model)
        self._serving_dtype = serving_dtype(stored, "auto")
        text, most = checkpoint_text(model), config.model.max_positions
        self._exams = _exams(texts, text, most)
        length = min(most, learning.replayed_tokens or SCORED_TOKENS)
        self.background = background = _passages(
            texts.background, text, length, learning.background_tokens
        )
        self._run = _run_record(self._identity, self._exams.facts, background, learning, rows)
        saved = load_state(self._state_file, self._run) if resume else None
        self._base, _ = load_model(model, "float32")
        self.chosen = saved_rows(saved[1]) if saved else self._choose_rows(model)
        self._student = RowStudent(self._base, self.chosen, rows)
        self.learner = Learner(self._student, self._base, self._exams.facts, background, learning)
        if saved:
            progress, tensors = saved
            self._student.load(tensors, progress["step"])
            self.learner.resume(progress)

    def run(self, on_step: Callable[[LearningReport], bool]) -> StoredPatch | None:
        """Learn, score and write the patch; None if ``on_step`` returned False before the end.

        Then the state is saved beside the target, to be resumed; otherwise it is removed.

        Raises:
            TrainingError: a loss is not finite, or the state cannot be written.
            PatchError: the patch cannot be written.
        """
        self.learner.run(on_step)
        if not self.learner.is_finished:
            progress, tensors = self.learner.progress(), self._student.state()
            save_state(self._state_file, self._run, progress, tensors)
            return None
        patch = stored_patch(self._description(), self._tables())
        write_patch(self._target, patch)
        self._state_file.unlink(missing_ok=True)
        return patch

    def _choose_rows(self, model: Path) -> dict[str, torch.Tensor]:
        reads = _background_reads(self._base, model, self.background, self._rows)
        chosen = chosen_rows(count_reads(self._base, self._exams.facts), reads, self._rows)
        if not any(map(len, chosen.values())):
            raise ConfigError("rank: facts read no row more than background text does; use reads")
        return chosen

    def _tables(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Rows and deltas of every table of the model, without rows that did not change."""
        tables = {}
        dtype = getattr(torch, self._rows.delta_dtype)
        learned = self._student.deltas()
        for name, (_, value_dim) in self._identity.shapes.items():
            none = torch.empty(0, dtype=torch.int64), torch.empty(0, value_dim, dtype=dtype)
            rows_P, deltas_PV = learned.get(name, none)
            is_changed_P = (deltas_PV != 0).any(dim=1)
            tables[name] = rows_P[is_changed_P], deltas_PV[is_changed_P]
        return tables

    def _description(self) -> PatchDescription:
        dtype = self._serving_dtype
        served = converted(self._base, dtype), converted(self._student.model, dtype)
        scores = {
            "steps": self.learner.step,
            "exact_after": self.learner.exact_step,
            **self._exams.score(*served),
        }
        settings = {"command": "learn", **asdict(self._learning), **asdict(self._rows)}
        settings["lr"] = self._rows.peak_lr
        identity = self._identity
        return PatchDescription(
            identity.origins,
            identity.row_choice,
            identity.shapes,
            data=self._run["facts"],
            settings=settings,
            scores=scores,
        )


def _wrong_resume(file: Path, resume: bool) -> str:
    if resume:
        return f"{file}: no such file; there is no interrupted run to resume"
    return f"{file}: an interrupted run exists; add --resume to continue it, or delete the file"


def _exams(texts: LearningTexts, text: TextTokens, max_positions: int) -> Exams:
    facts = fact_passages(read_facts(texts.facts), text, max_positions)
    asked = [
        fact_passages(read_asked(file), text, max_positions) if file else []
        for file in (texts.questions, texts.known)
    ]
    neutral = _passages(texts.neutral, text, min(max_positions, SCORED_TOKENS))
    return Exams(facts, asked[0], neutral, asked[1])


def _passages(
    paths: Sequence[str], text: TextTokens, length: int, most: float = math.inf
) -> list[Passage]:
    """The documents as passages of at most ``length`` tokens, until they have ``most`` tokens."""
    if not paths:
        return []
    found: list[Passage] = []
    num_tokens = 0
    for passage in _cut_documents(paths, text, length):
        found.append(passage)
        num_tokens += len(passage)
        if num_tokens >= most:
            break
    if not found:
        raise DataError(f"{', '.join(paths)}: no document has two tokens")
    return found


def _cut_documents(paths: Sequence[str], text: TextTokens, length: int) -> Iterator[Passage]:
    for one in documents(corpus_files(paths)):
        yield from cut(text.document(one), length)


def _background_reads(
    base: Transformer, folder: Path, background: Sequence[Passage], rows: RowConfig
) -> RowReads:
    """Reads by background text, or else the model's own record of them."""
    if rows.rank != "tfidf":
        return RowReads()
    if background:
        return count_reads(base, tqdm(background, "background", unit="passage", leave=False))
    recorded = read_row_reads(folder, base.config)
    if recorded is None:
        raise ConfigError(
            f"background: {folder} has no record of the rows that other text reads; give texts"
            " with --background, or record them once with `memplus bench trace --record`, or"
            " choose --rank reads"
        )
    return recorded


def _run_record(
    identity: ModelIdentity,
    facts: Sequence[Passage],
    background: Sequence[Passage],
    learning: LearningConfig,
    rows: RowConfig,
) -> dict[str, Any]:
    """Settings and hashes that must not change when a run is resumed."""
    return {
        "model": [identity.row_choice, *identity.origins.values()],
        "facts": _hash(facts),
        "background": _hash(background),
        **asdict(learning),
        **asdict(rows),
    }


def _hash(passages: Sequence[Passage]) -> str:
    """SHA-256 over the tokens of passages."""
    digest = hashlib.sha256()
    for passage in passages:
        digest.update(np.array([len(passage), passage.num_given, *passage.ids], "<i8").tobytes())
    return digest.hexdigest()
