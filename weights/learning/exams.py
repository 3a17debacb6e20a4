"""Exams of a patched model: facts, other phrasings, neutral text and facts known before."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from engine.model.transformer import Transformer
from weights.errors import TrainingError
from weights.learning.scores import exact_answers, score_drift
from weights.training.packing import Passage


@dataclass(frozen=True)
class Exams:
    """Passages to score a model with; those that are empty are not scored.

    Attributes:
        facts: the learned facts.
        questions: facts in other phrasings.
        neutral: texts that the patch should not change.
        known: facts that the unpatched model may know.
    """

    facts: Sequence[Passage]
    questions: Sequence[Passage] = ()
    neutral: Sequence[Passage] = ()
    known: Sequence[Passage] = ()

    def score(self, base: Transformer, model: Transformer) -> dict[str, Any]:
        """Scores of a patched model in its own dtype, as JSON; ``base`` is the unpatched model.

        ``facts`` and ``questions`` give the answers that are exact, and their fraction; ``known``
        gives the facts that were exact without the patch, and how many of them are lost.

        Raises:
            TrainingError: a logit is not finite; the message names the exam.
        """
        scores: dict[str, Any] = {}
        with _naming("facts"):
            scores["facts"] = _recall(model, self.facts)
        if self.questions:
            with _naming("questions"):
                scores["questions"] = _recall(model, self.questions)
        if self.neutral:
            with _naming("neutral"):
                scores["neutral"] = asdict(score_drift(base, model, self.neutral))
        if self.known:
            with _naming("known"):
                scores["known"] = _losses(base, model, self.known)
        return scores


@contextmanager
def _naming(exam: str) -> Iterator[None]:
    try:
        yield
    except TrainingError as error:
        raise TrainingError(f"{exam}: {error}") from None


def _recall(model: Transformer, passages: Sequence[Passage]) -> dict[str, Any]:
    exact = sum(exact_answers(model, passages))
    return {"asked": len(passages), "exact": exact, "recall": exact / len(passages)}


def _losses(base: Transformer, model: Transformer, passages: Sequence[Passage]) -> dict[str, Any]:
    before, after = exact_answers(base, passages), exact_answers(model, passages)
    lost = sum(was and not still for was, still in zip(before, after, strict=True))
    return {"asked": len(before), "exact_before": sum(before), "lost": lost}


def describe(scores: dict[str, Any]) -> str:
    """Lines that report the scores of ``Exams.score``."""
    lines = []
    for name in ("facts", "questions"):
        if name in scores:
            one = scores[name]
            lines.append(f"{name:<10} {one['exact']} of {one['asked']} exact: {one['recall']:.1%}")
    if "known" in scores:
        one = scores["known"]
        lines.append(
            f"known      {one['lost']} lost of {one['exact_before']} that were exact before"
            f" ({one['asked']} asked)"
        )
    if "neutral" in scores:
        one = scores["neutral"]
        lines.append(
            f"neutral    perplexity {one['perplexity_before']:.4f} before,"
            f" {one['perplexity']:.4f} after; KL {one['divergence']:.5f} nats per token"
            f" ({one['tokens']} tokens)"
        )
    return "\n".join(lines)
