"""The eager executor: runs the modules of the model in plain torch, on the model's device."""

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.executors.batch import Batch, FinishedStep, sample_batch, warm_up_batch
from engine.executors.block_tables import HostBlockTable
from engine.executors.lookahead import Lookahead, LookaheadConfig, predicted_memories
from engine.executors.memory_recorder import MemoryRecorder
from engine.model.attention import kv_memory
from engine.model.config import ModelConfig
from engine.model.flops import StepFlops
from engine.model.forward_trace import ForwardTrace
from engine.model.transformer import ForwardOutput, Transformer
from engine.progress import Progress
from engine.sampling.sampler import Sampler
from memory_ops.tables.value_table import ValueTable


class EagerExecutor:
    """Runs on any device and at any precision; the fallback of the faster executors."""

    steps_ahead = 0
    balance_rows = 8

    def __init__(
        self,
        model: Transformer,
        num_blocks: int,
        block_size: int,
        lookahead: LookaheadConfig | None = None,
        kv_config: ModelConfig | None = None,
    ) -> None:
        """Reserve KV memory on the model's device and in its dtype.

        ``kv_config`` has the number of KV heads, by default that of the model.

        Raises:
            KvMemoryError: the system cannot provide the KV memory.
        """
        weight = model.model.embed_tokens.weight
        self.config = model.config
        self.num_blocks = num_blocks
        self.tables: Mapping[str, ValueTable] = model.tables
        self.device = weight.device
        self.recorder = MemoryRecorder(model.config, self.device)
        self.progress = Progress()
        self._model = model
        self._flops = StepFlops(model.config)
        for table in self.tables.values():
            table.watch(self.progress.mark)
        self._sampler = Sampler()
        self._block_table = HostBlockTable()
        self._kv_blocks = kv_memory(kv_config or model.config, num_blocks, block_size, weight)
        self._lookahead = (
            None if lookahead is None else Lookahead(predicted_memories(model.layers), lookahead)
        )

    @torch.inference_mode()
    def launch(self, batch: Batch) -> FinishedStep:
        # plain torch shows no progress inside a product: announce the step's amount of work
        flops = self._flops.of(batch.query_starts, batch.context_lengths, len(batch.logits_at_L))
        with self.progress.working(*flops):
            reads = self.recorder.begin(batch)
            logits_LV = self._forward(batch, reads.trace)
            found = reads.finish()
            result = sample_batch(logits_LV, batch, self._sampler, self.progress, found)
            return FinishedStep(result)

    @torch.inference_mode()
    def logits(self, batch: Batch) -> Tensor:
        """Run the forward; logits ``[L, vocabulary]`` at the batch's ``logits_at_L``."""
        return self._forward(batch)

    def _forward(self, batch: Batch, trace: ForwardTrace | None = None) -> Tensor:
        layout = batch.layout(self._block_table.update(batch.block_ids))
        output: ForwardOutput = self._model(
            batch.ids_T.to(self.device),
            layout.to(self.device),
            batch.logits_at_L.to(self.device),
            self._kv_blocks,
            before_layer=self._before_layer,
            with_trace=trace is not None,
        )
        if trace is not None:
            trace.memory += output.memory.values()
        self.progress.mark()
        return output.logits_LV

    def warm_up(self) -> None:
        self.launch(warm_up_batch())

    def close(self) -> None:
        """Does nothing: it starts no process."""

    def _before_layer(self, layer: int, residual_TD: Tensor) -> None:
        self.progress.mark()
        if self._lookahead is not None:
            self._lookahead.before(layer, residual_TD)
