"""Runs steps by shape: replays the shape's graph, or launches kernel by kernel without one."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack

from torch import Tensor

from engine.executors.cuda.buckets import StepShape
from engine.executors.cuda.device import Device
from engine.executors.cuda.device_state import DeviceState
from engine.executors.cuda.step import DeviceModel, StepOutputs
from memory_ops.tables.gpu_disk import GpuDiskTable
from memory_ops.tables.host import HostTable
from memory_ops.tables.host_calls import Cut, HostCalls

Inputs = Mapping[str, Tensor]


class StepRunner:
    """Queues steps whose inputs have been sent."""

    def __init__(self, model: DeviceModel, state: DeviceState, device: Device) -> None:
        self._model, self._state, self._device = model, state, device
        self._graphs: dict[StepShape, CapturedStep] = {}
        tables = model.tables.values()
        self._host_tables = [table for table in tables if isinstance(table, HostTable)]
        self._disk_tables = [table for table in tables if isinstance(table, GpuDiskTable)]

    def capture(self, shape: StepShape, inputs: Inputs) -> None:
        """Capture a graph for a shape that has run before, which reads these inputs."""
        self._graphs[shape] = CapturedStep(
            self._device,
            lambda: self._model.run(inputs, shape, self._state),
            {table.calls for table in self._disk_tables},
        )

    def free_graphs(self) -> None:
        """Free all graphs; steps run without one from now on."""
        self._graphs.clear()

    def queue(
        self,
        shape: StepShape,
        inputs: Inputs,
        then: Callable[[StepOutputs], None],
        num_tokens: int,
    ) -> None:
        """Queue a step of ``num_tokens`` tokens without padding, and then the kernels and copies
        that ``then`` launches on its outputs."""
        graph = self._graphs.get(shape)

        def work() -> None:
            # a replay is ordered by its own stream alone
            for table in self._host_tables:
                table.join()
            # an earlier step may have failed before its rows were there
            for disk_table in self._disk_tables:
                disk_table.recover()
            with self._model.micro_batches.watched(num_tokens):
                if graph is None:
                    outputs = self._model.run(inputs, shape, self._state)
                else:
                    outputs = graph.replay()
            then(outputs)

        self._device.queue(work)


class CapturedStep:
    """A step's graph, and its outputs in the graph's memory.

    Where a table on disk needs the host, the graph is cut.
    """

    def __init__(
        self, device: Device, run: Callable[[], StepOutputs], calls: Iterable[HostCalls]
    ) -> None:
        self._run, self._calls = run, calls
        self._outputs: StepOutputs | None = None
        self._replay = device.capture(self._record)

    def replay(self) -> StepOutputs:
        """Replay the graph where work is queued."""
        self._replay()
        assert self._outputs is not None
        return self._outputs

    def _record(self, cut: Cut) -> None:
        with ExitStack() as captures:
            for calls in self._calls:
                captures.enter_context(calls.capture(cut))
            self._outputs = self._run()
