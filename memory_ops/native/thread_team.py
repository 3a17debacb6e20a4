"""The team of threads that all native libraries share (team.h)."""

import ctypes

import torch


class ThreadTeam:
    """One team for all libraries: a second one would poll on cores that the first one computes on.

    It has as many threads as torch. Its own waiting policy suits quiet and busy machines; torch's
    threads, which are OpenMP's, only run operations of plain torch.
    """

    def __init__(self) -> None:
        self._owner: ctypes.CDLL | None = None
        self._num_threads = 1

    def join(self, library: ctypes.CDLL) -> None:
        """Make a library use the team of the first one that joined."""
        for name, result, argument in (
            ("memplus_team", ctypes.c_void_p, None),
            ("memplus_join_team", None, ctypes.c_void_p),
            ("memplus_set_threads", None, ctypes.c_int64),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, () if argument is None else (argument,)
        if self._owner is None:
            self._owner = library
        else:
            library.memplus_join_team(self._owner.memplus_team())

    def use_torch_thread_count(self) -> None:
        """Make the next kernels use as many threads as torch."""
        count = torch.get_num_threads()
        if count != self._num_threads and self._owner is not None:
            self._owner.memplus_set_threads(count)
            self._num_threads = count


TEAM = ThreadTeam()
