"""One step on the GPU, from packed inputs to chosen tokens; tables on disk make the host wait."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from engine.executors.cuda.buckets import StepShape
from engine.executors.cuda.device_state import DeviceState
from engine.executors.cuda.kernels.add_biases import add_biases
from engine.executors.cuda.kernels.block_table import update_block_table
from engine.executors.cuda.kernels.choose_tokens import choose_tokens
from engine.executors.cuda.kernels.embed import embed
from engine.executors.cuda.layers import CudaLayer
from engine.executors.cuda.memory import CudaMemory
from engine.executors.cuda.micro_batches import run_layers, split_rule
from engine.executors.cuda.products import norm_of, weight_of
from engine.executors.cuda.rank_products import head_of
from engine.executors.cuda.step_tokens import StepTokens
from engine.executors.lookahead import Lookahead, LookaheadConfig
from engine.executors.micro_batch_count import MicroBatchCount
from engine.executors.parallel.device_group import DeviceGroup
from engine.executors.parallel.shares import RankShare
from engine.model.forward_trace import ForwardTrace
from engine.model.rotary import rope_angles
from engine.model.transformer import Transformer
from memory_ops.tables.gpu_disk import GpuDiskTable


class DeviceRank(NamedTuple):
    """A tensor-parallel rank: its share of the model, and the group of all ranks."""

    share: RankShare
    group: DeviceGroup


@dataclass(frozen=True)
class StepOutputs:
    """The results of a step on the device, valid until the next one.

    Attributes:
        logits_LV: fp32, biases added.
        chosen_L: int64 ids, or ``NO_TOKEN``.
        trace: the rows that memory layers read, and router logits.
    """

    logits_LV: Tensor
    chosen_L: Tensor
    trace: ForwardTrace


class DeviceModel:
    """A model's layers on the GPU; they share the model's weights, which must stay as they are.

    The weights of layers with the same input become views of one tensor.

    Attributes:
        config: the model's shapes.
        kv_config: the same, with the heads that this process has.
        tables: the model's value tables by name.
        micro_batches: the number of micro-batches of each step, if the tables are on disk.
        dtype: dtype of the residual stream, and of keys and values unless they are fp8.
        device: where the weights are.
    """

    def __init__(
        self,
        model: Transformer,
        lookahead: LookaheadConfig | None = None,
        rank: DeviceRank | None = None,
    ) -> None:
        """``rank`` is given if the model is the share of a tensor-parallel rank."""
        self.config, self.tables = model.config, model.tables
        norm_D = model.model.norm.weight
        self.dtype, self.device = norm_D.dtype, norm_D.device
        self._embedding_VD = weight_of(model.model.embed_tokens)
        positions_P = torch.arange(model.config.max_positions, device="cpu")
        # computed on the CPU: the bits of the CPU executor
        cos, sin = rope_angles(positions_P, model.rope_frequencies.cpu(), model.rope_amplitude)
        self._angles = cos.to(self.device), sin.to(self.device)
        self._group = None if rank is None else rank.group
        self.kv_config = model.config if rank is None else rank.share.kv_config
        self._layers = [CudaLayer(layer, self.kv_config.num_heads) for layer in model.layers]
        self._norm, self._head = norm_of(model.model.norm), head_of(model)
        is_on_disk = all(isinstance(table, GpuDiskTable) for table in self.tables.values())
        weight_bytes = sum(one.nbytes for one in (*model.parameters(), *model.buffers()))
        split_memories = self.memories if is_on_disk else []
        self.micro_batches = MicroBatchCount(split_memories, split_rule(weight_bytes))
        memories = [memory.predicted for memory in self.memories]
        self._lookahead = None if lookahead is None else Lookahead(memories, lookahead)

    @property
    def memories(self) -> list[CudaMemory]:
        """The memory layers, in order."""
        return [layer.memory for layer in self._layers if layer.memory is not None]

    def run(
        self, inputs: Mapping[str, Tensor], shape: StepShape, state: DeviceState
    ) -> StepOutputs:
        """Run a step of this shape; its inputs are those of ``InputLayout``."""
        update_block_table(state.block_table_PB, inputs["updates"], inputs["counts"][:1])
        if self._group is not None:
            # rank 0 chooses the tokens, maybe after the step
            self._group.copy_from_first(state.last_token_P)
        ids_T, width = inputs["ids"], self.config.hidden_size
        residual_TD = torch.empty(len(ids_T), width, dtype=self.dtype, device=self.device)
        embed(ids_T, state.last_token_P, self._embedding_VD, residual_TD)
        layers = self.config.memory_layers
        tokens = StepTokens.of(inputs, shape, state.block_table_PB, self._angles, layers)
        trace, lookahead = ForwardTrace(), self._lookahead
        residual_TD = run_layers(
            self._layers, residual_TD, tokens, state.kv_blocks, trace, lookahead
        )
        if not shape.is_decode:
            residual_TD = residual_TD.index_select(0, inputs["logits_at"])
        logits_LV, chosen_L = self._outputs(shape.logits, state)
        self._head(residual_TD, norm=self._norm, out_MO=logits_LV)
        add_biases(logits_LV, inputs["bias_places"], inputs["bias_values"], inputs["counts"][1:2])
        choose_tokens(
            logits_LV, inputs["choices"], inputs["row_seats"], chosen_L, state.last_token_P
        )
        return StepOutputs(logits_LV, chosen_L, trace)

    def _outputs(self, count: int, state: DeviceState) -> tuple[Tensor, Tensor]:
        if count <= len(state.chosen_L):
            return state.logits_LV[:count], state.chosen_L[:count]
        # a scored prompt needs logits at every position
        shape = count, state.logits_LV.shape[1]
        return state.logits_LV.new_empty(shape), state.chosen_L.new_empty(count)
