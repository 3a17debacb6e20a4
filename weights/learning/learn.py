"""Learns a row patch from facts: reads texts, chooses rows, runs the loop, scores, writes."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.errors import ConfigError
from engine.model.transformer import converted
from weights.checkpoints.checkpoint import load_model, open_checkpoint, serving_dtype
from weights.checkpoints.table_files import OUTPUT_DTYPES
from weights.errors import DataError, TrainingError
from weights.learning.background import background_reads, text_passages
from weights.learning.exams import Exams
from weights.learning.facts import fact_passages, read_asked, read_facts
from weights.learning.generated_text import generated_passages, passage_tensors, take_passages
from weights.learning.learner import Learner, LearningReport
from weights.learning.learning_config import LearningConfig, RowConfig
from weights.learning.row_ranks import chosen_rows
from weights.learning.row_student import RowStudent, saved_rows
from weights.learning.saved_state import load_state, save_state, state_file
from weights.learning.scores import SCORED_TOKENS, exact_answers
from weights.patches.description import PatchDescription
from weights.patches.model_identity import ModelIdentity, model_identity
from weights.patches.patch_folder import (
    StoredPatch,
    check_target,
    stored_patch,
    write_patch,
)
from weights.training.packing import Passage
from weights.training.row_reads import RowReads, count_reads
from weights.training.training_data import TextTokens, checkpoint_text


@dataclass(frozen=True)
class LearningTexts:
    """Files of a learning run.

    Attributes:
        facts: facts to learn; see ``read_facts``.
        background: texts for ranking rows and for replay; without them the model's own record of
            row reads ranks rows, and the model writes the text to replay.
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
        background: passages that are replayed or rank rows.
        replay_source: whether the replayed text is given or generated; or none is replayed.
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
            PatchError: the target exists or cannot be created, or the model takes no patches.
            CheckpointError: the model or its record of row reads cannot be read.
            DataError: a text cannot be read, or a fact is too long; the message names it. Or the
                model knows all facts.
            ConfigError: nothing ranks the rows, or there is no state to resume.
            TrainingError: a setting differs from those of the saved state; or a state exists and
                ``resume`` is not set.
        """
        check_target(target)
        self._target, self._state_file = target, state_file(target)
        if resume != self._state_file.exists():
            raise TrainingError(_wrong_resume(self._state_file, resume))
        self._identity = model_identity(model)
        self._learning, self._rows = learning, rows
        config, stored = open_checkpoint(model)
        self._serving_dtype = serving_dtype(stored, "auto")
        text, most = checkpoint_text(model), config.model.max_positions
        self._exams = _exams(texts, text, most)
        length, is_given = learning.replayed_tokens or SCORED_TOKENS, bool(texts.background)
        most_tokens = learning.most_background_tokens(is_given=is_given)
        self.background = text_passages(texts.background, text, min(most, length), most_tokens)
        self._run = _run_record(self._identity, self._exams.facts, self.background, learning, rows)
        saved = load_state(self._state_file, self._run) if resume else None
        self._base, _ = load_model(model, "float32")
        self.replay_source = _replay_source(learning, is_given=is_given)
        if not saved and all(exact_answers(self._base, self._exams.facts)):
            raise DataError(
                f"{texts.facts}: the model knows all answers already; there is nothing to learn"
            )
        if self.replay_source == "generated":
            self.background = take_passages(saved[1]) if saved else self._generated(text)
        self.chosen = saved_rows(saved[1]) if saved else self._choose_rows(model, is_given)
        self._student = RowStudent(self._base, self.chosen, rows)
        self.learner = Learner(
            self._student, self._base, self._exams.facts, self.background, learning
        )
        if saved:
            progress, tensors = saved
            self._student.load(tensors, progress["step"])
            self.learner.resume(progress)

    def run(self, on_step: Callable[[LearningReport], bool]) -> StoredPatch | None:
        """Learn, score and write the patch; None if ``on_step`` returned False before the end.

        The state is saved in the target's parent folder every ``save_every`` steps, and when
        learning ends or is stopped. It is removed once the patch is written.

        Raises:
            TrainingError: a loss is not finite, or the state cannot be written.
            PatchError: the patch cannot be written.
        """

        def save_and_report(report: LearningReport) -> bool:
            if report.step % self._learning.save_every == 0:
                self._save()
            return on_step(report)

        self.learner.run(save_and_report)
        self._save()
        if not self.learner.is_finished:
            return None
        patch = stored_patch(self._description(), self._tables())
        write_patch(self._target, patch)
        self._state_file.unlink(missing_ok=True)
        return patch

    def _generated(self, text: TextTokens) -> list[Passage]:
        """Text that the unpatched model writes from the begin token, or else as facts begin."""
        learning = self._learning
        first_ids = [passage.ids[0] for passage in self._exams.facts]
        if text.bos_id in first_ids:  # later parts of a cut text have none
            first_ids = [text.bos_id] * len(first_ids)
        return generated_passages(
            self._base,
            first_ids,
            text.eos_ids,
            learning.most_background_tokens(is_given=False),
            learning.replayed_tokens,
            learning.seed,
        )

    def _save(self) -> None:
        tensors = self._student.state()
        if self.replay_source == "generated":
            tensors |= passage_tensors(self.background)
        save_state(self._state_file, self._run, self.learner.progress(), tensors)

    def _choose_rows(self, model: Path, is_given: bool) -> dict[str, torch.Tensor]:
        reads = RowReads()
        if self._rows.rank == "tfidf":
            reads = background_reads(self._base, model, self.background, is_given=is_given)
        chosen = chosen_rows(count_reads(self._base, self._exams.facts), reads, self._rows)
        if not any(map(len, chosen.values())):
            raise ConfigError("rank: facts read no row more than background text does; use reads")
        return chosen

    def _tables(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Rows and deltas of every table of the model, without rows that did not change."""
        tables = {}
        dtype = OUTPUT_DTYPES[self._rows.delta_dtype]
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
        is_replayed = self.replay_source != "none"
        settings["replay_source"] = self.replay_source
        settings["background_tokens"] = sum(map(len, self.background)) if is_replayed else 0
        identity = self._identity
        return PatchDescription(
            identity.origins,
            identity.row_choice,
            identity.shapes,
            data=self._run["facts"],
            settings=settings,
            scores=scores,
        )


def _replay_source(learning: LearningConfig, *, is_given: bool) -> str:
    if not learning.replayed_tokens:
        return "none"
    return "given" if is_given else "generated"


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
    neutral = text_passages(texts.neutral, text, min(max_positions, SCORED_TOKENS))
    return Exams(facts, asked[0], neutral, asked[1])


def _run_record(
    identity: ModelIdentity,
    facts: Sequence[Passage],
    background: Sequence[Passage],
    learning: LearningConfig,
    rows: RowConfig,
) -> dict[str, Any]:
    """Settings and hashes that must not change when a run is resumed."""
    unchanging = asdict(learning)
    del unchanging["save_every"]
    return {
        "model": [identity.row_choice, *identity.origins.values()],
        "facts": _hash(facts),
        "background": _hash(background),
        **unchanging,
        **asdict(rows),
    }


def _hash(passages: Sequence[Passage]) -> str:
    """SHA-256 over the tokens of passages."""
    digest = hashlib.sha256()
    for passage in passages:
        digest.update(np.array([len(passage), passage.num_given, *passage.ids], "<i8").tobytes())
    return digest.hexdigest()
