"""The queue of waiting sequences: its order, and removal by request id."""

from hypothesis import given
from hypothesis import strategies as st

from engine.request import Request
from engine.sampling.params import SamplingParams
from engine.scheduling.sequence import Sequence
from engine.scheduling.waiting_queue import WaitingQueue

PARAMS = SamplingParams(max_tokens=1)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 30)), max_size=30),
    st.lists(st.integers(0, 40)),
)
def test_it_is_a_sorted_list_of_what_was_added_and_not_removed(added, removed):
    queue, expected = WaitingQueue(), {}
    for arrival, (step, name) in enumerate(added):
        if str(name) not in expected:  # unfinished requests have different names
            sequence = Sequence(Request(str(name), (1,), PARAMS), 0, (step, arrival))
            queue.add(sequence)
            expected[str(name)] = sequence
    for name in removed:
        queue.remove(str(name))
        expected.pop(str(name), None)
        assert list(queue) == sorted(expected.values(), key=lambda one: one.turn)
        assert len(queue) == len(expected)


class CountedTurn(tuple):
    """A turn that counts its comparisons."""

    count = 0

    def __lt__(self, other):
        CountedTurn.count += 1
        return tuple(self) < tuple(other)


def test_a_deep_queue_is_emptied_with_few_comparisons():
    queue, size = WaitingQueue(), 4096
    for number in range(size):
        request = Request(str(number), (1,), PARAMS)
        queue.add(Sequence(request, 0, CountedTurn((0, number))))
    CountedTurn.count = 0
    for number in range(size):
        queue.remove(str(number * 1237 % size))
    assert not len(queue) and CountedTurn.count <= size * 13
