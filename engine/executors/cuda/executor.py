"""The CUDA executor: whole steps in CUDA graphs, one in flight while the host plans the next."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.executors.batch import Batch, filled_bitmask, warm_up_batch
from engine.executors.cuda.buckets import Buckets, Splits, StepShape
from engine.executors.cuda.device import Device
from engine.executors.cuda.device_block_table import DeviceBlockTable
from engine.executors.cuda.device_state import DeviceState
from engine.executors.cuda.graph_biases import graph_biases
from engine.executors.cuda.kernels.choose_tokens import choose_tokens
from engine.executors.cuda.launched_step import CudaStep
from engine.executors.cuda.patch_inputs import patched_layers
from engine.executors.cuda.scored_tokens import ScoredTokens
from engine.executors.cuda.staging import StagedInputs, Staging
from engine.executors.cuda.step import DeviceModel, StepOutputs
from engine.executors.cuda.step_inputs import MOST_UPDATES, InputLayout, InputWriter
from engine.executors.cuda.step_runner import Inputs, StepRunner
from engine.executors.cuda.traced_tokens import TracedTokens
from engine.executors.memory_recorder import MemoryRecorder
from engine.executors.parallel.tables import SharedTable
from engine.progress import Progress
from engine.sampling.logit_rules import apply_rules
from memory_ops.tables.device import DeviceTable
from memory_ops.tables.value_table import ValueTable

# compilation included; a step without a graph is slower, and otherwise the same
_MOST_CAPTURE_S = 300.0

logger = logging.getLogger(__name__)


class CudaExecutor:
    """Runs steps in the order of their launches on one queue of a device."""

    steps_ahead = 1
    balance_rows = 64  # not timed on a GPU

    def __init__(
        self, model: DeviceModel, config: EngineConfig, device: Device, num_blocks: int
    ) -> None:
        """Reserve the memory that steps keep.

        Raises:
            KvMemoryError: the device cannot provide the KV memory.
        """
        self.config, self.num_blocks = model.config, num_blocks
        self.tables: Mapping[str, ValueTable] = model.tables
        self.device = device.torch_device
        self.recorder = MemoryRecorder(model.config, self.device)
        self.progress = Progress()
        for table in self.tables.values():
            table.watch(self.progress.mark)
        self._device, self._memories = device, model.memories
        self._state = DeviceState.allocate(
            model.kv_config, config, num_blocks, model.dtype, model.device
        )
        self._block_table = DeviceBlockTable(self._state.block_table_PB, device)
        shapes = model.kv_config
        splits = Splits(shapes.num_kv_heads, shapes.head_dim, device.num_processors)
        self._buckets = Buckets(config.max_num_seqs, config.max_batched_tokens, splits)
        tokens = config.max_batched_tokens
        # with logits everywhere, as for a scored prompt
        self._largest = StepShape(tokens, config.max_num_seqs, tokens, False)
        layers = patched_layers(model.config, config)
        self._micro_batches = model.micro_batches
        # of all shapes, the inputs of this one take the most memory
        split = self._largest._replace(micro_batches=self._micro_batches.limit(tokens))
        self._staging = Staging(device, InputLayout(split, len(layers)))
        self._inputs: dict[StepShape, StagedInputs] = {}  # of the shapes that have a graph
        group = shapes.num_heads // shapes.num_kv_heads
        scrap_slot = num_blocks * config.block_size
        self._writer = InputWriter(shapes.vocab_size, group, scrap_slot, layers)
        self._runner = StepRunner(model, self._state, device)
        # the results of one step are read while the next one writes
        self._results = [device.pinned((tokens,), torch.int64) for _ in range(2)]
        device.synchronize()

    @torch.inference_mode()
    def launch(self, batch: Batch) -> CudaStep:
        try:
            return self._launch(batch)
        except Exception:
            if any(batch.patches):
                # queued work may read patches that nothing keeps from now on
                self._device.record().wait()
            raise

    def _launch(self, batch: Batch) -> CudaStep:
        self.progress.mark()
        scored, traced = ScoredTokens.of(batch), TracedTokens(self.recorder.begin(batch))
        # the host may still read the other one
        chosen = self._results[0][: len(batch.rows)]

        def finish(outputs: StepOutputs) -> None:
            if scored.places:
                scored.compute(outputs, self._device)
            traced.compute(outputs, self._device)
            chosen.copy_(outputs.chosen_L[: len(chosen)], non_blocking=True)

        self._queue(batch, finish)
        self._results.reverse()
        self._count(len(batch.ids_T))
        event = self._device.record()
        return CudaStep(event, chosen, scored, traced, self.progress, batch.patches)

    @torch.inference_mode()
    def logits(self, batch: Batch) -> Tensor:
        """Run the forward; logits ``[L, vocabulary]`` at the batch's ``logits_at_L``."""
        found: list[Tensor] = []
        self._queue(batch, lambda outputs: found.append(outputs.logits_LV.clone()))
        self._device.record().wait()
        return found[0][: len(batch.logits_at_L)]

    def close(self) -> None:
        """Does nothing: it starts no process."""

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile the kernels of all buckets and capture their graphs, the largest first.

        Raises:
            ConfigError: the graphs do not fit in the device's memory.
        """
        begun, before = time.monotonic(), self._device.memory_bytes()
        try:
            self.run_largest()
            for shape in self._captured_shapes():
                # the first run of a shape compiles its kernels, also if it gets no graph
                self._queue(warm_up_batch(), lambda outputs: None, shape)
                self._device.record().wait()
                if time.monotonic() - begun < _MOST_CAPTURE_S:
                    self._capture(shape)
                else:
                    logger.warning("no graph for %s: captures took too long", shape)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                "gpu_memory_utilization: the graphs of steps do not fit in the GPU's memory; lower"
                " --gpu-memory-utilization, --max-num-seqs or --max-batched-tokens"
            ) from error
        taken, memory = time.monotonic() - begun, self._device.memory_bytes() - before
        logger.info(
            "%d graphs captured in %.1f s, in %.0f MiB", len(self._inputs), taken, memory / 2**20
        )

    def _captured_shapes(self) -> Iterator[StepShape]:
        """The buckets, the largest first, whole and in micro-batches."""
        for bucket in self._buckets:
            yield bucket
            count = self._micro_batches.most(bucket.tokens)
            if count > 1:
                yield bucket._replace(micro_batches=count)

    def _capture(self, shape: StepShape) -> None:
        inputs = self._staging.inputs(shape)
        self._runner.capture(shape, inputs.on_device)
        self._inputs[shape] = inputs

    @torch.inference_mode()
    def run_largest(self) -> None:
        """Run a step of the largest size, without a graph, and wait for it."""
        self._queue(warm_up_batch(), lambda outputs: None, self._largest)
        self._device.record().wait()

    def _queue(
        self,
        batch: Batch,
        then: Callable[[StepOutputs], None],
        shape: StepShape | None = None,
    ) -> None:
        """Send a batch, and queue its step, by default in the shape of ``_shape_of``, and what
        ``then`` launches on the outputs."""
        shape = shape or self._shape_of(batch)
        inputs = self._inputs.get(shape) or self._staging.inputs(shape)
        biases = graph_biases(batch, self.config.vocab_size)
        updates = self._block_table.updates(batch.seats, batch.block_ids)
        try:
            if len(updates) > MOST_UPDATES:
                self._block_table.send(updates[MOST_UPDATES:])
            first = updates[:MOST_UPDATES]
            self._staging.send(
                inputs,
                lambda out: self._writer.write(out, shape, batch, first, biases),
                any(batch.patches),
            )

            def finish(outputs: StepOutputs) -> None:
                if biases is None:
                    self._choose_by_rules(batch, inputs.on_device, outputs)
                then(outputs)

            self._runner.queue(shape, inputs.on_device, finish, len(batch.ids_T))
        except Exception:
            self._block_table.forget(batch.seats)
            raise

    def _shape_of(self, batch: Batch) -> StepShape:
        """The smallest bucket that has a graph, or else the exact shape; if the rows that the step
        fetches are worth it, in micro-batches."""
        exact = self._buckets.exact(batch)
        holding = self._buckets.holding(exact)
        whole = next((bucket for bucket in holding if bucket in self._inputs), exact)
        num_tokens = len(batch.ids_T)
        split = whole._replace(micro_batches=self._micro_batches.of(num_tokens))
        can_run = split in self._inputs or whole not in self._inputs
        return split if can_run and split.is_filled(num_tokens) else whole

    def _choose_by_rules(self, batch: Batch, inputs: Inputs, outputs: StepOutputs) -> None:
        """Choose again, after rules that the step itself does not apply."""
        count = len(batch.rows)
        logits_LV = outputs.logits_LV[:count].to(torch.float32, copy=True)
        apply_rules(logits_LV, batch.rows, filled_bitmask(batch, self.progress))
        choose_tokens(
            logits_LV,
            inputs["choices"][:count],
            inputs["row_seats"][:count],
            outputs.chosen_L[:count],
            self._state.last_token_P,
        )

    def _count(self, num_tokens: int) -> None:
        """Count the lookups of tables that do not count on the device: a graph calls no table."""
        for memory in self._memories:
            for table in memory.tables:
                if isinstance(table, DeviceTable | SharedTable):
                    table.count(num_tokens * memory.num_references, memory.index)
