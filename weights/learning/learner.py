"""The learning loop: teaches a student facts until all answers are exact, then cools down."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from engine.model.transformer import Transformer
from weights.checkpoints.table_files import OUTPUT_DTYPES
from weights.errors import TrainingError
from weights.learning.learning_config import LearningConfig
from weights.learning.passage_order import OrderPosition, PassageOrder
from weights.learning.scores import answered, divergence, exact_answers
from weights.learning.student import Student
from weights.training.loss import batch_output
from weights.training.packing import Passage, packed


@dataclass(frozen=True)
class LearningReport:
    """Results of one step.

    Attributes:
        step: number of the step, from 1.
        loss: mean nats per learned token.
        replay_loss: mean divergence, or nats, per replayed token; 0 without replay.
        exact: fraction of the step's facts whose answers were exact before the step.
        lr_share: learning rate as a fraction of its peak.
        is_cooling: whether the step belongs to the cool-down.
    """

    step: int
    loss: float
    replay_loss: float
    exact: float
    lr_share: float
    is_cooling: bool


class Learner:
    """A learning run: any student, facts, and background text that is replayed.

    Attributes:
        step: steps done.
        exact_step: the step after which all answers were exact; None if they never were.
    """

    def __init__(
        self,
        student: Student,
        base: Transformer,
        facts: Sequence[Passage],
        background: Sequence[Passage],
        config: LearningConfig,
    ) -> None:
        """Begin at step 0; ``base`` is the unpatched model.

        Without ``background`` nothing is replayed, and all tokens of a step are facts.
        """
        self._student, self._base, self._config = student, base, config
        self._facts, self._background = facts, background
        replayed = config.replayed_tokens if background else 0
        self._order = PassageOrder(facts, max(1, config.batch_tokens - replayed), config.seed)
        self._replay_order = PassageOrder(background, replayed, config.seed) if replayed else None
        self._has_missed = False
        self._cooling_from: int | None = None
        self.step = 0
        self.exact_step: int | None = None

    @property
    def is_finished(self) -> bool:
        """Whether the cool-down is over."""
        last = self._cooling_from
        return last is not None and self.step >= last + self._config.cooldown_steps

    def run(self, on_step: Callable[[LearningReport], bool]) -> None:
        """Learn to the end, or until ``on_step`` returns False after a step.

        At the end the student is rounded to the dtype in which it is stored.

        Raises:
            TrainingError: the loss or a gradient is not finite; the message names the step.
        """
        while not self.is_finished:
            if not on_step(self._one_step()):
                break
        if self.is_finished:
            self._student.finish()

    def progress(self) -> dict[str, Any]:
        """The state of the loop as JSON; the student's state is saved apart."""
        replay = self._replay_order
        return {
            "step": self.step,
            "exact_step": self.exact_step,
            "cooling_from": self._cooling_from,
            "has_missed": self._has_missed,
            "facts": list(self._order.position),
            "replay": list(replay.position) if replay else None,
        }

    def resume(self, progress: dict[str, Any]) -> None:
        """Continue from the ``progress`` of an equal run; the caller loads the student's state.

        Raises:
            TrainingError: it is not the progress of such a run.
        """
        if progress.keys() != self.progress().keys() or not (
            _is_count(progress["step"], math.inf)
            and all(
                progress[name] is None or _is_count(progress[name], progress["step"])
                for name in ("exact_step", "cooling_from")
            )
            and isinstance(progress["has_missed"], bool)
            and _is_position(progress["facts"], self._facts)
            and (progress["replay"] is None) == (self._replay_order is None)
            and (progress["replay"] is None or _is_position(progress["replay"], self._background))
        ):
            raise TrainingError("the saved state has no valid progress")
        self.step, self.exact_step = progress["step"], progress["exact_step"]
        self._cooling_from, self._has_missed = progress["cooling_from"], progress["has_missed"]
        self._order.position = OrderPosition(*progress["facts"])
        if self._replay_order is not None:
            self._replay_order.position = OrderPosition(*progress["replay"])

    def _one_step(self) -> LearningReport:
        step = self.step + 1
        loss, exact = self._learn()
        replay_loss = self._replay() if self._replay_order is not None else 0.0
        if not math.isfinite(loss + replay_loss):
            raise TrainingError(f"step {step}: the loss is {loss + replay_loss}")
        is_cooling, share = self._cooling_from is not None, self._lr_share(step)
        try:
            self._student.step(share)
        except TrainingError as error:
            raise TrainingError(f"step {step}: {error}") from None
        self.step = step
        if not is_cooling:
            self._start_cooling()
        return LearningReport(step, loss, replay_loss, exact, share, is_cooling)

    def _learn(self) -> tuple[float, float]:
        """Add the gradients of the next facts; return their loss, and the exact fraction."""
        facts = [self._facts[index] for index in self._order.next()]
        batch, dtype = packed(facts), OUTPUT_DTYPES[self._config.precision]
        logits_LV = batch_output(self._student.model, batch, dtype).logits_LV.float()
        targets_L = torch.from_numpy(batch.targets_T).to(logits_LV.device)
        loss = functional.cross_entropy(logits_LV, targets_L)
        loss.backward()  # type: ignore[no-untyped-call]
        exact = answered(logits_LV.detach(), batch)
        self._has_missed |= not all(exact)
        return float(loss.detach()), sum(exact) / len(exact)

    def _replay(self) -> float:
        """Add the gradients of the next background text; return its loss."""
        assert self._replay_order is not None
        passages = [self._background[index] for index in self._replay_order.next()]
        batch, dtype = packed(passages), OUTPUT_DTYPES[self._config.precision]
        logits_LV = batch_output(self._student.model, batch, dtype).logits_LV.float()
        weight = self._config.kl_weight
        if weight:
            with torch.no_grad():
                base_LV = batch_output(self._base, batch, dtype).logits_LV.float()
            loss = weight * divergence(base_LV, logits_LV) / len(logits_LV)
        else:
            targets_L = torch.from_numpy(batch.targets_T).to(logits_LV.device)
            loss = functional.cross_entropy(logits_LV, targets_L)
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach()) / (weight or 1.0)

    def _lr_share(self, step: int) -> float:
        config, start = self._config, self._cooling_from
        warm = step if start is None else start
        reached = min(1.0, warm / max(1, config.warmup_steps))
        if start is None:
            return reached
        return reached * (config.cooldown_steps + 1 - (step - start)) / (config.cooldown_steps + 1)

    def _start_cooling(self) -> None:
        """Start the cool-down if all answers are exact, or if no more steps are left for it."""
        if self._order.is_at_epoch_end:
            # each answer was checked before its step, and later steps may have changed it
            if not self._has_missed and self._all_exact():
                self.exact_step = self._cooling_from = self.step
            self._has_missed = False
        if self.step >= self._config.steps - self._config.cooldown_steps:
            self._cooling_from = self.step

    def _all_exact(self) -> bool:
        dtype = OUTPUT_DTYPES[self._config.precision]
        return all(exact_answers(self._student.model, self._facts, dtype))


def _is_count(value: object, most: float) -> bool:
    return type(value) is int and 0 <= value <= most


def _is_position(value: object, passages: Sequence[Passage]) -> bool:
    """Whether a value is an epoch, and a number of passages that leaves one."""
    if not isinstance(value, list) or len(value) != 2:
        return False
    return _is_count(value[0], math.inf) and _is_count(value[1], len(passages) - 1)
