"""The order of passages: each once per epoch, in even batches, and resumable."""

from itertools import chain

from hypothesis import given
from hypothesis import strategies as st

from weights.learning.passage_order import PassageOrder
from weights.training.packing import Passage

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def order_of(lengths, num_tokens, seed=0):
    return PassageOrder([Passage((0,) * (n + 1)) for n in lengths], num_tokens, seed)


def epoch_of(order):
    batches = [order.next()]
    while not order.is_at_epoch_end:
        batches.append(order.next())
    return batches


@given(lengths=LENGTHS, num_tokens=st.integers(1, 30))
def test_an_epoch_has_each_passage_once(lengths, num_tokens):
    order = order_of(lengths, num_tokens)
    for _ in range(3):
        batches = epoch_of(order)
        assert all(batches)
        assert sorted(chain(*batches)) == [*range(len(lengths))]
        sizes = [sum(lengths[index] for index in batch) for batch in batches]
        assert all(
            size <= num_tokens or len(batch) == 1
            for size, batch in zip(sizes, batches, strict=True)
        )


def test_batches_of_an_epoch_are_even():
    order = order_of([7] * 15 + [20] * 10 + [3] * 40, 128)
    sizes = [sum(len(order._passages[index]) for index in batch) for batch in epoch_of(order)]
    assert len(sizes) == 4 and min(sizes) > 90


@given(lengths=LENGTHS, num_tokens=st.integers(1, 30), done=st.integers(0, 9))
def test_an_order_continues_where_an_equal_one_was(lengths, num_tokens, done):
    order, other = order_of(lengths, num_tokens), order_of(lengths, num_tokens)
    for _ in range(done):
        order.next()
    other.position = order.position
    assert [order.next() for _ in range(9)] == [other.next() for _ in range(9)]


def test_epochs_and_seeds_differ():
    order = order_of([1] * 20, 99)
    first, second = epoch_of(order), epoch_of(order)
    assert first != second and first != epoch_of(order_of([1] * 20, 99, seed=1))
