"""New folders are created atomically, and only their own partial folder is removed."""

import os
import secrets
import shutil
import stat

import pytest

from weights.checkpoints.new_folder import check_space, new_folder, write_synced


def test_the_folder_appears_with_its_files_when_the_block_ends(tmp_path):
    with new_folder(tmp_path / "parent" / "model") as partial:
        write_synced(partial / "file", b"content")
        assert not (tmp_path / "parent" / "model").exists()
    assert [path.name for path in (tmp_path / "parent").iterdir()] == ["model"]
    assert (tmp_path / "parent" / "model" / "file").read_bytes() == b"content"


def test_a_failed_block_removes_its_partial_folder(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "model") as partial:
        (partial / "file").touch()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_failed_block_removes_no_partial_folder_of_another_process(tmp_path):
    # in two containers, two processes with this pid write the same model to one shared folder
    other = tmp_path / f".model.partial-{os.getpid()}"
    other.mkdir()
    (other / "file").touch()
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "model"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [other] and (other / "file").exists()


def test_two_writers_of_one_folder_do_not_share_a_partial_folder(tmp_path):
    with pytest.raises(OSError, match="not empty"), new_folder(tmp_path / "model") as second:
        (second / "second").touch()
        with new_folder(tmp_path / "model") as first:
            (first / "first").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "first"]


def test_an_existing_partial_folder_is_an_error_and_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(secrets, "token_hex", lambda count: "taken")
    taken = tmp_path / ".model.partial-taken"
    taken.mkdir()
    (taken / "file").touch()
    with pytest.raises(FileExistsError), new_folder(tmp_path / "model"):
        pass
    assert (taken / "file").exists()


def test_the_mode_of_the_folder_follows_the_umask(tmp_path):
    with new_folder(tmp_path / "model"):
        pass
    (tmp_path / "plain").mkdir()
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("model", "plain")]
    assert modes[0] == modes[1]


def test_too_little_space_is_an_error_with_both_numbers(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    check_space(tmp_path, 0)
    with pytest.raises(
        OSError, match="No space left on device: [0-9,]+ bytes are needed, but [0-9]"
    ):
        check_space(tmp_path, 2 * free + 2**40)
