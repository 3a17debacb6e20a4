"""Copies a step's inputs to the device from two alternating pinned buffers."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from engine.executors.cuda.buckets import StepShape
from engine.executors.cuda.device import Device, DeviceEvent
from engine.executors.cuda.step_inputs import HostInputs, InputLayout

_BUFFERS = 2


class StagedInputs:
    """The inputs of one shape in all buffers.

    Attributes:
        num_words: 64-bit words to send.
        num_words_without_uses: those to send if no token uses a patch.
        on_host: views of each pinned buffer.
        on_device: views of the buffer on the device.
    """

    def __init__(self, layout: InputLayout, pinned: list[Tensor], words: Tensor) -> None:
        self.num_words = layout.num_words
        self.num_words_without_uses = layout.num_words_without_uses
        self.on_host: list[HostInputs] = [
            {name: view.numpy() for name, view in layout.views(one).items()} for one in pinned
        ]
        self.on_device = layout.views(words)


class Staging:
    """Buffers of 64-bit words: two on the host, used alternately, and one on the device."""

    def __init__(self, device: Device, largest: InputLayout) -> None:
        """``largest`` is the layout of the largest shape; all have the same inputs."""
        self._device, self._largest, num_words = device, largest, largest.num_words
        self._pinned = [device.pinned((num_words,), torch.int64) for _ in range(_BUFFERS)]
        self._words = torch.zeros(num_words, dtype=torch.int64, device=device.torch_device)
        self._sent: list[DeviceEvent | None] = [None] * _BUFFERS
        self._next = 0

    def inputs(self, shape: StepShape) -> StagedInputs:
        """The inputs of steps of this shape."""
        return StagedInputs(replace(self._largest, shape=shape), self._pinned, self._words)

    def send(
        self, inputs: StagedInputs, write: Callable[[HostInputs], None], has_patches: bool = False
    ) -> None:
        """Let ``write`` fill inputs on the host, and queue their copy to the device.

        Without ``has_patches``, the device keeps the uses of an earlier step; spans must be empty.
        """
        index, self._next = self._next, (self._next + 1) % _BUFFERS
        sent = self._sent[index]
        if sent is not None:
            sent.wait()
        write(inputs.on_host[index])
        count = inputs.num_words if has_patches else inputs.num_words_without_uses
        words, pinned = self._words[:count], self._pinned[index][:count]
        self._device.queue(lambda: _copy(words, pinned))
        self._sent[index] = self._device.record()


def _copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source, non_blocking=True)
