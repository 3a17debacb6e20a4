"""Part correctness: kernels against their twins, and whole models against the CPU's engine."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.figures import Figure
from benchmarks.gpu.kernel_cases import (
    attention_cases,
    layer_cases,
    mixture_case,
    sampling_cases,
)
from benchmarks.gpu.kernel_inputs import KernelCase
from benchmarks.gpu.lookup_cases import lookup_cases
from benchmarks.gpu.model_checks import MODELS, model_figures, model_names
from benchmarks.gpu.part import PartSetup, Task
from benchmarks.model_shapes import LLAMA_8B_SHAPE, SMOLLM2_SHAPE

_CPU = torch.device("cpu")
_CONTEXT = 208  # no multiple of the kernels' tiles
# relative and absolute errors that pass, of results of about 1: sums have another order, and fused
# kernels round fewer intermediate results
_TOLERANCE = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (2e-2, 4e-2)}
_UNIT = "of tolerance"


def tasks(setup: PartSetup) -> Iterator[Task]:
    """A task per kernel and shape, then one per model."""
    for prefix, cases in _kernels(is_core=setup.is_core):
        for case in cases:
            yield Task((f"{prefix} {case.name}",), partial(_compared, case))
    for name in MODELS:
        yield Task(model_names(name), partial(model_figures, name))


def _kernels(*, is_core: bool) -> Iterator[tuple[str, Iterable[KernelCase]]]:
    shape, bf16 = SMOLLM2_SHAPE, torch.bfloat16
    # few tokens and many take different kernels
    dtypes = {"bf16": bf16} if is_core else {"bf16": bf16, "fp32": torch.float32}
    for num_tokens in (1, 40) if is_core else (1, 7, 40):
        for label, dtype in dtypes.items():
            prefix = f"smollm2 {num_tokens} tokens {label}"
            yield prefix, layer_cases(shape, num_tokens, dtype, _CONTEXT)
            yield prefix, sampling_cases(shape.vocab_size, num_tokens, dtype)
            yield prefix, [mixture_case(shape, num_tokens, dtype)]
        yield f"smollm2 {num_tokens} tokens", lookup_cases(shape.hidden_size, 1024, num_tokens)
    mixed = [1, 37, 1, 130]
    yield "smollm2 mixed bf16", attention_cases(shape, mixed, bf16, _CONTEXT)
    yield "llama-3-8b mixed bf16", attention_cases(LLAMA_8B_SHAPE, mixed, bf16, _CONTEXT)
    yield "llama-3-8b 8 tokens bf16", attention_cases(LLAMA_8B_SHAPE, [1] * 8, bf16, 4096)
    yield "4096 wide 8 tokens", lookup_cases(4096, 2048, 8)


def _compared(case: KernelCase, wanted: Sequence[str]) -> Iterator[Figure]:
    """The largest error of a kernel, as a multiple of the error that passes."""
    torch.manual_seed(0)
    inputs = case.inputs()
    twin_inputs = inputs.copied(_CPU)
    found = [one.to(_CPU) for one in inputs.call(case.kernel)]
    expected = twin_inputs.call(case.twin)
    error = max(result_error(one, other) for one, other in zip(found, expected, strict=True))
    yield Figure(wanted[0], error, _UNIT, 1.0, is_wrong=not error <= 1)


def result_error(found: Tensor, expected: Tensor) -> float:
    """The largest error as a multiple of what passes; infinity for a NaN, or for other ids."""
    if not expected.is_floating_point():
        return 0.0 if torch.equal(found, expected) else float("inf")
    relative, absolute = _TOLERANCE[expected.dtype]
    allowed = absolute + relative * expected.double().abs()
    error = float(((found.double() - expected.double()).abs() / allowed).max())
    return float("inf") if error != error else error
