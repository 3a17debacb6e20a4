"""The products of rows with a weight against their twin and fp64."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from inspect import signature

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from engine.executors.cuda.kernels import linear as module
from engine.executors.cuda.kernels.linear import linear, linear_reference, wide_linear
from engine.executors.cuda.kernels.linear_operands import LinearOperands
from engine.executors.cuda.kernels.narrow_product import narrow_linear, num_splits
from engine.executors.cuda.kernels.product_tiles import PRODUCT_LAUNCHES, launch_for
from engine.model.grouped_weights import (
    GroupFormat,
    WeightGroups,
    dense_weights,
    group_weights,
)
from engine.model.norm import rms_norm
from tests.engine.executors.cuda.group_cases import FORMATS, rounded
from tests.engine.executors.cuda.padded import (
    DTYPES,
    FEW_DTYPES,
    between_nans,
    check_close,
)

pytestmark = pytest.mark.slow

EPS = 1e-5
FUNCTIONS = (narrow_linear, wide_linear)


@dataclass(frozen=True)
class Case:
    """Shape and options of one product."""

    rows: int
    width: int
    outputs: int
    dtype: torch.dtype = torch.float32
    has_bias: bool = False
    has_norm: bool = False
    has_residual: bool = False
    is_gated: bool = False
    groups: GroupFormat | None = None

    def operands(self) -> LinearOperands:
        """Random operands, each matrix between NaNs."""
        num_columns = self.outputs * (1 + self.is_gated)
        x = torch.randn(self.rows, self.width) * (3 if self.has_norm else 1)
        # small values, because rounding within a sum adds to its absolute error
        weight = torch.randn(num_columns, self.width) / (4 * self.width**0.5)
        bias, norm = torch.randn(num_columns) / 4, torch.rand(self.width).to(self.dtype) + 0.5
        residual = torch.randn(self.rows, self.outputs) / 4
        return LinearOperands(
            between_nans(x.to(self.dtype)),
            between_nans(weight.to(self.dtype))
            if self.groups is None
            else rounded(self.groups, weight),
            bias.to(self.dtype) if self.has_bias else None,
            (norm, EPS) if self.has_norm else None,
            between_nans(residual.to(self.dtype)) if self.has_residual else None,
            self.is_gated,
        )


def exact(operands: LinearOperands) -> Tensor:
    """The result in fp64."""

    def wide(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.double()

    norm = operands.norm and (operands.norm[0].double(), operands.norm[1])
    tensors = operands.x_MK, operands.bias_N, operands.residual_MO
    x, bias, residual = map(wide, tensors)
    weight = operands.weight_NK
    if isinstance(weight, WeightGroups):
        # kernels round them to the dtype of x
        weight = dense_weights(weight, x.shape[1], operands.x_MK.dtype)
    weight = weight.double()
    return linear_reference(LinearOperands(x, weight, bias, norm, residual, operands.is_gated))


def check(case: Case, function=narrow_linear) -> None:
    operands = case.operands()
    result = function(operands)
    assert result.dtype == case.dtype
    assert result.shape == (case.rows, case.outputs)
    check_close(result, exact(operands), case.dtype)
    check_close(result, linear_reference(operands), case.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("rows", [0, 1, 7, 16, 33, 64])
def test_rows_of_any_number(rows, function, dtype):
    check(Case(rows, 100, 17, dtype), function)


@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("outputs", [1, 17, 96, 1000])
@pytest.mark.parametrize("width", [8, 100, 576, 1000])
def test_ragged_shapes(width, outputs, is_gated):
    check(Case(3, width, outputs, torch.bfloat16, has_norm=True, is_gated=is_gated))


LAUNCHES = [(is_gated, launch) for is_gated, row in PRODUCT_LAUNCHES.items() for _, launch in row]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("is_gated", "launch"), LAUNCHES)
def test_every_launch_of_the_table(is_gated, launch, dtype, monkeypatch):
    monkeypatch.setitem(PRODUCT_LAUNCHES, is_gated, ((0, launch),))
    check(Case(2, 136, 300, dtype, has_norm=True, is_gated=is_gated))


def cases(widths: Sequence[int], outputs: Sequence[int]) -> st.SearchStrategy[Case]:
    return st.builds(
        Case,
        rows=st.sampled_from([0, 1, 7, 16, 33, 64]),
        width=st.sampled_from(widths),
        outputs=st.sampled_from(outputs),
        dtype=st.sampled_from(DTYPES),
        has_bias=st.booleans(),
        has_norm=st.booleans(),
        has_residual=st.booleans(),
        is_gated=st.booleans(),
        groups=st.sampled_from([None, *FORMATS]),
    )


@example(Case(7, 2048, 500, torch.bfloat16, True, True, True, True, FORMATS[2]))
@given(cases([8, 100, 576, 2048], [1, 17, 96]))
def test_all_options_together(case):
    torch.manual_seed(20)
    check(case)


# torch's products of fp16 round before the gate, which minimums would make too large. The kernel
# that makes groups dense has its own tests, with wide weights.
@given(
    cases([8, 100, 576], [1, 17, 96]).filter(
        lambda case: case.groups is None or not case.groups.has_minimums
    )
)
def test_all_options_of_torch_products(case):
    torch.manual_seed(20)
    check(case, wide_linear)


@pytest.mark.parametrize("dtype", FEW_DTYPES)
@pytest.mark.parametrize("is_gated", [False, True])
def test_a_long_sum_for_few_columns_is_split(is_gated, dtype):
    case = Case(5, 4100, 20, dtype, True, True, True, is_gated)
    x = case.operands().x_MK
    assert num_splits(launch_for(x, 20, 16, is_gated=is_gated), 20, 4100) == 4
    check(case)
    check(replace(case, groups=GroupFormat(4, has_minimums=True)))


# in fp32 the blocks of k are shorter than those of dense weights
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("width", [32, 100, 136, 576])
def test_weights_of_8_bits_have_the_bits_of_their_dense_copy(width, is_gated, dtype):
    operands = Case(3, width, 17, dtype, True, True, True, is_gated, GroupFormat(8)).operands()
    dense = dense_weights(operands.weight_NK, width, dtype)
    wanted = narrow_linear(replace(operands, weight_NK=dense))
    assert torch.equal(narrow_linear(operands), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
# one block; several; parts of K
@pytest.mark.parametrize(("width", "outputs"), [(100, 17), (1000, 40), (2048, 3)])
# the fewest and the most rows of each block
@pytest.mark.parametrize(
    ("few", "rows"),
    [(1, 16), (17, 32), (33, 64)],
)
def test_a_row_does_not_depend_on_the_others(few, rows, width, outputs, dtype):
    operands = Case(rows, width, outputs, dtype, True, True, True).operands()
    together = narrow_linear(operands)
    assert torch.equal(together, narrow_linear(operands))
    for first in (0, rows - few):
        part = slice(first, first + few)
        x, residual = operands.x_MK[part], operands.residual_MO[part]
        apart = narrow_linear(replace(operands, x_MK=x, residual_MO=residual))
        assert torch.equal(apart, together[part])


@pytest.mark.parametrize("groups", FORMATS, ids=str)
# one block; parts of K
@pytest.mark.parametrize(("width", "outputs"), [(100, 17), (2048, 3)])
def test_a_row_times_groups_does_not_depend_on_the_others(width, outputs, groups):
    dtype = torch.bfloat16
    operands = Case(16, width, outputs, dtype, has_norm=True, groups=groups).operands()
    together = narrow_linear(operands)
    for row in (0, 15):
        apart = narrow_linear(replace(operands, x_MK=operands.x_MK[row : row + 1]))
        assert torch.equal(apart[0], together[row])


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("has_out", [False, True])
@pytest.mark.parametrize("outputs", [1, 14, 17])
def test_a_large_weight_in_groups_is_made_dense_in_parts(outputs, has_out, has_norm, monkeypatch):
    case = Case(5, 100, outputs, torch.bfloat16, has_norm=has_norm, groups=FORMATS[1])
    operands = case.operands()
    out = torch.full((5, outputs), torch.nan) if has_out else None
    sizes, widen = [], module.widen_groups

    def watched(groups, *arguments):
        sizes.append(groups.num_outputs)
        return widen(groups, *arguments)

    monkeypatch.setattr(module, "DENSE_PART", 7 * 100)
    monkeypatch.setattr(module, "widen_groups", watched)
    found = wide_linear(replace(operands, out_MO=out))
    assert out is None or found is out
    check_close(found, exact(operands), torch.bfloat16)
    assert max(sizes) <= 7 and sum(sizes) == outputs


def test_other_rows_may_hold_nan():
    operands = Case(9, 100, 17, has_norm=True).operands()
    clean = narrow_linear(operands)
    operands.x_MK[4] = torch.nan
    result = narrow_linear(operands)
    assert result[4].isnan().all()
    result[4] = clean[4]
    assert torch.equal(result, clean)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("width", [100, 2048])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_residual_is_updated_in_place(has_bias, width, function):
    case = Case(7, width, 17, torch.bfloat16, has_bias, has_residual=True)
    operands = case.operands()
    wanted, residual = exact(operands), operands.residual_MO
    assert function(replace(operands, out_MO=residual)) is residual
    check_close(residual, wanted, case.dtype)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_result_goes_to_out_alone(function, is_gated, has_bias):
    operands = Case(7, 100, 17, has_bias=has_bias, is_gated=is_gated).operands()
    memory = torch.full((7, 30), 5.0)
    out = memory[:, 4:21]
    assert function(replace(operands, out_MO=out)) is out
    check_close(out, exact(operands), torch.float32)
    assert (memory[:, :4] == 5).all() and (memory[:, 21:] == 5).all()


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_wide_result_is_not_rounded_to_the_dtype_of_x(function, has_norm):
    operands = Case(7, 100, 17, torch.bfloat16, has_norm=has_norm).operands()
    out = torch.empty(7, 17)
    function(replace(operands, out_MO=out))
    # the norm itself rounds
    tolerance = torch.bfloat16 if has_norm else torch.float32
    check_close(out, exact(operands), tolerance)
    assert not torch.equal(out, out.bfloat16().float())


@pytest.mark.parametrize("is_small", [False, True])
def test_shapes_choose_the_code_of_dense_products(monkeypatch, is_small):
    chosen = []
    for name in ("narrow_linear", "wide_linear"):
        monkeypatch.setattr(module, name, lambda *_, _name=name, **__: chosen.append(_name))
    width = 8 if is_small else module.SMALL_WEIGHT
    most = 64 if is_small else module.MOST_ROWS
    for rows in (0, 1, most, most + 1, 4096):
        row = torch.zeros(1, width)
        x, weight = row.expand(rows, width), row.expand(3, width)
        linear(LinearOperands(x, weight))
    assert chosen == ["narrow_linear"] * 3 + ["wide_linear"] * 2


def test_groups_are_multiplied_as_they_are_up_to_64_rows(monkeypatch):
    chosen = []
    for name in ("narrow_linear", "wide_linear"):
        monkeypatch.setattr(module, name, lambda *_, _name=name, **__: chosen.append(_name))
    monkeypatch.setattr(module, "SMALL_WEIGHT", 0)
    weight = group_weights(torch.randn(3, 32), 8)
    for rows in (1, 64, 65):
        linear(LinearOperands(torch.zeros(rows, 32), weight))
    assert chosen == ["narrow_linear"] * 2 + ["wide_linear"]


def test_the_functions_have_one_signature():
    for function in (linear, narrow_linear, wide_linear):
        assert signature(function) == signature(linear_reference)


def test_the_twin_is_the_models_norm_and_product():
    operands = Case(5, 100, 17, has_norm=True).operands()
    normed = rms_norm(operands.x_MK, *operands.norm)
    wanted = normed @ operands.weight_NK.t()
    check_close(linear_reference(operands), wanted, torch.float32)


def test_products_refuse_operands_that_do_not_match():
    x, weight = torch.zeros(2, 8), torch.zeros(3, 8)
    residual = torch.zeros(2, 3)
    refused = [
        ("x: expected", (x.double(), weight.double()), {}),
        ("x: expected", (torch.zeros(8, 2).t(), weight), {}),
        ("weight: expected", (x, torch.zeros(3, 9)), {}),
        ("weight: expected", (x, weight.half()), {}),
        ("weight: 3 rows", (x, weight), {"is_gated": True}),
        ("bias: expected", (x, weight), {"bias_N": torch.zeros(8)}),
        ("bias: expected torch.float32", (x, weight), {"bias_N": torch.zeros(3).half()}),
        ("norm: expected", (x, weight), {"norm": (torch.zeros(3), EPS)}),
        ("residual: expected", (x, weight), {"residual_MO": torch.zeros(2, 8)}),
        ("residual: expected torch.float32", (x, weight), {"residual_MO": residual.half()}),
        ("out: expected", (x, weight), {"out_MO": torch.zeros(3, 3)}),
        ("out: expected one of", (x, weight), {"out_MO": residual.half()}),
        (
            "out: expected one of",
            (x.half(), weight.half()),
            {"bias_N": torch.zeros(3).half(), "out_MO": residual},
        ),
    ]
    groups = group_weights(torch.zeros(3, 8), 4)
    for name, array in groups.tensors.items():
        for wrong in (array[:, :0], array.double(), array[::2]):
            broken = groups._replace(
                **{"weight": {"values": wrong}}.get(name, {"scales_OG": wrong})
            )
            refused.append((f"weight: expected contiguous .* as {name}", (x, broken), {}))
    for message, matrices, options in refused:
        with pytest.raises(ValueError, match=message):
            linear(LinearOperands(*matrices, **options))
