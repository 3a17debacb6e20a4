"""The products of rows with a weight against their twin and fp64."""

from dataclasses import dataclass
from inspect import signature
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.executors.cuda.kernels import linear as module
from engine.executors.cuda.kernels.linear import (
    linear,
    linear_reference,
    narrow_linear,
    wide_linear,
)
from engine.executors.cuda.kernels.narrow_product import num_splits
from engine.executors.cuda.kernels.product_tiles import PRODUCT_LAUNCHES, launch_for
from engine.model.norm import rms_norm
from tests.engine.executors.cuda.padded import (
    DTYPES,
    between_nans,
    check_close,
)

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
    is_wide: bool = False

    def operands(self) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
        """Positional and keyword arguments, each matrix between NaNs."""
        num_columns = self.outputs * (1 + self.is_gated)
        x = torch.randn(self.rows, self.width) * (3 if self.has_norm else 1)
        # small values, because rounding within a sum adds to its absolute error
        weight = torch.randn(num_columns, self.width) / (4 * self.width**0.5)
        options: dict[str, Any] = {"is_gated": self.is_gated}
        if self.has_bias:
            options["bias_N"] = (torch.randn(num_columns) / 4).to(self.dtype)
        if self.has_norm:
            options["norm"] = torch.rand(self.width).to(self.dtype) + 0.5, EPS
        if self.has_residual:
            residual = torch.randn(self.rows, self.outputs) / 4
            options["residual_MN"] = between_nans(residual.to(self.dtype))
        if self.is_wide:
            options["out_dtype"] = torch.float32
        return (between_nans(x.to(self.dtype)), between_nans(weight.to(self.dtype))), options


def exact(operands: tuple[Tensor, Tensor], options: dict[str, Any]) -> Tensor:
    """The result in fp64."""
    options = {name: value for name, value in options.items() if name not in ("out", "out_dtype")}
    for name in ("bias_N", "residual_MN"):
        if name in options:
            options[name] = options[name].double()
    if "norm" in options:
        weight, eps = options["norm"]
        options["norm"] = weight.double(), eps
    x, weight = operands
    return linear_reference(x.double(), weight.double(), **options)


def check(case: Case, function=narrow_linear) -> None:
    operands, options = case.operands()
    result = function(*operands, **options)
    assert result.dtype == (torch.float32 if case.is_wide else case.dtype)
    assert result.shape == (case.rows, case.outputs)
    check_close(result, exact(operands, options), case.dtype)
    check_close(result, linear_reference(*operands, **options), case.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("rows", [0, 1, 7, 16, 33, 64])
def test_rows_of_any_number(rows, function, dtype):
    check(Case(rows, 100, 17, dtype), function)


@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("outputs", [1, 17, pytest.param(96, marks=pytest.mark.slow), 1000])
@pytest.mark.parametrize("width", [8, 100, pytest.param(576, marks=pytest.mark.slow), 1000])
def test_ragged_shapes(width, outputs, is_gated):
    check(Case(3, width, outputs, torch.bfloat16, has_norm=True, is_gated=is_gated))


LAUNCHES = [(is_gated, launch) for is_gated, row in PRODUCT_LAUNCHES.items() for _, launch in row]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("is_gated", "launch"), LAUNCHES)
def test_every_launch_of_the_table(is_gated, launch, dtype, monkeypatch):
    monkeypatch.setitem(PRODUCT_LAUNCHES, is_gated, ((0, launch),))
    check(Case(2, 136, 300, dtype, has_norm=True, is_gated=is_gated))


CASES = st.builds(
    Case,
    rows=st.sampled_from([0, 1, 7, 16, 33, 64]),
    width=st.sampled_from([8, 100, 576, 2048]),
    outputs=st.sampled_from([1, 17, 96, 500]),
    dtype=st.sampled_from(DTYPES),
    has_bias=st.booleans(),
    has_norm=st.booleans(),
    has_residual=st.booleans(),
    is_gated=st.booleans(),
    is_wide=st.booleans(),
)


@given(CASES)
def test_all_options_together(case):
    torch.manual_seed(20)
    check(case)


@given(CASES)
def test_all_options_of_torch_products(case):
    torch.manual_seed(20)
    check(case, wide_linear)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_gated", [False, True])
def test_a_long_sum_for_few_columns_is_split(is_gated, dtype):
    case = Case(5, 4100, 20, dtype, True, True, True, is_gated)
    (_, weight), _ = case.operands()
    assert num_splits(launch_for(weight, 20, 16, is_gated=is_gated), 20, 4100) == 4
    check(case)


