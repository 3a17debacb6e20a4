"""A strict Triton interpreter: errors that a GPU would hide raise exceptions here.

1. Every lane of a load or store that is not masked off must lie within a tensor argument, or
   within a row patch that is alive.
2. int32 sums, differences and products must not overflow.
3. Masked-off lanes without an ``other`` value are poisoned: NaN, or a large number.
   (``other=0`` counts as no value: the interpreter drops values that are false.)
4. bf16 converts to the nearest value, as on a GPU. Products of bf16 matrices with fp32 sums are
   exact products, as on a GPU. Other arithmetic in bf16 raises an error, since the interpreter
   would compute with its bits.

The interpreter cannot show races, missing barriers or code that the compiler refuses.
"""

import warnings
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from memory_ops.patches.patched_rows import PatchedRows

BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)
Ranges = list[tuple[int, int]]


def make_strict(patch: pytest.MonkeyPatch) -> None:
    """Make triton's interpreter strict until ``patch`` is undone."""
    # the interpreter checks for overflow if debug is on
    options = interpreter.InterpreterOptions(debug=True)
    patch.setattr(interpreter.interpreter_builder, "options", options)
    _check_memory(patch)
    _convert_bf16(patch)
    _refuse_bf16_arithmetic(patch)
    _widen_bf16_products(patch)
    _sort_faster(patch)
    _patch_language_once(patch)
    _describe_tensors_faster(patch)


def run_last_programs(patch: pytest.MonkeyPatch, count: int) -> None:
    """Run only the last ``count`` programs of a grid's first axis: a huge grid would take days."""
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    start = executor.__init__
    skipped = 0

    def shortened(self, function, names, grid, *rest):
        nonlocal skipped
        skipped = max(grid[0] - count, 0)
        start(self, function, names, (min(grid[0], count), *grid[1:]), *rest)

    def placed(self, x, y, z):
        self.grid_idx = (x + skipped, y, z)

    patch.setattr(executor, "__init__", shortened)
    patch.setattr(builder, "set_grid_idx", placed)


def tensor_ranges(arguments: list[object]) -> Ranges:
    """Address ranges, half open, of the tensors among a kernel's arguments."""
    found: Ranges = []
    tensors = [a for a in arguments if isinstance(a, torch.Tensor) and a.numel()]
    for tensor in sorted(tensors, key=torch.Tensor.data_ptr):
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        last = sum((size - 1) * step for size, step in steps)
        low, high = tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
        # a table's values and scales are two views of one memory
        if found and low <= found[-1][1]:
            low, high = found[-1][0], max(found.pop()[1], high)
        found.append((low, high))
    return found


def _live_patches(patch: pytest.MonkeyPatch) -> weakref.WeakSet[PatchedRows]:
    """The patches that exist: kernels get their addresses in a tensor of numbers."""
    found: weakref.WeakSet[PatchedRows] = weakref.WeakSet()
    complete = PatchedRows._add_counts_and_words
    patch.setattr(
        PatchedRows, "_add_counts_and_words", lambda rows: (found.add(rows), complete(rows))
    )
    return found


def _check_memory(patch: pytest.MonkeyPatch) -> None:
    ranges: Ranges = []
    patches = _live_patches(patch)
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    call, arguments_of = executor.__call__, executor._init_args_hst
    load, store = builder.create_masked_load, builder.create_masked_store

    def silent_call(self, *args, **kwargs):
        # numpy computes both sides of a where; NaN that a GPU would also give needs no warning
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All-NaN", RuntimeWarning)
            return call(self, *args, **kwargs)

    def remembered(self, args, kwargs):
        args, kwargs = arguments_of(self, args, kwargs)
        of_patches = [one for rows in patches for one in vars(rows).values()]
        ranges[:] = tensor_ranges([*args, *kwargs.values(), *of_patches])
        return args, kwargs

    def checked_load(self, pointers, mask, other, *rest):
        _check_lanes("load", pointers, mask, ranges)
        if other is None and not mask.data.all():
            other = _poison(pointers)
        return load(self, pointers, mask, other, *rest)

    def checked_store(self, pointers, value, mask, *rest):
        _check_lanes("store", pointers, mask, ranges)
        return store(self, pointers, value, mask, *rest)

    patch.setattr(executor, "__call__", silent_call)
    patch.setattr(executor, "_init_args_hst", remembered)
    # use host tensors in place: copying them back would touch all of their memory
    patch.setattr(executor, "_restore_args_dev", lambda *args: None)
    patch.setattr(builder, "create_masked_load", checked_load)
    patch.setattr(builder, "create_masked_store", checked_store)


def _check_lanes(what: str, pointers, mask, ranges: Ranges) -> None:
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    addresses, live = np.broadcast_arrays(pointers.data, mask.data)
    addresses = addresses[live.astype(bool)].astype(np.uint64)
    inside = np.zeros(addresses.shape, dtype=bool)
    for low, high in ranges:
        inside |= (addresses >= low) & (addresses + np.uint64(size) <= high)
    if not inside.all():
        where = f"{(~inside).sum()} of {inside.size} lanes outside every tensor"
        raise IndexError(f"{what}: {where}, program {interpreter.interpreter_builder.grid_idx}")


