"""Optimiser of a model and its tables: clipping, AdamW, sparse Adam, learning-rate schedule."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from engine.errors import ConfigError
from engine.model.norm import RmsNorm
from memory_ops.page_lock import PageLockError
from memory_ops.tables.trained import TrainedTable
from weights.checkpoints.table_files import OUTPUT_DTYPES
from weights.errors import TrainingError
from weights.training.replicas import Replicas
from weights.training.table_optimizer import TableOptimizer
from weights.training.train_config import OptimizerConfig

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """AdamW for parameters and sparse Adam for tables, with all gradients clipped by one norm.

    Parameters that require no gradient are frozen.

    Attributes:
        dense: torch's AdamW of the parameters.
        tables: sparse Adam of the tables.
    """

    def __init__(
        self,
        model: nn.Module,
        tables: Sequence[TrainedTable],
        config: OptimizerConfig,
        replicas: Replicas | None = None,
    ) -> None:
        """Set up both optimisers; gradients and reads are combined over all ``replicas``.

        Raises:
            ConfigError: the moments of tables in host memory cannot be page-locked.
        """
        betas = config.beta1, config.beta2
        decayed, others = _by_decay(model)
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self._config = config
        self._replicas = replicas or Replicas()
        self._parameters = [*decayed, *others]
        self.dense = torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps)
        for parameter in self._parameters:
            # torch creates them at the first step; a checkpoint needs them before
            moments = {name: torch.zeros_like(parameter) for name in _MOMENTS}
            self.dense.state[parameter] = {"step": torch.zeros(()), **moments}
        try:
            self.tables = TableOptimizer(
                tables,
                betas,
                config.eps,
                is_row_wise=config.row_wise,
                moment_dtype=OUTPUT_DTYPES[config.moment_dtype],
                replicas=self._replicas,
            )
        except PageLockError as error:
            raise ConfigError(f"run.table_tier: moments of tables: {error}") from None

    def step(self, share: float) -> float:
        """Update the weights and clear the gradients; return the gradients' norm before clipping.

        ``share`` multiplies the peak learning rates (see ``lr_share``).

        Raises:
            TrainingError: the norm is not finite; no weight was changed.
        """
        gradients = [_gradient(parameter) for parameter in self._parameters]
        self._replicas.sum_in_place(gradients)
        squares = [gradient.double().square().sum() for gradient in gradients]
        # one copy to the host, because each would wait for the device
        norm = math.sqrt(sum(torch.stack(squares).tolist()) + self.tables.collect())
        if not math.isfinite(norm):
            raise TrainingError(f"the gradients' norm is {norm}")
        clip = self._config.clip_norm
        scale = clip / norm if 0 < clip < norm else 1.0
        if scale < 1:
            torch._foreach_mul_(gradients, scale)
        for group in self.dense.param_groups:
            group["lr"] = self._config.lr * share
        self.dense.step()
        self.dense.zero_grad(set_to_none=True)
        self.tables.step(self._config.table_lr * share, scale)
        return norm

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """AdamW's moments of one parameter, by torch's names."""
        return {name: self.dense.state[parameter][name] for name in _MOMENTS}

    def set_step(self, step: int) -> None:
        """Set the number of steps done, to resume a run."""
        for parameter in self._parameters:
            self.dense.state[parameter]["step"].fill_(step)
        self.tables.step_count = step


def warmup_steps(config: OptimizerConfig, steps: int) -> int:
    """Steps of the warm-up: a tenth of ``steps`` if the configured number is not less than them."""
    return config.warmup_steps if config.warmup_steps < steps else steps // 10


def lr_share(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rates of step ``step`` (from 1) of ``steps``, as a fraction of the peak rates.

    Rises linearly over ``warmup_steps``. Then falls to ``least_lr_share`` at the last step, along a
    half cosine or a line, or stays constant, as ``decay`` says. Later steps have the last rates.
    """
    warmup = warmup_steps(config, steps)
    if step <= warmup:
        return step / warmup
    done = min((step - warmup) / (steps - warmup), 1.0)
    left = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}
    least = config.least_lr_share
    return least + (1 - least) * left[config.decay]


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:  # an expert that no token chose still takes the step
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _by_decay(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trained parameters with weight decay (matrices) and without it (norms, biases, subkeys)."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            is_matrix = name == "weight" and not isinstance(module, RmsNorm)
            (decayed if is_matrix else others).append(parameter)
    return decayed, others
