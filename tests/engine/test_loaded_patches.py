"""Patches that an engine has loaded."""

import pytest

from engine.errors import RequestError
from engine.loaded_patches import LoadedPatches
from engine.model.row_patches import RowPatch
from engine.request import PatchRef


def test_equal_contents_are_one_patch():
    patches = LoadedPatches()
    patches.put(RowPatch("a", {}))
    (first,) = patches.lease([PatchRef("a")])
    patches.put(RowPatch("a", {}))
    assert patches.lease([PatchRef("a")])[0].patch is first.patch
    patches.remove("a")
    patches.put(RowPatch("a", {}))
    assert patches.lease([PatchRef("a")])[0].patch is first.patch


def test_a_patch_that_is_not_loaded_is_refused():
    patches = LoadedPatches()
    patches.remove("a")
    with pytest.raises(RequestError, match="memory_patches: patch a is not loaded"):
        patches.lease([PatchRef("a")])
