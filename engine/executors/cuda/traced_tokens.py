"""Rows read for the traced tokens of a step in flight, on their way to the host."""

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.executors.cuda.device import Device
from engine.executors.cuda.step import StepOutputs
from engine.executors.memory_recorder import StepReads, traced_rows
from engine.request import MemoryRead


class TracedTokens:
    """The copies of one step's trace, in pinned memory."""

    def __init__(self, reads: StepReads) -> None:
        self._reads = reads
        self._copies: tuple[Tensor, ...] = ()

    def compute(self, outputs: StepOutputs, device: Device) -> None:
        """Queue the counting and the copies; call it where the step's work is queued."""
        self._reads.count(outputs.trace)
        if not self._reads.places:
            return
        # pinned before it is sent: a copy from other memory would wait for the device
        wanted_P = device.pinned((len(self._reads.places),), torch.int64)
        wanted_P.copy_(self._reads.tokens_P)
        on_device_P = wanted_P.to(device.torch_device, non_blocking=True)
        found = traced_rows(outputs.trace, on_device_P)
        self._copies = tuple(device.pinned(tuple(one.shape), one.dtype) for one in found)
        for target, source in zip(self._copies, found, strict=True):
            target.copy_(source, non_blocking=True)

    def results(self) -> Mapping[int, tuple[MemoryRead, ...]]:
        """The reads by place in ``logits_at_L``, once the copies are done."""
        return self._reads.by_place(*self._copies) if self._copies else {}
