"""Runs steps by shape: replays the shape's graph, or launches kernel by kernel without one."""

from collections.abc import Callable, Mapping

from torch import Tensor

from engine.executors.cuda.buckets import StepShape
from engine.executors.cuda.device import Device
from engine.executors.cuda.device_state import DeviceState
from engine.executors.cuda.step import DeviceModel, StepOutputs
from memory_ops.tables.host import HostTable

Inputs = Mapping[str, Tensor]


class StepRunner:
    """Queues steps whose inputs have been sent."""

    def __init__(self, model: DeviceModel, state: DeviceState, device: Device) -> None:
        self._model, self._state, self._device = model, state, device
        self._graphs: dict[StepShape, CapturedStep] = {}
        tables = model.tables.values()
        self._host_tables = [table for table in tables if isinstance(table, HostTable)]

    def capture(self, shape: StepShape, inputs: Inputs) -> None:
        """Capture a graph for a shape that has run before, which reads these inputs."""
        self._graphs[shape] = CapturedStep(
            self._device, lambda: self._model.run(inputs, shape, self._state)
        )

    def queue(self, shape: StepShape, inputs: Inputs, then: Callable[[StepOutputs], None]) -> None:
        """Queue a step, and then the kernels and copies that ``then`` launches on its outputs."""
        graph = self._graphs.get(shape)

        def work() -> None:
            # a replay is ordered by its own stream alone
            for table in self._host_tables:
                table.join()
            if graph is None:
                outputs = self._model.run(inputs, shape, self._state)
            else:
                outputs = graph.replay()
            then(outputs)

        self._device.queue(work)


class CapturedStep:
    """A step's graph, and its outputs in the graph's memory."""

    def __init__(self, device: Device, run: Callable[[], StepOutputs]) -> None:
        self._run = run
        self._outputs: StepOutputs | None = None
        self._replay = device.capture(self._record)

    def replay(self) -> StepOutputs:
        """Replay the graph where work is queued."""
        self._replay()
        assert self._outputs is not None
        return self._outputs

    def _record(self) -> None:
        self._outputs = self._run()
