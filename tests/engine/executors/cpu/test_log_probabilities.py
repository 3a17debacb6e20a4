"""Log-probabilities in every native build and in torch, against fp64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.executors.cpu.kernels import CPU_LIBRARY, CpuKernels
from engine.sampling.log_probabilities import score as score_by_torch
from engine.sampling.log_probabilities import score_tokens

SCORERS = {build: CpuKernels(build).log_probabilities for build in CPU_LIBRARY.runnable_builds}
SCORERS["torch"] = score_by_torch
each_scorer = pytest.mark.parametrize("score", SCORERS.values(), ids=SCORERS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@each_scorer
@each_dtype
@given(
    size=st.one_of(st.integers(1, 40), st.integers(200, 1100), st.just(6000)),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    banned=st.lists(st.integers(0, 5999), max_size=100),
    num_best=st.integers(0, 20),
    seed=st.integers(0, 99),
)
def test_they_equal_the_log_softmax(score, dtype, size, scale, banned, num_best, seed):
    generator = torch.Generator().manual_seed(seed)
    logits_LV = (torch.randn(4, size, generator=generator) * scale).to(dtype)
    logits_LV[1:3, [place % size for place in banned]] = -torch.inf
    logits_LV[:, size // 2] = 1.0
    rows, token_ids = [3, 0, 0, 2, 1, 1], [0, size - 1, size // 3, size // 2, 0, size - 1]
    num_best = min(num_best, size)
    scores = score(logits_LV, rows, token_ids, num_best)
    exact_PV = logits_LV[rows].double().log_softmax(-1)
    own_P1 = exact_PV.gather(1, torch.tensor(token_ids)[:, None])
    close = {"rtol": 1e-6, "atol": 1e-5}
    torch.testing.assert_close(scores.own_P.double(), own_P1.squeeze(1), **close)
    assert torch.equal(scores.ranks_P, (exact_PV > own_P1).sum(-1) + 1)
    best_PK = exact_PV.topk(num_best).values
    torch.testing.assert_close(scores.best_PK.double(), best_PK, **close)
    # equal values may come in any order, each token once
    assert torch.equal(exact_PV.gather(1, scores.best_ids_PK), best_PK)
    assert all(len(set(ids)) == num_best for ids in scores.best_ids_PK.tolist())


@each_scorer
@each_dtype
def test_a_row_does_not_depend_on_its_batch(score, dtype):
    logits_LV = torch.randn(12, 3000).to(dtype)
    rows, token_ids = [*range(12)], [7 * i for i in range(12)]
    together = score(logits_LV, rows, token_ids, 5)
    for i in rows:
        alone = score(logits_LV[i : i + 1], [0], [token_ids[i]], 5)
        for some, one in zip(together, alone, strict=True):
            assert torch.equal(some[i], one[0])


@each_scorer
@each_dtype
@pytest.mark.parametrize("size", [4, 300, 9000])
def test_nan_and_infinity_do_not_affect_other_rows(score, dtype, size):
    logits_LV = torch.randn(5, size).to(dtype)
    wanted = score(logits_LV[[0]], [0], [1], 3)
    logits_LV[1], logits_LV[2], logits_LV[3, 2], logits_LV[4, 2] = (
        torch.nan,
        -torch.inf,
        torch.nan,
        torch.inf,
    )
    scores = score(logits_LV, [*range(5)], [1] * 5, 3)
    for some, one in zip(scores, wanted, strict=True):
        assert torch.equal(some[0], one[0])
    assert scores.own_P[1:4].isnan().all() and scores.own_P[4] == -torch.inf
    assert ((scores.best_ids_PK >= 0) & (scores.best_ids_PK < size)).all()


@pytest.mark.parametrize("build", CPU_LIBRARY.runnable_builds)
def test_equal_tokens_come_in_order_of_id(build):
    logits_LV = torch.zeros(1, 2000)
    logits_LV[0, [1500, 1600, 40]] = 1.0
    scores = SCORERS[build](logits_LV, [0], [1999], 6)
    assert scores.best_ids_PK.tolist() == [[40, 1500, 1600, 0, 1, 2]]
    assert scores.ranks_P.tolist() == [4]


def test_rows_and_ids_stay_on_their_device():
    # a meta tensor has no values: to read one, as a wait for a device does, raises an error
    logits_LV = torch.empty(5, 40, dtype=torch.bfloat16, device="meta")
    rows_P, token_ids_P = torch.empty(2, 3, dtype=torch.int64, device="meta")
    scores = score_tokens(logits_LV, rows_P, token_ids_P, 2)
    assert [tuple(column.shape) for column in scores] == [(3,), (3,), (3, 2), (3, 2)]
