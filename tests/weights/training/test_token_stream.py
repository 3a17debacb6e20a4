"""Token streams: files of tokenised documents, shuffling, splitting and resuming."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weights.errors import DataError
from weights.training.token_file import TokenFile
from weights.training.token_stream import TokenStream


def numbered(lengths):
    """Documents whose tokens encode document and position."""
    firsts = [100 * number for number in range(len(lengths))]
    return [[*range(first, first + length)] for first, length in zip(firsts, lengths, strict=True)]


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    def write(lengths, vocab_size=1000):
        return TokenFile.write(tmp_path_factory.mktemp("d") / "t", numbered(lengths), vocab_size)

    return write


LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=9).filter(lambda of: max(of) > 1)


@given(lengths=LENGTHS, sequence_length=st.integers(1, 10), batch=st.integers(1, 20))
def test_an_epoch_has_every_pair_of_adjacent_tokens_once(make, lengths, sequence_length, batch):
    stream = TokenStream(make(lengths), sequence_length, seed=1)
    pairs = []
    total = sum(max(length - 1, 0) for length in lengths)
    while len(pairs) < total:
        got = stream.next(batch)
        assert got.starts[-1] == len(got.ids_T) == batch
        for start, end in zip(got.starts, got.starts[1:], strict=False):
            assert 0 < end - start <= sequence_length
            assert (got.positions_T[start:end] == np.arange(end - start)).all()
            # tokens of one document, in order
            assert (got.ids_T[start:end] == got.ids_T[start] + np.arange(end - start)).all()
        assert (got.targets_T == got.ids_T + 1).all()
        pairs += got.ids_T.tolist()
    wanted = [token for document in numbered(lengths) for token in document[:-1]]
    assert sorted(pairs[:total]) == wanted


@given(lengths=LENGTHS, before=st.integers(0, 50), batch=st.integers(1, 20))
def test_a_stream_resumes_from_any_position(make, lengths, before, batch):
    tokens = make(lengths)
    stream, twin = (TokenStream(tokens, 4, seed=2) for _ in range(2))
    stream.next(before)
    twin.seek(stream.position)
    wanted, found = stream.next(batch), twin.next(batch)
    assert (found.ids_T == wanted.ids_T).all() and found.starts == wanted.starts


@given(lengths=LENGTHS, batch=st.integers(1, 40), count=st.integers(1, 5))
def test_parts_of_a_batch_are_whole_sequences_and_cover_the_batch(make, lengths, batch, count):
    whole = TokenStream(make(lengths), 4, seed=2).next(batch)
    parts = [whole.part(rank, count) for rank in range(count)]
    for name in ("ids_T", "targets_T", "positions_T"):
        joined = np.concatenate([getattr(part, name) for part in parts])
        assert (joined == getattr(whole, name)).all()
    ends, done = [0], 0
    for part in parts:
        assert part.starts[0] == 0 and part.starts[-1] == len(part.ids_T)
        ends += [done + start for start in part.starts[1:]]
        done += part.starts[-1]
    assert tuple(ends) == whole.starts
    # no part exceeds its share by more than one sequence
    longest = max(np.diff(whole.starts))
    assert max(len(part.ids_T) for part in parts) <= batch / count + longest


def test_the_average_context_of_a_token(make):
    assert TokenStream(make([3, 6]), 4, seed=0).mean_attended == (3 + 10 + 1) / (2 + 4 + 1)


def test_epochs_and_seeds_have_different_orders(make):
    tokens = make([3] * 50)
    first, second, other = (TokenStream(tokens, 9, seed) for seed in (1, 1, 2))
    one, two = first.next(100).ids_T, first.next(100).ids_T
    assert sorted(one) == sorted(two) and one.tolist() != two.tolist()
    assert (second.next(100).ids_T == one).all()
    assert other.next(100).ids_T.tolist() != one.tolist()


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_the_vocabulary_size_sets_the_bytes_per_token(make, vocab_size, dtype):
    tokens = make([2, 3], vocab_size)
    assert tokens.ids.dtype == dtype and tokens.ids.tolist() == [0, 1, 100, 101, 102]
    assert len(tokens) == 2


def test_damaged_files_are_refused(make, tmp_path):
    with pytest.raises(DataError, match="no documents"):
        TokenFile.write(tmp_path / "empty", [], 9)
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="no tokenised documents"):
        TokenFile(tmp_path)
    TokenFile.write(tmp_path / "t", [[1, 2, 3]], 9)
    (tmp_path / "t" / "tokens.bin").write_bytes(b"\0\0")
    with pytest.raises(DataError, match="has 1 tokens"):
        TokenFile(tmp_path / "t")
    with pytest.raises(DataError, match="data.train: no document has two tokens"):
        make([1, 0, 1]).check_pairs("data.train")
