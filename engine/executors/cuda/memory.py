"""A memory layer on the GPU: row fetches overlap the gate's product."""

from collections.abc import Callable, Generator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import gelu

from engine.executors.cuda.kernels.rms_norm import Norm, rms_norm
from engine.executors.cuda.kernels.silu_gate import silu_gate
from engine.executors.cuda.products import joined, norm_of
from engine.executors.cuda.rank_products import output_product
from engine.executors.cuda.step_tokens import StepTokens
from engine.executors.lookahead import PredictedMemory
from engine.model.forward_trace import ForwardTrace, MemoryTrace
from engine.model.memory_layer import MemoryLayer
from engine.model.norm import RmsNorm
from memory_ops import operations
from memory_ops.tables.device import ReadyLookup
from memory_ops.tables.value_table import Lookup, ValueTable
from memory_ops.triton_kernels.add_patched_rows import add_device_patches

# Work on a micro-batch that returns its residual stream. It stops three times for each lookup:
# before it starts, because a table has one at a time; when it has started; when its rows are read.
Pieces = Generator[None, None, Tensor]


class CudaMemory:
    """A ``MemoryLayer`` with its norm and residual sum; see there for the formulas."""

    def __init__(self, memory: MemoryLayer, norm: RmsNorm) -> None:
        self._memory, self._norm = memory, norm_of(norm)
        self._query = joined(memory.query)
        self._gate = None if memory.gate is None else joined(memory.gate)
        # scale this product's bias too: y is linear in the rows only without it
        self._scale = None if memory.scalar_gate is None else float(memory.scalar_gate)
        value = memory.value_proj
        self._value = None if value is None else output_product(value)
        if self._value is not None and self._scale is not None:
            self._value = self._value.with_scaled_bias(self._scale)
        output_gate = memory.output_gate
        self._output_gate = None if output_gate is None else joined(output_gate)
        # [2 H, k / 2, N]: one product per half of a head
        self._subkeys_XkN = memory.subkeys.flatten(0, 1).transpose(1, 2)
        self.index = memory.index
        self.num_references = memory.num_heads * memory.top_k

    @property
    def tables(self) -> tuple[ValueTable, ...]:
        """The tables that the layer reads."""
        return self._memory.tables

    @property
    def predicted(self) -> PredictedMemory:
        """The layer as the lookahead needs it."""
        memory = self._memory
        scores = partial(self._half_scores, norm=self._norm)
        return PredictedMemory(self.index, memory.num_subkeys, memory.tables, scores)

    def pieces(
        self,
        residual_TD: Tensor,
        tokens: StepTokens,
        trace: ForwardTrace,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> Pieces:
        """Return the new residual stream, and add the rows that are read to ``trace``.

        In mixed steps padding reads the rows of the first token of its micro-batch, so that it
        fetches nothing. In decodes it repeats the first sequence. ``residual_TD`` may change after
        ``meanwhile``, which runs while rows are fetched.
        """
        memory = self._memory
        x_TD = tokens.with_padding(rms_norm(residual_TD, *self._norm))
        half_scores_TH2N = self._half_scores(x_TD)
        rows_THK, weights_THK = operations.product_topk(half_scores_TH2N, memory.top_k)
        trace.memory.append(MemoryTrace(rows_THK, weights_THK))
        if memory.is_peer:
            memory.table.hint(rows_THK, self.index)
            yield
            dots = self._start_dots(rows_THK, x_TD)
            yield
            weights_THK = weights_THK * gelu(dots.finish())
            yield
        if self._scale is not None:
            weights_THK = weights_THK * self._scale
        yield
        lookup = self._start(rows_THK, weights_THK)
        gate_TV = None if self._gate is None else self._gate(x_TD)
        gate_T1 = None if self._output_gate is None else self._output_gate(x_TD)
        meanwhile()
        yield
        sum_TV = lookup.finish()
        patches = tokens.patches.get(self.index)
        if patches is not None:
            add_device_patches(sum_TV, rows_THK, weights_THK, patches)
        yield
        y_TV = sum_TV if gate_TV is None else silu_gate(gate_TV, sum_TV)
        if self._value is not None and gate_T1 is None:
            return self._value(y_TV.to(x_TD.dtype), residual_MO=residual_TD)
        y_TD = y_TV if self._value is None else self._value(y_TV.to(x_TD.dtype))
        if gate_T1 is None:
            return residual_TD.add_(y_TD)
        return residual_TD.addcmul_(gate_T1.sigmoid(), y_TD)

    def _half_scores(self, x_TD: Tensor, norm: Norm | None = None) -> Tensor:
        memory = self._memory
        q_TF = self._query(x_TD, norm=norm)
        half_dim = self._subkeys_XkN.shape[1]
        q_TH2k = q_TF.view(len(q_TF), memory.num_heads, 2, half_dim)
        if memory.query_norm is not None:
            q_TH2k = rms_norm(q_TH2k, memory.query_norm, memory.norm_eps)
        scores_XTN = _wide_product(q_TH2k.flatten(1, 2).transpose(0, 1), self._subkeys_XkN)
        num_tokens, num_subkeys = q_TF.shape[0], scores_XTN.shape[2]
        scores_H2TN = scores_XTN.view(memory.num_heads, 2, num_tokens, num_subkeys)
        return scores_H2TN.permute(2, 0, 1, 3)

    def _start(self, rows_THK: Tensor, weights_THK: Tensor) -> Lookup:
        table = self._memory.table
        source = table.row_source(self.index)
        if source is None:
            return table.start(rows_THK, weights_THK, self.index)
        # the executor counts these lookups: a graph's replay does not pass here
        return ReadyLookup(partial(operations.gather_rows, source.rows, rows_THK, weights_THK))

    def _start_dots(self, rows_THK: Tensor, x_TD: Tensor) -> Lookup:
        table = self._memory.down_table
        source = table.row_source(self.index)
        if source is None:
            return table.start_dots(rows_THK, x_TD, self.index)
        return ReadyLookup(partial(operations.row_dots, source.rows, rows_THK, x_TD))


def _wide_product(q_XTk: Tensor, subkeys_XkN: Tensor) -> Tensor:
    """Batched products with fp32 results, without a wide copy of the subkeys."""
    if q_XTk.dtype is torch.float32:
        return torch.bmm(q_XTk, subkeys_XkN)
    if q_XTk.is_cuda:
        return torch.bmm(q_XTk, subkeys_XkN, out_dtype=torch.float32)
    # torch has this product on GPUs alone
    return torch.bmm(q_XTk.float(), subkeys_XkN.float())
