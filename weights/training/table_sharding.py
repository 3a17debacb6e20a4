"""Division of value tables among the processes of a run: none, by rows, or by columns."""

from dataclasses import dataclass, field

from torch import Tensor

from engine.errors import ConfigError
from memory_ops.tables.column_sharded import ColumnShardedTable
from memory_ops.tables.row_sharded import RowShardedTable
from memory_ops.tables.sharded import ShardedTable
from memory_ops.tables.table_shard import TableShard
from weights.training.replicas import Replicas

_AXES = {"rows": 0, "columns": 1}


@dataclass(frozen=True)
class TableSharding:
    """A run's ``run.table_sharding`` and its processes.

    Attributes:
        kind: none, rows or columns.
        replicas: the processes; one process alone holds whole tables.
    """

    kind: str = "none"
    replicas: Replicas = field(default_factory=Replicas)

    @property
    def is_active(self) -> bool:
        """Whether each process holds only a part of a table."""
        return self.kind in _AXES and self.replicas.count > 1

    def shard(self, shape: tuple[int, int]) -> TableShard | None:
        """This process's part of a table of R rows and V values; None: all of it.

        Raises:
            ConfigError: the table has fewer rows or columns than the run has processes.
        """
        if not self.is_active:
            return None
        return shard_of(self.kind, shape, self.replicas.rank, self.replicas.count)

    def table(self, table_RV: Tensor, shard: TableShard) -> ShardedTable:
        """A table to train, of this process's part of the rows."""
        kind = RowShardedTable if shard.axis == 0 else ColumnShardedTable
        return kind(table_RV, shard, self.replicas)


def shard_of(kind: str, shape: tuple[int, int], rank: int, count: int) -> TableShard:
    """Part ``rank`` of ``count`` parts by ``kind``, rows or columns (ConfigError)."""
    try:
        return TableShard.even(shape, _AXES[kind], rank, count)
    except ValueError as error:
        raise ConfigError(f"run.table_sharding: a table of {error} processes") from None
