"""The public operations: refusals, gradients, and torch's operator checks."""

import inspect
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.autograd import forward_ad, gradcheck
from torch.fx.experimental.proxy_tensor import make_fx

from memory_ops import backends, custom_operators, operations, reference
from memory_ops.checks import Table
from memory_ops.native.backend import NativeBackend
from memory_ops.operations import expert_lookup, gather_rows, product_topk, row_dots, row_gradients
from memory_ops.patches.token_patches import TokenPatches
from memory_ops.row_formats import ROW_FORMATS, quantize_rows
from memory_ops.sparse_adam import AdamMoments, RowGroups
from tests.conftest import TOLERANCE
from tests.engine.model.test_memory_layer import GOLDEN
from tests.memory_ops.table_kinds import KINDS, PLAIN, exact_values, table_of

OPERATIONS = ["product_topk", "gather_rows", "row_dots", "row_gradients", "expert_lookup"]
GROUPED = ["group_rows", "squared_norm", "sparse_adam"]
# arguments that are tensors, or hold some
TENSORS = (torch.Tensor, Table, RowGroups, AdamMoments, TokenPatches)
# a dimension's letter is defined by one of these behind it
NOUNS = "tokens|heads|subkeys|rows|values|experts|distinct|reads|for each"


def random_operands(num_tokens=5, num_rows=11, width=7, dtype=torch.float64):
    """(table, row ids with repeats, weights, one vector per token)."""
    rows = torch.randint(0, num_rows, (num_tokens, 2, 3))
    rows[..., 1] = rows[..., 0]
    return (
        torch.randn(num_rows, width, dtype=dtype),
        rows,
        torch.randn(rows.shape, dtype=dtype),
        torch.randn(num_tokens, width, dtype=dtype),
    )


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_reference_has_the_same_signature(name):
    ours, plain = getattr(operations, name), getattr(reference, name)
    assert inspect.signature(ours) == inspect.signature(plain)


