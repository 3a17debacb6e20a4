"""A device on the CPU that runs queued work at once."""

import torch

from tests.engine.executors.cuda.fake_device import FakeDevice


class PromptDevice(FakeDevice):
    """A device of ranks that follow rank 0: none of rank 0's events makes their work run."""

    def queue(self, work):
        with torch.inference_mode():
            work()