def _poison(pointers):
    kind = pointers.get_element_ty()
    dtype = interpreter._get_np_dtype(kind)
    # the interpreter holds bf16 as 16 bits
    value = 0x7FC0 if kind == tl.bfloat16 else np.nan
    if dtype.kind in "iu" and kind != tl.bfloat16:
        value = int.from_bytes(b"\x5a" * dtype.itemsize, "little")
    return interpreter.TensorHandle(np.full(pointers.data.shape, value, dtype=dtype), kind)


def _convert_bf16(patch: pytest.MonkeyPatch) -> None:
    convert = interpreter._convert_float

    def converted(values, source, target, rounding):
        if source == tl.bfloat16 and target == tl.float32:
            return (values.astype(np.uint32) << 16).view(np.float32)
        if source == tl.float32 and target == tl.bfloat16:
            # torch rounds to the nearest, ties to even, like a GPU
            narrow = torch.from_numpy(np.array(values, dtype=np.float32)).bfloat16()
            return narrow.view(torch.int16).numpy().view(np.uint16)
        return convert(values, source, target, rounding)

    patch.setattr(interpreter, "_convert_float", converted)


def _refuse_bf16_arithmetic(patch: pytest.MonkeyPatch) -> None:
    def refusing(plain: Callable[..., object]) -> Callable[..., object]:
        def checked(self, *operands):
            if operands[-1] not in BITWISE:
                for operand in _bf16_operands(operands):
                    raise TypeError(f"bf16 arithmetic on {operand}: cast to fp32 after the load")
            return plain(self, *operands)

        return checked

    builder, reductions = interpreter.InterpreterBuilder, interpreter.ReduceOps
    for owner, names in (
        (builder, ("binary_op", "unary_op", "ternary_op")),
        (reductions, ("apply_impl",)),
    ):
        for name in names:
            patch.setattr(owner, name, refusing(getattr(owner, name)))


def _widen_bf16_products(patch: pytest.MonkeyPatch) -> None:
    builder = interpreter.InterpreterBuilder
    dot = builder.create_dot

    def widened(self, a, b, sums, *rest):
        a, b = (
            self.cast_impl(part, tl.float32) if part.dtype.scalar == tl.bfloat16 else part
            for part in (a, b)
        )
        return dot(self, a, b, sums, *rest)

    patch.setattr(builder, "create_dot", widened)


def _bf16_operands(operands: tuple[object, ...]) -> Iterator[object]:
    for operand in operands:
        # reductions take a tuple of tensors
        for part in operand if isinstance(operand, tuple) else (operand,):
            dtype = getattr(part, "dtype", None)
            if getattr(dtype, "scalar", None) == tl.bfloat16:
                yield part


def _sort_faster(patch: pytest.MonkeyPatch) -> None:
    """Replace xor reductions, of which tl.topk consists: the interpreter loops over them."""
    plain = interpreter.ReduceOps.apply_impl

    def vectorised(self, operands):
        if self.combine_fn is not tl.standard._xor_combine or self.axis is None:
            return plain(self, operands)
        (operand,) = operands
        result = np.bitwise_xor.reduce(operand.handle.data, self.axis, keepdims=self.keep_dims)
        return self.to_tensor(result, operand.dtype)

    patch.setattr(interpreter.ReduceOps, "apply_impl", vectorised)


def _patch_language_once(patch: pytest.MonkeyPatch) -> None:
    """Keep triton.language patched: the interpreter patches it at each call of a device function.

    That takes a quarter of its time. No code of a process that interprets needs the originals.
    """
    plain, patched = interpreter._patch_lang, set()

    def once(function):
        languages = tuple(one in function.__globals__.values() for one in (tl, tl.core))
        if languages not in patched:
            plain(function)
            patched.add(languages)
        # nothing to restore
        return interpreter._LangPatchScope()

    patch.setattr(interpreter, "_patch_lang", once)


def _describe_tensors_faster(patch: pytest.MonkeyPatch) -> None:
    """Compute what follows from a type or shape once; the interpreter does it for each tensor."""
    dtype_of, describe, equals = interpreter._get_np_dtype, tl.block_type.__init__, tl.tuple.__eq__
    dtypes: dict[str, np.dtype] = {}
    # by sizes: attributes of a block type, and those of its tensors
    shapes: dict[tuple[int, ...], tuple[object, ...]] = {}
    scalar = tl.constexpr(1), tl.tuple([])

    def known_dtype(kind):
        kind = kind.scalar
        if kind.name not in dtypes:
            dtypes[kind.name] = dtype_of(kind)
        return dtypes[kind.name]

    def known_shape(self, element, shape):
        sizes = tuple(getattr(size, "value", size) for size in shape)
        if sizes not in shapes:
            describe(self, element, shape)
            of_tensors = tl.constexpr(self.numel), tl.tuple([tl.constexpr(size) for size in sizes])
            shapes[sizes] = self.shape, self.numel, str(self.shape), of_tensors
        self.element_ty = element
        self.shape, self.numel, text, self.of_tensors = shapes[sizes]
        self.name = f"<{text}, {element}>"

    def start(self, handle, kind):
        self.handle, self.type, self.dtype = handle, kind, kind.scalar
        self.numel, self.shape = kind.of_tensors if kind.is_block() else scalar

    def same_or_equal(self, other):
        return tl.constexpr(True) if self is other else equals(self, other)

    patch.setattr(interpreter, "_get_np_dtype", known_dtype)
    patch.setattr(tl.block_type, "__init__", known_shape)
    patch.setattr(tl.tensor, "__init__", start)
    patch.setattr(tl.tuple, "__eq__", same_or_equal)