@pytest.mark.parametrize("name", [*OPERATIONS, "add_patched_rows", "quantize_rows", *GROUPED])
def test_the_help_of_an_operation_is_complete(name):
    operation = getattr(operations, name)
    signature = inspect.signature(operation)
    text = inspect.getdoc(operation)
    arguments = text.partition("Args:\n")[2].partition("\n\n")[0]
    described = dict(re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", arguments, re.MULTILINE))
    assert list(described) == list(signature.parameters)
    for argument, parameter in signature.parameters.items():
        if parameter.annotation in TENSORS:
            assert re.search(r"``\[.+\]``", described[argument]), argument
            assert re.search(r"\b(int64|int32|fp32|bf16)\b", described[argument]), argument
    assert "Raises:" in text and ("Returns:" in text) == (signature.return_annotation is not None)
    assert not re.search("as for|[Ss]ee `|memory_ops.reference", text)
    shapes, text = re.findall(r"``\[(.+?)\]``", text), " ".join(text.split())
    for letter in {letter for shape in shapes for letter in re.findall(r"\b[A-Z]\b", shape)}:
        assert re.search(rf"\b{letter}(, the number| ({NOUNS})\b| =)", text), letter


def test_kernels_quantize_the_rows_that_they_support():
    assert inspect.signature(operations.quantize_rows) == inspect.signature(quantize_rows)
    native = isinstance(backends._for_device_type("cpu"), NativeBackend)
    rows = torch.randn(4, 64)
    for values, by_kernel in (
        (rows, native),
        (rows.bfloat16()[:, 32:], native),
        (rows.double(), False),
        (rows.T, False),
        (rows.to("meta"), False),
        (rows[0], False),
    ):
        assert isinstance(backends.for_rounding(values), NativeBackend) is by_kernel


def test_kernels_write_to_the_host_for_any_default_device():
    values = torch.randn(4, 64)
    wanted = quantize_rows(values, "int8").records_RB
    with torch.device("meta"):
        assert torch.equal(operations.quantize_rows(values, "int8").records_RB, wanted)


class Densified(torch.autograd.Function):
    """Identity whose sparse gradient becomes dense, since gradcheck compares dense ones only."""

    @staticmethod
    def forward(ctx, table):
        return table.view_as(table)

    @staticmethod
    def backward(ctx, grad):
        return grad.to_dense()


densified = Densified.apply

# Gradients.


def test_topk_gradients():
    scores = torch.randn(2, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda scores: product_topk(scores, 4)[1], (scores,))


def test_topk_gradients_of_a_head_without_finite_scores_are_zero():
    scores = torch.full((1, 1, 2, 4), -torch.inf, requires_grad=True)
    product_topk(scores, 2)[1].square().sum().backward()
    assert torch.equal(scores.grad, torch.zeros_like(scores))


def test_gather_gradients():
    table, rows, weights, _ = random_operands()
    table.requires_grad_()
    weights.requires_grad_()

    def dense(table, weights):
        return gather_rows(densified(table), rows, weights)

    assert gradcheck(dense, (table, weights))


def test_dots_gradients():
    table, rows, _, x = random_operands()
    table.requires_grad_()
    x.requires_grad_()
    assert gradcheck(lambda table, x: row_dots(densified(table), rows, x), (table, x))


def test_expert_gradients():
    down, rows, weights, x = random_operands()
    up = torch.randn_like(down)
    inputs = [tensor.requires_grad_() for tensor in (down, up, weights, x)]

    def lookup(down, up, weights, x):
        return expert_lookup(densified(down), densified(up), rows, weights, x)

    assert gradcheck(lookup, inputs)


def test_gradients_of_a_whole_lookup():
    scores = torch.randn(2, 2, 2, 5, dtype=torch.float64, requires_grad=True)
    table = torch.randn(25, 3, dtype=torch.float64, requires_grad=True)

    def lookup(scores, table):
        return gather_rows(densified(table), *product_topk(scores, 3))

    assert gradcheck(lookup, (scores, table))


def test_the_gradient_of_the_table_has_only_the_rows_read():
    table, rows, weights, _ = random_operands(num_rows=1000, dtype=torch.float32)
    table.requires_grad_()
    (grad,) = torch.autograd.grad(gather_rows(table, rows, weights).sum(), table)
    assert grad.is_sparse and grad.is_coalesced()
    assert torch.equal(grad.indices()[0], rows.unique())


@given(kind=st.sampled_from(list(PLAIN)), width=st.sampled_from([1, 33, 128]))
def test_gradients_of_narrow_dtypes_are_exact(kind, width):
    plain, rows, weights, grad = random_operands(33, 50, width, torch.float32)
    table = plain.to(PLAIN[kind]).requires_grad_()
    weights.requires_grad_()
    gather_rows(table, rows, weights).backward(grad)
    exact = table.detach().double().requires_grad_()
    exact_weights = weights.detach().double().requires_grad_()
    reference.gather_rows(exact, rows, exact_weights).backward(grad.double())
    rtol, atol = TOLERANCE[torch.float32]
    close = {"rtol": rtol, "atol": atol * width**0.5}
    torch.testing.assert_close(weights.grad, exact_weights.grad.float(), **close)
    # rounded once, to the table's own dtype
    rounded = dict(zip(("rtol", "atol"), TOLERANCE[PLAIN[kind]], strict=True))
    torch.testing.assert_close(table.grad.to_dense().double(), exact.grad, **rounded)


@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_gradients_flow_past_records_to_the_weights_and_vectors(row_format):
    plain, rows, weights, x = random_operands(9, 20, 40, torch.float32)
    records = table_of(row_format, plain)
    weights.requires_grad_()
    x.requires_grad_()
    expert_lookup(records, records, rows, weights, x).sum().backward()
    exact = exact_values(records)
    wanted = [tensor.detach().double().requires_grad_() for tensor in (weights, x)]
    reference.expert_lookup(exact, exact, rows, *wanted).sum().backward()
    for ours, theirs in zip((weights, x), wanted, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad.float(), rtol=1e-5, atol=1e-4)


# Registration with torch.

CALLS = {
    "topk": (custom_operators.product_topk, lambda t, r, w, x: (torch.randn(3, 2, 2, 9), 4)),
    "gather": (custom_operators.gather_rows, lambda t, r, w, x: (t, "", t.shape[1], r, w)),
    "dots": (custom_operators.row_dots, lambda t, r, w, x: (t, "", t.shape[1], r, x)),
    "gradients": (custom_operators.row_gradients, lambda t, r, w, x: (r, w, x)),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operators_pass_opcheck(name, dtype):
    operator, arguments = CALLS[name]
    given_arguments = arguments(*random_operands(dtype=dtype))
    if name != "gradients":
        for argument in given_arguments:
            if isinstance(argument, torch.Tensor) and argument.is_floating_point():
                argument.requires_grad_()
    wanted = ("test_schema", "test_autograd_registration", "test_faketensor")
    results = torch.library.opcheck(operator, given_arguments, test_utils=wanted)
    assert set(results.values()) == {"SUCCESS"}


def test_gradients_by_weights_and_vectors_can_be_traced():
    # opcheck sums all outputs, which fails for row ids; test_a_lookup_compiles covers topk
    table, rows, weights, x = random_operands(dtype=torch.float32)
    for operator, arguments in (
        (custom_operators.gather_rows, (table, "", 7, rows, weights.requires_grad_())),
        (custom_operators.row_dots, (table, "", 7, rows, x.requires_grad_())),
    ):
        results = torch.library.opcheck(operator, arguments, test_utils="test_aot_dispatch_dynamic")
        assert set(results.values()) == {"SUCCESS"}


def test_a_lookup_compiles_into_one_graph():
    scores, table = torch.randn(3, 2, 2, 9, requires_grad=True), torch.randn(81, 24)
    records = table_of("int8", table)

    def lookup(scores, table, records):
        rows, weights = product_topk(scores, 4)
        return gather_rows(table, rows, weights) + gather_rows(records, rows, weights)

    compiled = torch.compile(lookup, backend="aot_eager", fullgraph=True)
    out = compiled(scores, table, records)
    torch.testing.assert_close(out, lookup(scores, table, records))
    (by_compiled,) = torch.autograd.grad(out.sum(), scores)
    (wanted,) = torch.autograd.grad(lookup(scores, table, records).sum(), scores)
    torch.testing.assert_close(by_compiled, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_without_values(kind):
    # as torch.compile and meta devices need them
    table = table_of(kind, torch.randn(9, 24))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        rows, weights = torch.zeros(3, 2, 4, dtype=torch.int64), torch.zeros(3, 2, 4)
        assert gather_rows(table, rows, weights).shape == (3, 24)
        assert row_dots(table, rows, torch.zeros(3, 24)).shape == rows.shape
        chosen, chances = product_topk(torch.zeros(3, 2, 2, 5), 4)
        assert (chosen.dtype, chances.dtype) == (torch.int64, torch.float32)


# Results and refusals on the backend of this machine.


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_experts_equal_the_reference_layer(dtype, tolerance):
    golden = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in load_file(GOLDEN / "peer.safetensors").items()
    }
    out = expert_lookup(
        golden["weights.values_u.weight"],
        golden["weights.values_v.weight"],
        golden["rows"],
        golden["scores"].softmax(-1),
        golden["input"],
    )
    torch.testing.assert_close(out, golden["output"], rtol=tolerance, atol=tolerance)


@given(kind=st.sampled_from(KINDS), width=st.sampled_from([1, 33, 128]))
def test_experts_equal_the_reference(kind, width):
    plain, rows, weights, x = random_operands(9, 20, width, torch.float32)
    down, up = table_of(kind, plain), table_of(kind, plain.flip(0))
    out = expert_lookup(down, up, rows, weights, x)
    exact = reference.expert_lookup(
        exact_values(down), exact_values(up), rows, weights.double(), x.double()
    )
    torch.testing.assert_close(out, exact.float(), rtol=1e-5, atol=1e-5 * width)


def test_no_tokens_and_no_rows():
    table, rows, weights, x = random_operands(0, dtype=torch.float32)
    assert gather_rows(table, rows, weights).shape == (0, 7)
    assert row_dots(table, rows, x).shape == (0, 2, 3)
    assert [t.shape for t in row_gradients(rows, weights, x)] == [(0,), (0, 7)]
    assert product_topk(torch.zeros(0, 2, 2, 5), 3)[0].shape == (0, 2, 3)


@pytest.mark.parametrize("grad", [False, True])
def test_wrong_shapes_and_dtypes_are_refused_by_name(grad):
    table, rows, weights, x = random_operands(dtype=torch.float32)
    weights.requires_grad_(grad)
    x.requires_grad_(grad)
    refused = [
        ("table", lambda: gather_rows(table[0], rows, weights)),
        ("table", lambda: gather_rows(table.long(), rows, weights)),
        ("rows and weights", lambda: gather_rows(table, rows, weights[:, :, :2])),
        ("rows: expected int64", lambda: gather_rows(table, rows.int(), weights)),
        ("rows and x", lambda: row_dots(table, rows, x[:, :3])),
        ("grad", lambda: row_gradients(rows, weights, x[:3])),
        ("half_scores", lambda: product_topk(x, 2)),
        ("top_k: 6", lambda: product_topk(torch.zeros(1, 1, 2, 5), 6)),
        ("top_k: 0", lambda: product_topk(torch.zeros(1, 1, 2, 5), 0)),
    ]
    for field, call in refused:
        with pytest.raises(ValueError, match=field):
            call()
    with pytest.raises(IndexError, match="rows|index"):
        gather_rows(table, rows + 11, weights)
    with pytest.raises(IndexError, match="rows|index"):
        row_dots(table, rows - 11, x)


def test_operands_on_other_devices_are_refused():
    table, rows, weights, x = random_operands(dtype=torch.float32)
    for call in (
        lambda: gather_rows(table.to("meta"), rows, weights),
        lambda: gather_rows(table, rows.to("meta"), weights),
        lambda: gather_rows(table, rows, weights.to("meta")),
        lambda: row_dots(table.to("meta"), rows, x),
        lambda: row_gradients(rows, weights, x.to("meta")),
    ):
        with pytest.raises(ValueError, match="meta"):
            call()


def test_unsupported_dtypes_are_refused_by_name():
    table, rows, weights, x = random_operands(dtype=torch.float32)
    refused = [
        ("weights", lambda: gather_rows(table, rows, weights.long())),
        ("weights", lambda: gather_rows(table, rows, weights + 1j)),
        ("table", lambda: gather_rows(table.to(torch.float8_e4m3fn), rows, weights)),
        ("x", lambda: row_dots(table, rows, x.int())),
        ("grad", lambda: row_gradients(rows, weights, x.int())),
        ("half_scores", lambda: product_topk(torch.zeros(1, 1, 2, 5).bfloat16(), 2)),
        ("half_scores", lambda: product_topk(torch.zeros(1, 1, 2, 5).int(), 2)),
    ]
    for field, call in refused:
        with pytest.raises(ValueError, match=f"{field}: expected"):
            call()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wide", [False, True])
def test_a_negative_row_is_never_counted_from_the_end(kind, wide):
    # on any backend: the dtype of the weights selects it
    table = table_of(kind, torch.randn(9, 24))
    rows, weights = torch.tensor([[[0, -1]]]), torch.ones(1, 1, 2)
    weights = weights.double() if wide else weights
    with pytest.raises(IndexError):
        gather_rows(table, rows, weights)
    with pytest.raises(IndexError):
        row_gradients(rows, weights, torch.randn(1, 24))


# Tracers, modes and transforms see the operator itself.


def test_tracing_sees_the_operator():
    table, rows, weights, _ = random_operands(dtype=torch.float32)
    graph = make_fx(lambda w: gather_rows(table, rows, w))(weights)
    assert "memplus.gather_rows" in graph.code
    torch.testing.assert_close(graph(weights * 2), gather_rows(table, rows, weights * 2))


def test_real_tensors_under_a_fake_mode_are_not_handed_to_kernels():
    table, rows, weights, _ = random_operands(dtype=torch.float32)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(gather_rows(table, rows, weights), torch._subclasses.FakeTensor)


def test_a_negated_view_keeps_its_sign():
    table, rows, weights, _ = random_operands(dtype=torch.float32)
    negated = gather_rows(table, rows, torch._neg_view(weights))
    torch.testing.assert_close(negated, -gather_rows(table, rows, weights))


# torch scripts its decompositions of forward gradients
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_a_forward_gradient_is_refused_not_dropped():
    table, rows, weights, _ = random_operands(dtype=torch.float32)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(weights, torch.ones_like(weights))
        with pytest.raises(RuntimeError, match="forward-mode"):
            gather_rows(table, rows, dual)
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(lambda weights: gather_rows(table, rows, weights), (weights,), (weights,))
