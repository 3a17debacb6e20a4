"""Patch folders found by name; symbolic links and other names are refused."""

import os

import pytest

from weights.errors import PatchError, PatchNotFoundError
from weights.patches.patch_dir import folder_in


@pytest.fixture
def patch_dir(tmp_path):
    for name in ("patches/good", "patches/.hidden", "outside"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "patches/file").touch()
    (tmp_path / "patches/out").symlink_to(tmp_path / "outside")
    (tmp_path / "patches/in").symlink_to("good")
    return tmp_path / "patches"


def test_a_folder_is_found_in_a_linked_folder_too(patch_dir, tmp_path):
    assert folder_in(patch_dir, "good") == patch_dir / "good"
    (tmp_path / "link").symlink_to(patch_dir)
    assert folder_in(tmp_path / "link", "good") == patch_dir / "good"


@pytest.mark.parametrize("name", ["none", "n" * 255])
def test_a_folder_that_does_not_exist_is_not_found(patch_dir, name):
    with pytest.raises(PatchNotFoundError, match=f"^{name}: .* no such folder"):
        folder_in(patch_dir, name)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("out", "out: is a symbolic link"),
        ("in", "in: is a symbolic link"),
        ("file", "file: is not a folder"),
        ("n" * 300, "File name too long"),
        *((name, "is not the name of a patch folder") for name in ("", ".", "..", "\0")),
        *((f"..{os.sep}outside", "is not the name"), (f"{os.sep}etc", "is not the name")),
    ],
)
def test_other_names_are_refused(patch_dir, name, problem):
    with pytest.raises(PatchError, match=problem) as caught:
        folder_in(patch_dir, name)
    assert not isinstance(caught.value, PatchNotFoundError)