@pytest.mark.parametrize("dtype", DTYPES)
# one block; several; parts of K
@pytest.mark.parametrize(("width", "outputs"), [(100, 17), (1000, 40), (2048, 3)])
# the fewest and the most rows of each block
@pytest.mark.parametrize(
    ("few", "rows"),
    [(1, 16), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((17, 32), (33, 64)))],
)
def test_a_row_does_not_depend_on_the_others(few, rows, width, outputs, dtype):
    (x, weight), options = Case(rows, width, outputs, dtype, True, True, True).operands()
    residual = options.pop("residual_MN")
    together = narrow_linear(x, weight, residual_MN=residual, **options)
    again = narrow_linear(x, weight, residual_MN=residual, **options)
    assert torch.equal(together, again)
    for first in (0, rows - few):
        part = slice(first, first + few)
        apart = narrow_linear(x[part], weight, residual_MN=residual[part], **options)
        assert torch.equal(apart, together[part])


def test_other_rows_may_hold_nan():
    (x, weight), options = Case(9, 100, 17, has_norm=True).operands()
    clean = narrow_linear(x, weight, **options)
    x[4] = torch.nan
    result = narrow_linear(x, weight, **options)
    assert result[4].isnan().all()
    result[4] = clean[4]
    assert torch.equal(result, clean)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("width", [100, 2048])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_residual_is_updated_in_place(has_bias, width, function):
    case = Case(7, width, 17, torch.bfloat16, has_bias, has_residual=True)
    operands, options = case.operands()
    wanted = exact(operands, options)
    residual = options["residual_MN"]
    assert function(*operands, **options, out=residual) is residual
    check_close(residual, wanted, case.dtype)


@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_result_goes_to_out_alone(function, is_gated):
    operands, options = Case(7, 100, 17, is_gated=is_gated).operands()
    memory = torch.full((7, 30), 5.0)
    out = memory[:, 4:21]
    assert function(*operands, **options, out=out) is out
    check_close(out, exact(operands, options), torch.float32)
    assert (memory[:, :4] == 5).all() and (memory[:, 21:] == 5).all()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_wide_result_is_not_rounded_to_the_dtype_of_x(function):
    operands, options = Case(7, 100, 17, torch.bfloat16, True, is_wide=True).operands()
    check_close(function(*operands, **options), exact(operands, options), torch.float32)


@pytest.mark.parametrize("is_small", [False, True])
def test_shapes_alone_choose_the_code(monkeypatch, is_small):
    chosen = []
    for name in ("narrow_linear", "wide_linear"):
        monkeypatch.setattr(module, name, lambda *_, _name=name, **__: chosen.append(_name))
    width = 8 if is_small else module.SMALL_WEIGHT
    most = 64 if is_small else module.MOST_ROWS
    for rows in (0, 1, most, most + 1, 4096):
        linear(torch.zeros(rows, 1).expand(rows, width), torch.zeros(1, 1).expand(3, width))
    assert chosen == ["narrow_linear"] * 3 + ["wide_linear"] * 2


def test_the_functions_have_one_signature():
    for function in (linear, narrow_linear, wide_linear):
        assert signature(function) == signature(linear_reference)


def test_the_twin_is_the_models_norm_and_product():
    (x, weight), options = Case(5, 100, 17, has_norm=True).operands()
    normed = rms_norm(x, *options["norm"])
    check_close(linear_reference(x, weight, **options), normed @ weight.t(), torch.float32)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_products_refuse_operands_that_do_not_match(function):
    x, weight = torch.zeros(2, 8), torch.zeros(3, 8)
    refused = [
        ("x: expected", (x.double(), weight.double()), {}),
        ("x: expected", (torch.zeros(8, 2).t(), weight), {}),
        ("weight: expected", (x, torch.zeros(3, 9)), {}),
        ("weight: expected", (x, weight.half()), {}),
        ("weight: 3 rows", (x, weight), {"is_gated": True}),
        ("bias: expected", (x, weight), {"bias_N": torch.zeros(8)}),
        ("bias: expected torch.float32", (x, weight), {"bias_N": torch.zeros(3).half()}),
        ("norm: expected", (x, weight), {"norm": (torch.zeros(3), EPS)}),
        ("residual: expected", (x, weight), {"residual_MN": torch.zeros(2, 8)}),
        ("out: expected", (x, weight), {"out": torch.zeros(3, 3)}),
        ("out_dtype: expected", (x, weight), {"out_dtype": torch.float16}),
        ("out_dtype: expected", (x, weight), {"out": torch.zeros(2, 3).half()}),
    ]
    for message, operands, options in refused:
        with pytest.raises(ValueError, match=message):
            function(*operands, **options)


def test_the_narrow_product_refuses_many_rows():
    with pytest.raises(ValueError, match="x: 65 rows, at most 64"):
        narrow_linear(torch.zeros(65, 8), torch.zeros(3, 8))
