"""A group of training processes in the threads of one process, without a network."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from weights.training.replicas import Replicas


class ThreadReplicas(Replicas):
    """One member of a group of threads."""

    def __init__(self, rank, count, barrier, slots):
        super().__init__(rank, count)
        self.barrier, self.slots = barrier, slots

    def meet(self, value):
        """The values of all members."""
        self.slots[self.rank] = value
        self.barrier.wait()
        values = list(self.slots)
        self.barrier.wait()
        return values

    def reduce(self, tensor, operation, *, is_patient=False):
        stacked = torch.stack(self.meet(tensor.clone()))
        is_sum = operation == torch.distributed.ReduceOp.SUM
        tensor.copy_(stacked.sum(dim=0) if is_sum else stacked.amax(dim=0))

    def sum_all(self, tensors):
        for tensor in tensors:
            self.reduce(tensor, torch.distributed.ReduceOp.SUM)

    def all_gather(self, parts, part):
        for one, found in zip(parts, self.meet(part.clone()), strict=True):
            one.copy_(found)

    def broadcast(self, tensor):
        tensor.copy_(self.meet(tensor.clone())[0])

    def swap_bytes(self, received, sent, sizes, sent_sizes):
        arrived = [one.split(lengths)[self.rank] for one, lengths in self.meet((sent, sent_sizes))]
        assert [len(one) for one in arrived] == sizes
        torch.cat(arrived, out=received)


def in_group(count, work):
    """Results of ``work(replicas)`` of all members; raises the error of the first that failed."""
    barrier, slots = threading.Barrier(count), [None] * count

    def member(rank):
        try:
            return work(ThreadReplicas(rank, count, barrier, slots))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(member, rank) for rank in range(count)]
    errors = [one.exception() for one in futures if one.exception() is not None]
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    assert not errors, errors
    return [one.result() for one in futures]
