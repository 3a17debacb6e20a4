"""Runs steps by shape: replays the shape's graph, or launches kernel by kernel without one."""

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from engine.executors.cuda.buckets import StepShape
from engine.executors.cuda.device import Device
from engine.executors.cuda.device_state import DeviceState
from engine.executors.cuda.step import DeviceModel, StepOutputs
from engine.executors.cuda.step_inputs import InputLayout
from memory_ops.tables.host import HostTable

Inputs = Mapping[str, Tensor]


class StepRunner:
    """Queues steps whose inputs have been sent to ``words``."""

    def __init__(
        self, model: DeviceModel, state: DeviceState, device: Device, words: Tensor
    ) -> None:
        self._model, self._state, self._device, self._words = model, state, device, words
        self._graphs: dict[StepShape, CapturedStep] = {}
        tables = model.tables.values()
        self._host_tables = [table for table in tables if isinstance(table, HostTable)]

    def capture(self, shape: StepShape) -> None:
        """Capture a graph for a shape that has run before."""
        inputs = InputLayout(shape).tensors(self._words)
        self._graphs[shape] = CapturedStep(
            self._device, lambda: self._model.run(inputs, shape, self._state)
        )

    def captured(self, shapes: Iterable[StepShape]) -> StepShape | None:
        """The first of these shapes that has a graph."""
        return next((shape for shape in shapes if shape in self._graphs), None)

    def queue(self, shape: StepShape, then: Callable[[Inputs, StepOutputs], None]) -> None:
        """Queue a step, and then the kernels and copies that ``then`` launches on its outputs."""
        inputs = InputLayout(shape).tensors(self._words)
        graph = self._graphs.get(shape)

        def work() -> None:
            # a replay is ordered by its own stream alone
            for table in self._host_tables:
                table.join()
            if graph is None:
                outputs = self._model.run(inputs, shape, self._state)
            else:
                outputs = graph.replay()
            then(inputs, outputs)

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
