"""Merged and scaled patches: they add up, round only if they must, and refuse other models."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import TOLERANCE
from tests.weights.patches.made import IDENTITY, TABLE, patch_of
from weights.errors import PatchError
from weights.patches.combine import merged, scaled
from weights.patches.description import PatchDescription
from weights.patches.model_identity import ModelIdentity
from weights.patches.patch_folder import StoredPatch, stored_patch

BF16 = torch.bfloat16
NUM_ROWS, WIDTH = 12, 3
RTOL, ATOL = TOLERANCE[torch.float32]


@st.composite
def random_patches(draw) -> StoredPatch:
    """A patch of a table so small that the rows of two often overlap."""
    count = draw(st.integers(0, NUM_ROWS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    rows_P = torch.randperm(NUM_ROWS, generator=generator)[:count].sort().values
    deltas_PV = torch.randn(count, WIDTH, generator=generator)
    dtype = draw(st.sampled_from([torch.float32, BF16]))
    description = PatchDescription({TABLE: "a" * 64}, "b" * 64, {TABLE: (NUM_ROWS, WIDTH)})
    return stored_patch(description, {TABLE: (rows_P, deltas_PV.to(dtype))})


def as_table(patch: StoredPatch) -> torch.Tensor:
    """The patch as a dense table of fp64 deltas."""
    table_RV = torch.zeros(NUM_ROWS, WIDTH, dtype=torch.float64)
    rows_P, deltas_PV = patch.tables[TABLE]
    table_RV[rows_P] = deltas_PV.double()
    return table_RV


def close(patch: StoredPatch, wanted_RV: torch.Tensor) -> None:
    torch.testing.assert_close(as_table(patch), wanted_RV, rtol=RTOL, atol=ATOL)


@given(patches=st.lists(random_patches(), min_size=1, max_size=4))
def test_a_merge_is_the_sum_of_its_patches(patches):
    merge = merged(patches)
    close(merge, sum(as_table(one) for one in patches))
    ids = {int(row) for one in patches for row in one.tables[TABLE][0]}
    assert merge.tables[TABLE][0].tolist() == sorted(ids)
    assert merge.description.settings["patches"] == [one.content_hash for one in patches]


@given(first=random_patches(), second=random_patches(), third=random_patches())
def test_merging_is_commutative_and_associative(first, second, third):
    pair = merged([first, second])
    assert pair.content_hash == merged([second, first]).content_hash
    left, right = merged([pair, third]), merged([first, merged([second, third])])
    close(left, as_table(right))
    assert torch.equal(left.tables[TABLE][0], right.tables[TABLE][0])


@given(patch=random_patches(), factor=st.floats(-8, 8, width=32))
def test_scaling_multiplies_all_deltas(patch, factor):
    assert scaled(patch, 1).content_hash == patch.content_hash
    assert merged([patch]).content_hash == patch.content_hash
    scale = scaled(patch, factor)
    close(scale, as_table(patch) * factor)
    assert scale.description.settings["factor"] == factor
    assert scaled(patch, 2).content_hash == merged([patch, patch]).content_hash
    assert not as_table(merged([patch, scaled(patch, -1)])).any()


def test_deltas_stay_bf16_if_no_sum_needs_rounding():
    exact = patch_of(seed=1, dtype=BF16), patch_of(seed=2, dtype=BF16)
    assert merged(exact).tables[TABLE][1].dtype == BF16
    assert merged([*exact, patch_of(seed=3)]).tables[TABLE][1].dtype == torch.float32
    # 1/64 + 256 needs more than the 8 bits of bf16
    large = scaled(exact[0], 256)
    assert large.tables[TABLE][1].dtype == BF16
    rounded = merged([exact[0], large])
    assert rounded.tables[TABLE][1].dtype == torch.float32
    assert scaled(exact[0], 257).content_hash == rounded.content_hash
    assert scaled(exact[0], 0.1).tables[TABLE][1].dtype == torch.float32


def test_tables_of_either_patch_are_kept():
    names = [f"model.layers.{layer}.memory.table" for layer in (1, 3)]
    first, second = (
        patch_of(ModelIdentity({name: "a" * 64}, "b" * 64, {name: (9, 4)}), count=3)
        for name in names
    )
    for order in itertools.permutations((first, second)):
        merge = merged(order)
        assert set(merge.description.shapes) == set(merge.description.origins) == set(names)
        assert all(torch.equal(merge.tables[name][1], first.tables[names[0]][1]) for name in names)


OTHERS = {
    "row_choice": ModelIdentity(IDENTITY.origins, "c" * 64, IDENTITY.shapes),
    "origins.memory.table": ModelIdentity({TABLE: "c" * 64}, "b" * 64, IDENTITY.shapes),
    "shapes.memory.table": ModelIdentity(IDENTITY.origins, "b" * 64, {TABLE: (65, 24)}),
}


@pytest.mark.parametrize("field", OTHERS)
def test_patches_of_different_models_are_not_merged(field):
    with pytest.raises(PatchError, match=rf"{field}: .* different models: .* and (c{{64}}|\[65)"):
        merged([patch_of(), patch_of(OTHERS[field])])


@pytest.mark.parametrize("factor", [torch.inf, -torch.inf, torch.nan])
def test_a_factor_must_be_finite(factor):
    with pytest.raises(PatchError, match="factor: must be finite"):
        scaled(patch_of(), factor)


def test_overflow_is_refused():
    large = scaled(patch_of(), 2.0**128 / 2)
    with pytest.raises(PatchError, match=r"memory.table.deltas: value \[\d+, \d+\] is NaN or inf"):
        scaled(large, 1e9)
    with pytest.raises(PatchError, match=r"memory.table.deltas: value \[\d+, \d+\] is NaN or inf"):
        merged([large, large, large])


def test_merged_patches_name_the_base_patches_of_all():
    bases = ["a" * 64], ["b" * 64, "a" * 64]
    patches = [patch_of(base_patches={TABLE: base}) for base in bases]
    assert merged([*patches, patch_of()]).description.base_patches == {TABLE: ["a" * 64, "b" * 64]}
    assert scaled(patches[1], 2.0).description.base_patches == {TABLE: bases[1]}
