"""Learns a row patch from facts: reads texts, chooses rows, runs the loop, scores, writes."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.errors import ConfigError
from engine.model.transformer import converted, with_tables
from weights.checkpoints.checkpoint import load_model, open_checkpoint, serving_dtype
from weights.checkpoints.table_files import OUTPUT_DTYPES, stored_layout
from weights.errors import DataError, TrainingError
from weights.learning.background import DOCUMENT_TOKENS, background_reads
from weights.learning.generated_text import generated_passages, passage_tensors, take_passages
from weights.learning.learner import Learner, LearningReport
from weights.learning.learning_config import LearningConfig, RowConfig
from weights.learning.learning_texts import LearningTexts
from weights.learning.row_ranks import chosen_rows
from weights.learning.row_student import RowStudent, saved_rows
from weights.learning.saved_state import load_state, save_state, state_file
from weights.learning.scores import exact_answers
from weights.patches.description import PatchDescription
from weights.patches.model_identity import base_patches_of, model_identity
from weights.patches.patch_folder import (
    StoredPatch,
    check_target,
    stored_patch,
    write_patch,
)
from weights.training.packing import Passage
from weights.training.row_reads import RowReads, count_reads, read_row_reads
from weights.training.training_data import TextTokens, checkpoint_text


class PatchLearner:
    """A learning run for one patch folder, new or resumed.

    Attributes:
        learner: the loop.
        background: passages that are replayed.
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
            ConfigError: nothing ranks the rows, they do not fit in memory, or an option has no
                effect.
            TrainingError: there is no valid state to resume, or a setting differs from those of the
                saved one; or a state exists and ``resume`` is not set.
        """
        check_target(target)
        self._target, self._state_file = target, state_file(target)
        if resume != self._state_file.exists():
            raise TrainingError(_wrong_resume(self._state_file, resume))
        texts.check_are_used(learning, rows)
        self._identity = model_identity(model)
        self._learning, self._rows = learning, rows
        config, stored = open_checkpoint(model)
        self._serving_dtype = serving_dtype(config, stored, "auto")
        text, most = checkpoint_text(model), config.model.max_positions
        self._exams = texts.exams(text, most)
        self.replay_source = texts.replay_source(learning)
        self.background: list[Passage] = []
        if self.replay_source == "given":
            length = min(most, learning.replayed_tokens)
            self.background = texts.background_passages(text, length, learning)
        self._stored_tables = [stored[name] for name in self._identity.shapes]
        self._run = self._unchanging()
        saved = load_state(self._state_file, self._run) if resume else None
        self._base, _ = load_model(model, "float32")
        if not saved and all(exact_answers(self._base, self._exams.facts)):
            raise DataError(
                f"{texts.facts}: the model knows all answers already; there is nothing to learn"
            )
        if self.replay_source == "generated":
            self.background = take_passages(saved[1]) if saved else self._generated(text)
        self.chosen = (
            saved_rows(saved[1], self._base) if saved else self._choose_rows(model, texts, text)
        )
        self._student = RowStudent(self._base, self.chosen, rows)
        self.learner = Learner(
            self._student, self._base, self._exams.facts, self.background, learning
        )
        if saved:
            progress, tensors = saved
            self.learner.resume(progress)
            self._student.load(tensors, self.learner.step)

    def run(self, on_step: Callable[[LearningReport], bool]) -> StoredPatch | None:
        """Learn, score and write the patch; None if ``on_step`` returned False before the end.

        The state is saved in the target's parent folder every ``save_every`` steps, and when
        learning ends or is stopped. It is removed once the patch is written.

        Raises:
            TrainingError: a loss or a score is not finite, or the state cannot be written.
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

    def _unchanging(self) -> dict[str, Any]:
        """Settings and hashes that must be the same when the run is resumed."""
        settings = asdict(self._learning) | asdict(self._rows)
        del settings["save_every"]
        return {
            "model": [self._identity.row_choice, *self._identity.origins.values()],
            "table_rows": {one.name: stored_layout(one).name for one in self._stored_tables},
            "table_patches": base_patches_of(self._stored_tables),
            "facts": _hash(self._exams.facts),
            "background": _hash(self.background),
            **settings,
        }

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

    def _choose_rows(
        self, model: Path, texts: LearningTexts, text: TextTokens
    ) -> dict[str, torch.Tensor]:
        reads = self._background_reads(model, texts, text) if self._rows.rank == "tfidf" else None
        chosen = chosen_rows(count_reads(self._base, self._exams.facts), reads, self._rows)
        if not any(map(len, chosen.values())):
            raise ConfigError("rank: facts read no row more than background text does; use reads")
        return chosen

    def _background_reads(self, model: Path, texts: LearningTexts, text: TextTokens) -> RowReads:
        if not texts.background:
            record = read_row_reads(model, self._base.config, self._identity.origins)
            return background_reads(self._base, record, self.background)
        # documents have one length, whatever a step's share of replayed text is
        length = min(self._base.config.max_positions, DOCUMENT_TOKENS)
        given = texts.background_passages(text, length, self._learning)
        return background_reads(self._base, None, given)

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
        # one copy of the dense weights serves both models
        base = converted(self._base, self._serving_dtype)
        served = base, with_tables(base, self._student.model.tables)
        scores = {
            "steps": self.learner.step,
            "exact_after": self.learner.exact_step,
            **self._exams.score(*served),
        }
        learning, rows = self._learning, self._rows
        settings = {
            "command": "learn",
            **asdict(learning),
            **asdict(rows),
            "rows": None if rows.rank == "all" else rows.most_rows,
            "lr": rows.peak_lr,
            "divergence_weight": learning.kl_weight if self.background else None,
            "replay_source": self.replay_source,
            "background_tokens": sum(map(len, self.background)),
        }
        identity = self._identity
        return PatchDescription(
            identity.origins,
            identity.row_choice,
            identity.shapes,
            base_patches_of(self._stored_tables),
            data=self._run["facts"],
            settings=settings,
            scores=scores,
        )


def _wrong_resume(file: Path, resume: bool) -> str:
    if resume:
        return f"{file}: no such file; there is no interrupted run to resume"
    return f"{file}: an interrupted run exists; add --resume to continue it, or delete the file"


def _hash(passages: Sequence[Passage]) -> str:
    """SHA-256 over the tokens of passages."""
    digest = hashlib.sha256()
    for passage in passages:
        digest.update(np.array([len(passage), passage.num_given, *passage.ids], "<i8").tobytes())
    return digest.hexdigest()
