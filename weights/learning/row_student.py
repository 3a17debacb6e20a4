"""A student that learns deltas of chosen table rows; everything else is frozen."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.model.transformer import Transformer, with_tables
from memory_ops.tables.device import DeviceTable
from memory_ops.tables.learned_rows import LearnedRows
from memory_ops.tables.value_table import ValueTable
from weights.available_memory import available_memory, memory_if_known
from weights.checkpoints.memory_request import size_text
from weights.checkpoints.table_files import OUTPUT_DTYPES
from weights.errors import PatchError, TrainingError
from weights.learning.learning_config import RowConfig
from weights.learning.row_sgd import RowSgd
from weights.patches.patch_checks import check_row_ids
from weights.training.table_optimizer import TableOptimizer

_ROWS = ".rows"
_FP32_BYTES = 4


class RowStudent:
    """A frozen model with trainable deltas of rows; see ``Student``. It can be saved and loaded.

    Attributes:
        model: the model with the deltas; it shares all weights with the unpatched model.
        tables: the learned rows of each table that has chosen rows, by table name.
    """

    def __init__(self, base: Transformer, rows: Mapping[str, Tensor], config: RowConfig) -> None:
        """Begin with deltas of 0 for the ``rows`` of each table, int64 and ascending.

        The tables of ``base`` must be in memory (``DeviceTable``). A table may have no rows.

        Raises:
            ConfigError: the deltas and what learning adds to them do not fit in memory.
        """
        self._config = config
        _check_memory(base, rows, config)
        self.tables: dict[str, LearnedRows] = {}
        attached: dict[str, ValueTable] = dict(base.tables)
        for name, rows_P in rows.items():
            table = base.tables[name]
            assert isinstance(table, DeviceTable)
            if len(rows_P):
                attached[name] = self.tables[name] = LearnedRows(table, rows_P)
        self.model = with_tables(base, attached)
        trained = [table.deltas for table in self.tables.values()]
        kind = TableOptimizer if config.optimizer == "adam" else RowSgd
        self._optimizer: TableOptimizer | RowSgd = kind(trained)

    def step(self, lr_share: float) -> float:
        norm = math.sqrt(self._optimizer.collect())
        if not math.isfinite(norm):
            raise TrainingError(f"the gradients' norm is {norm}")
        clip = self._config.clip_norm
        scale = clip / norm if 0 < clip < norm else 1.0
        self._optimizer.step(self._config.peak_lr * lr_share, scale)
        return norm

    def finish(self) -> None:
        dtype = OUTPUT_DTYPES[self._config.delta_dtype]
        for table in self.tables.values():
            deltas_PV = table.deltas.table_RV
            deltas_PV.copy_(deltas_PV.to(dtype))

    def deltas(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Rows and deltas of each table, in the dtype in which they are stored."""
        dtype = OUTPUT_DTYPES[self._config.delta_dtype]
        return {
            name: (table.rows_P, table.deltas.table_RV[:-1].to(dtype))
            for name, table in self.tables.items()
        }

    def state(self) -> dict[str, Tensor]:
        """Rows, deltas and the optimiser's moments, to resume from; they share memory."""
        state: dict[str, Tensor] = {}
        for (name, table), moments in zip(
            self.tables.items(), self._optimizer.moments, strict=True
        ):
            state[f"{name}{_ROWS}"] = table.rows_P
            state[f"{name}.deltas"] = table.deltas.table_RV
            state |= {f"{name}.moment{n}": one for n, one in enumerate(moments) if one is not None}
        return state

    def load(self, state: Mapping[str, Tensor], step: int) -> None:
        """Continue from the ``state`` of an equal student after ``step`` steps.

        Raises:
            TrainingError: it is the state of a student of other rows.
        """
        own = self.state()
        if own.keys() != state.keys() or any(
            one.shape != state[name].shape
            or (name.endswith(_ROWS) and not torch.equal(one, state[name]))
            for name, one in own.items()
        ):
            raise TrainingError("the saved state has other rows than this run")
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self._optimizer.step_count = step


def saved_rows(state: Mapping[str, Tensor], base: Transformer) -> dict[str, Tensor]:
    """The rows of each table in a saved state, to make an equal student of ``base`` with.

    Raises:
        TrainingError: they are not rows of its tables.
    """
    rows = {
        name.removesuffix(_ROWS): rows_P for name, rows_P in state.items() if name.endswith(_ROWS)
    }
    for name, rows_P in rows.items():
        where = f"the saved state: {name}{_ROWS}"
        if name not in base.tables or rows_P.dtype is not torch.int64 or rows_P.ndim != 1:
            raise TrainingError(f"{where}: is not a list of row ids of a table")
        try:
            check_row_ids(where, rows_P, base.tables[name].num_rows)
        except PatchError as error:
            raise TrainingError(str(error)) from None
    return rows


def _check_memory(base: Transformer, rows: Mapping[str, Tensor], config: RowConfig) -> None:
    # the deltas, their copy to save or to round, and the moments
    copies = 4 if config.optimizer == "adam" else 2
    needed = 0
    for name, rows_P in rows.items():
        table = base.tables[name]
        needed += _FP32_BYTES * (copies * (len(rows_P) + 1) * table.value_dim + table.num_rows)
    available = memory_if_known(available_memory)
    if available is not None and needed > available.num_bytes:
        option = "rank: all" if config.rank == "all" else f"rows: {config.most_rows}"
        raise ConfigError(
            f"{option} needs {size_text(needed)} of memory, but {size_text(available.num_bytes)} is"
            f" available ({available.bound}); let fewer rows change"
        )
