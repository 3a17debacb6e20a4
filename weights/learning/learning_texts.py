"""The text files of a learning run: facts, background text, and what is scored."""

from dataclasses import dataclass
from pathlib import Path

from engine.errors import ConfigError
from weights.learning.background import text_passages
from weights.learning.exams import Exams
from weights.learning.facts import fact_passages, read_asked, read_facts
from weights.learning.learning_config import LearningConfig, RowConfig
from weights.learning.scores import SCORED_TOKENS
from weights.training.packing import Passage
from weights.training.training_data import TextTokens


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

    def check_are_used(self, learning: LearningConfig, rows: RowConfig) -> None:
        """Raise ConfigError if an option gives or limits background text that nothing reads."""
        if learning.replayed_tokens:
            return
        if self.background and rows.rank != "tfidf":
            raise ConfigError(f"background: has no effect with replay_share 0 and rank {rows.rank}")
        if not self.background and learning.background_tokens is not None:
            raise ConfigError(
                "background_tokens: has no effect with replay_share 0 and no background"
            )

    def replay_source(self, learning: LearningConfig) -> str:
        """The text to replay: ``given``, ``generated`` by the model, or ``none``."""
        if not learning.replayed_tokens:
            return "none"
        return "given" if self.background else "generated"

    def exams(self, text: TextTokens, max_positions: int) -> Exams:
        """Everything to score, facts included (DataError)."""
        facts = fact_passages(read_facts(self.facts), text, max_positions)
        asked = [
            fact_passages(read_asked(file), text, max_positions) if file else []
            for file in (self.questions, self.known)
        ]
        neutral = text_passages(self.neutral, text, min(max_positions, SCORED_TOKENS))
        return Exams(facts, asked[0], neutral, asked[1])

    def background_passages(
        self, text: TextTokens, length: int, learning: LearningConfig
    ) -> list[Passage]:
        """The given background in passages of at most ``length`` tokens (DataError)."""
        most = learning.most_background_tokens(is_given=True)
        return text_passages(self.background, text, length, most)
