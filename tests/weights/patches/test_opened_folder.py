"""Files of a patch folder: opened once, never through a symbolic link."""

import errno
import os
import shutil
import socket

import pytest

from weights.errors import PatchError, PatchReadError
from weights.patches.opened_folder import opened_files


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "patch").mkdir()
    (tmp_path / "patch/a").write_bytes(b"one")
    (tmp_path / "patch/b").write_bytes(b"second")
    return tmp_path / "patch"


def test_opened_files_stay_the_same_whatever_happens_to_their_names(folder):
    with opened_files(folder, "a", "b", follow=False) as (first, second):
        shutil.rmtree(folder)
        folder.symlink_to("/etc")
        assert (first.path, first.num_bytes) == (folder / "a", 3)
        assert (first.read(2), first.read(100)) == (b"on", b"one")
        part = bytearray(5)
        assert second.read_into(memoryview(part), 4) == 2
        assert part == b"nd\0\0\0"
        descriptor = first.descriptor
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_folder_that_is_a_link_is_opened_only_if_that_is_allowed(folder, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(folder)
    with opened_files(link, "a") as (file,):
        assert file.path == link / "a"
    with (
        pytest.raises(PatchError, match=f"{link}: is a symbolic link"),
        opened_files(link, "a", follow=False),
    ):
        pass


@pytest.mark.parametrize("follow", [False, True])
def test_what_is_not_a_folder_of_regular_files_is_refused(folder, follow):
    (folder / "linked").symlink_to(folder / "a")
    (folder / "nothing").symlink_to(folder / "none")
    os.mkfifo(folder / "fifo")
    (folder / "subfolder").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
    problems = {"linked": "is a symbolic link", "nothing": "is a symbolic link"}
    problems |= dict.fromkeys(("fifo", "subfolder", "socket"), "is not a regular file")
    for name, problem in (problems | {"none": "No such file"}).items():
        with (
            pytest.raises(PatchError, match=f"{folder / name}: {problem}"),
            opened_files(folder, "a", name, follow=follow),
        ):
            pass
    for wrong, problem in ((folder / "a", "Not a directory"), (folder / "none", "No such file")):
        with (
            pytest.raises(PatchError, match=f"{wrong}: {problem}"),
            opened_files(wrong, "a", follow=follow),
        ):
            pass


def test_a_lack_of_open_files_is_a_failure_and_a_missing_file_is_not(folder, monkeypatch):
    def no_more(*arguments, **named):
        raise OSError(errno.EMFILE, "Too many open files")

    with pytest.raises(PatchError) as missing, opened_files(folder, "none"):
        pass
    assert not isinstance(missing.value, PatchReadError)
    monkeypatch.setattr(os, "open", no_more)
    with pytest.raises(PatchReadError, match="Too many open files"), opened_files(folder, "a"):
        pass
