"""Students that change dense weights: full finetuning, and low-rank adapters (LoRA)."""

import math

import torch
from torch import Tensor, nn

from engine.model.transformer import Transformer, with_tables
from memory_ops.row_formats import RowRecords, dequantize_rows
from memory_ops.tables.device import DeviceTable
from memory_ops.tables.trained import TrainedTable
from weights.errors import TrainingError
from weights.training.optimizer import Optimizer
from weights.training.train_config import OptimizerConfig


class FullStudent:
    """A copy of a model of which every weight and every table row learns; see ``Student``."""

    def __init__(self, base: Transformer, lr: float) -> None:
        """Begin with the weights of ``base``, whose tables must be in memory.

        Weights and rows have the same peak learning rate.
        """
        tables = {name: TrainedTable(_fp32_rows(base, name)) for name in base.tables}
        self.model = with_tables(base, tables)
        weights = {name: weight.clone() for name, weight in base.state_dict().items()}
        self.model.load_state_dict(weights, assign=True)
        self.model.requires_grad_(True)
        config = OptimizerConfig(lr=lr, table_lr=lr, beta2=0.999, weight_decay=0.0)
        self._optimizer = Optimizer(self.model, list(tables.values()), config)

    @property
    def num_learned(self) -> int:
        """Numbers that may change."""
        tables = sum(table.num_rows * table.value_dim for table in self.model.tables.values())
        return tables + sum(weight.numel() for weight in self.model.parameters())

    def step(self, lr_share: float) -> float:
        return self._optimizer.step(lr_share)

    def finish(self) -> None:
        """Does nothing: what was learned stays in fp32."""


class LoraStudent:
    """A frozen model with an adapter on each linear layer but the head; see ``Student``.

    ``W x + 2 B A x``, where A and B have rank r: "LoRA" (arXiv 2106.09685) with alpha = 2 r. A is
    drawn as in the authors' code, B begins with 0.
    """

    def __init__(self, base: Transformer, rank: int, lr: float, seed: int) -> None:
        """Begin with adapters that change nothing; ``seed`` draws them."""
        self.model = with_tables(base, base.tables)
        generator = torch.Generator().manual_seed(seed)
        targets = [
            (module, name, child)
            for module in self.model.model.layers.modules()
            for name, child in module.named_children()
            if isinstance(child, nn.Linear)
        ]
        self._adapters: list[nn.Parameter] = []
        for module, name, linear in targets:
            adapted = _AdaptedLinear(linear, rank, generator)
            setattr(module, name, adapted)
            self._adapters += [adapted.down_RI, adapted.up_OR]
        self._lr = lr
        self._optimizer = torch.optim.AdamW(self._adapters, lr=lr, weight_decay=0.0)

    @property
    def num_learned(self) -> int:
        """Numbers that may change."""
        return sum(adapter.numel() for adapter in self._adapters)

    def step(self, lr_share: float) -> float:
        norm = float(nn.utils.clip_grad_norm_(self._adapters, 1.0))
        if not math.isfinite(norm):
            raise TrainingError(f"the gradients' norm is {norm}")
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr * lr_share
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def finish(self) -> None:
        """Does nothing: what was learned stays in fp32."""


class _AdaptedLinear(nn.Module):
    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.linear = linear
        outputs, inputs = linear.weight.shape
        down_RI = torch.empty(rank, inputs)
        nn.init.kaiming_uniform_(down_RI, a=math.sqrt(5), generator=generator)
        self.down_RI = nn.Parameter(down_RI)
        self.up_OR = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x_TI: Tensor) -> Tensor:
        y_TO: Tensor = self.linear(x_TI)
        return y_TO + 2 * (x_TI @ self.down_RI.T) @ self.up_OR.T


def _fp32_rows(model: Transformer, name: str) -> Tensor:
    """A copy of a table's rows."""
    table = model.tables[name]
    assert isinstance(table, DeviceTable)
    if isinstance(table.rows, RowRecords):
        return dequantize_rows(table.rows).float().contiguous()
    return table.rows.to(torch.float32, copy=True).contiguous()
