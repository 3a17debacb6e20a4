"""Exams of a patched model: facts, other phrasings, neutral text and facts known before."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from engine.model.transformer import Transformer
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
        """
        scores: dict[str, Any] = {"facts": _recall(model, self.facts)}
        if self.questions:
            scores["questions"] = _recall(model, self.questions)
        if self.neutral:
            scores["neutral"] = asdict(score_drift(base, model, self.neutral))
        if self.known:
            before = exact_answers(base, self.known)
            after = exact_answers(model, self.known)
            lost = sum(was and not still for was, still in zip(before, after, strict=True))
            scores["known"] = {"asked": len(before), "exact_before": sum(before), "lost": lost}
        return scores


def _recall(model: Transformer, passages: Sequence[Passage]) -> dict[str, Any]:
    exact = sum(exact_answers(model, passages))
    return {"asked": len(passages), "exact": exact, "recall": exact / len(passages)}


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
