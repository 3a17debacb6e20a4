"""The training of a curve's contestants; only model, seed and optimiser layout differ."""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.curves.contestants import Contestant
from weights.training.train_config import DataConfig, OptimizerConfig, RunConfig, TrainConfig

TOKENS_PER_STEP = 2048


@dataclass(frozen=True)
class Training:
    """The settings that differ between curves.

    Attributes:
        steps: optimiser steps of ``TOKENS_PER_STEP`` tokens.
        sequence_length: tokens per sequence.
        lr: peak learning rate of dense weights; that of tables is 1e-2.
        warmup_steps: steps in which the learning rates rise to their peak.
        tokenizer: name of the tokenizer's file, which lies in the same folder as ``train.jsonl``.
    """

    steps: int
    sequence_length: int
    lr: float
    warmup_steps: int
    tokenizer: str

    def config(self, contestant: Contestant, seed: int, texts: Path) -> TrainConfig:
        """The configuration of one run, on the folder ``texts``."""
        return TrainConfig(
            data=DataConfig(
                train=(str(texts / "train.jsonl"),),
                validation_share=0.0,
                tokenizer=str(texts / self.tokenizer),
                sequence_length=self.sequence_length,
            ),
            run=RunConfig(
                steps=self.steps,
                tokens_per_step=TOKENS_PER_STEP,
                dtype="float32",
                seed=seed,
                checkpoint_every=1000,
                evaluate_every=self.steps,
            ),
            optimizer=OptimizerConfig(
                lr=self.lr,
                table_lr=1e-2,
                weight_decay=0.0,
                row_wise=contestant.row_wise,
                warmup_steps=self.warmup_steps,
                least_lr_share=0.02,
            ),
            model=contestant.model,
        )
