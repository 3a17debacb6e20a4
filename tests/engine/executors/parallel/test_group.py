"""The collectives of tensor-parallel ranks against plain sums and concatenations."""

import pytest
import torch

from engine.executors.parallel import shared_memory
from engine.executors.parallel.group import RankLostError
from tests.conftest import TOLERANCE
from tests.engine.executors.parallel.rank_threads import run_ranks


@pytest.fixture(params=["shared memory", "gloo"])
def way(request, monkeypatch):
    """The transport of the collectives: shared memory or gloo."""
    if request.param == "gloo":
        monkeypatch.setattr(shared_memory, "is_available", lambda: False)
    elif not shared_memory.is_available():
        pytest.skip("built without a compiler")
    return request.param


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_collectives_equal_sums_and_concatenations(size, dtype, way):
    parts = torch.randn(size, 5, 6 * size).to(dtype)

    def work(group):
        x = parts[group.rank]
        return group.sum(x.clone()), group.gather_columns(x), group.exchange_columns(x)

    results = run_ranks(size, work)
    relative, absolute = TOLERANCE[dtype]
    for rank, (total, gathered, own) in enumerate(results):
        expected = parts.float().sum(0).to(dtype)
        torch.testing.assert_close(total, expected, rtol=relative, atol=4 * absolute)
        # the ranks must choose the same rows, so they need the same bits
        assert torch.equal(total, results[0][0])
        assert torch.equal(gathered, torch.cat(list(parts), dim=1))
        columns = expected[:, 6 * rank : 6 * (rank + 1)]
        torch.testing.assert_close(own, columns, rtol=relative, atol=4 * absolute)


def test_results_outlive_later_collectives_of_any_size(way, monkeypatch):
    monkeypatch.setattr("engine.executors.parallel.group.MOST_BYTES", 64)

    def work(group):
        results = []
        for count in (3, 40, 1, 16, 17, 2, 2):  # 16 fit into 64 bytes
            x = torch.arange(2.0 * count).view(2, count) + group.rank
            results.append((group.sum(x.clone()), group.gather_columns(x)))
        return results

    for found in run_ranks(2, work):
        for total, gathered in found:
            x = torch.arange(float(total.numel())).view(total.shape)
            assert torch.equal(total, 2 * x + 1)
            assert torch.equal(gathered, torch.cat([x, x + 1], dim=1))


def test_a_rank_whose_partner_has_left_gets_an_error(way):
    def work(group):
        if group.rank == 1:
            if way == "gloo":
                group._group.shutdown()
            else:
                group.leave()
            return
        with pytest.raises(RankLostError, match="exchange between tensor-parallel ranks failed"):
            # some sums may still succeed from what was sent before
            for _ in range(100):
                group.sum(torch.ones(2))

    assert run_ranks(2, work) == [None, None]
