"""The CPU executor: native kernels on packed weights."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from engine.executors.batch import Batch, FinishedStep, sample_batch, warm_up_batch
from engine.executors.block_tables import HostBlockTable
from engine.executors.cpu.decoder import CpuDecoder
from engine.executors.cpu.kernels import CpuKernels
from engine.executors.cpu.layers import pack_layer
from engine.executors.cpu.packing import Packer
from engine.executors.lookahead import Lookahead, LookaheadConfig
from engine.executors.memory_recorder import MemoryRecorder
from engine.model.attention import kv_memory
from engine.model.forward_trace import ForwardTrace
from engine.model.grouped_layers import GroupedEmbedding
from engine.model.layout import TokenLayout
from engine.model.rotary import rope_angles
from engine.model.transformer import Transformer
from engine.model.weight_bits import HEAD_BITS
from engine.progress import Progress
from engine.sampling.sampler import Sampler
from memory_ops.tables.value_table import ValueTable


class CpuExecutor:
    """Runs whole decoder layers in one native call, on weights that it packed for itself."""

    steps_ahead = 0
    # for SmolLM2 in bf16 it is 20 in a context of 200 tokens, 9 in one of 4,000
    balance_rows = 8

    def __init__(
        self,
        model: Transformer,
        kernels: CpuKernels,
        num_blocks: int,
        block_size: int,
        lookahead: LookaheadConfig | None = None,
        dtype: torch.dtype | None = None,
        weight_bits: int | None = None,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        """Pack a model's weights in ``dtype``, fp32 or bf16, and reserve KV memory.

        ``dtype`` is by default that of the model; the embedding is kept if it has ``dtype``. With
        ``weight_bits``, weights are rounded to groups: to these bits in the layers, to 8 bits in
        embedding and head. Keys and values are kept in ``dtype``, or rounded to int8 if that is
        ``kv_dtype``.

        Raises:
            KvMemoryError: the system cannot provide the KV memory.
        """
        self.config = model.config
        self.num_blocks = num_blocks
        self.tables: Mapping[str, ValueTable] = model.tables
        self.device = model.model.norm.weight.device
        self.recorder = MemoryRecorder(model.config, self.device)
        self.progress = Progress()
        for table in self.tables.values():
            table.watch(self.progress.mark)
        self.progress.watch(lambda: kernels.work_done)
        self._kernels = kernels
        packer = Packer(kernels, dtype or model.dtype, weight_bits)
        head_packer, embedding = packer, model.model.embed_tokens
        if weight_bits is not None:
            assert isinstance(embedding, nn.Embedding)
            head_packer = replace(packer, weight_bits=HEAD_BITS)
            embedding = GroupedEmbedding.rounded(embedding, HEAD_BITS)
        self._embed = _embedding(embedding, packer.dtype)
        self._rope = model.rope_frequencies, model.rope_amplitude
        layers = [pack_layer(packer, layer) for layer in model.layers]
        memories = [layer.memory.predicted for layer in layers if layer.memory is not None]
        self._decoder = CpuDecoder(
            layers,
            model.config.num_heads,
            kernels,
            self.progress,
            None if lookahead is None else Lookahead(memories, lookahead),
        )
        head = embedding if model.lm_head is None else model.lm_head
        self._head = head_packer.linear(head, norm=model.model.norm)
        self._sampler = Sampler(kernels.sample, kernels.log_probabilities, kernels.mask)
        self._block_table = HostBlockTable()
        like = torch.empty(0, dtype=kv_dtype or packer.dtype)
        self._kv_blocks = kv_memory(model.config, num_blocks, block_size, like)

    @torch.inference_mode()
    def launch(self, batch: Batch) -> FinishedStep:
        reads = self.recorder.begin(batch)
        logits_LV = self._forward(batch, reads.trace)
        found = reads.finish()
        return FinishedStep(sample_batch(logits_LV, batch, self._sampler, self.progress, found))

    @torch.inference_mode()
    def logits(self, batch: Batch) -> Tensor:
        """Run the forward; logits ``[L, vocabulary]`` at the batch's ``logits_at_L``."""
        return self._forward(batch)

    def _forward(self, batch: Batch, trace: ForwardTrace | None = None) -> Tensor:
        layout = batch.layout(self._block_table.update(batch.block_ids))
        residual_TD = self.run_layers(batch.ids_T, layout, self._kv_blocks, trace)
        logits_LV = self._kernels.linear(self._head, residual_TD[batch.logits_at_L])
        self.progress.mark()
        return logits_LV

    def run_layers(
        self,
        ids_T: Tensor,
        layout: TokenLayout,
        kv_blocks: Tensor,
        trace: ForwardTrace | None = None,
    ) -> Tensor:
        """The residual stream ``[T, D]`` after the last layer; see ``Transformer.forward``."""
        residual_TD = self._embed(ids_T)
        angles = rope_angles(layout.positions_T, *self._rope)
        return self._decoder.run(residual_TD, layout, angles, kv_blocks, trace)

    def warm_up(self) -> None:
        self.launch(warm_up_batch())

    def close(self) -> None:
        """Does nothing: it starts no process."""


def _embedding(
    module: nn.Embedding | GroupedEmbedding, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """The rows ``[T, D]`` of token ids, in ``dtype``."""
    if isinstance(module, GroupedEmbedding):
        return partial(module.rows, dtype=dtype)
    embedding_VD = module.weight.to(dtype)
    return lambda ids_T: embedding(ids_T, embedding_VD)
