"""The verbs of ``memplus patch``: what they print, write and refuse."""

import re

import pytest

from server.cli.main import main
from tests.weights.patches.made import IDENTITY, TABLE, saved_patch
from weights.patches.combine import merged, scaled
from weights.patches.model_identity import model_identity
from weights.patches.patch_folder import read_patch


@pytest.fixture
def folders(memory_plus_folder, tmp_path):
    """Two patches of the tiny Memory+ model."""
    identity = model_identity(memory_plus_folder)
    for seed, name in enumerate(("a", "b")):
        described = {"scores": {"recall": 0.5}, "base_patches": {TABLE: ["c" * 64]}}
        saved_patch(tmp_path / name, model=identity, seed=seed, **described)
    return tmp_path


def run(*arguments) -> int:
    return main(["patch", *map(str, arguments)])


def test_a_patch_is_described(folders, capsys):
    assert run("inspect", folders / "a") == 0
    patch, out = read_patch(folders / "a"), capsys.readouterr().out
    assert f"content hash  {patch.content_hash}\n" in out
    assert f"row choice    {patch.description.row_choice}\n" in out
    assert f"table         {TABLE}: 9 of 64 rows x 24, float32, largest delta 0.984\n" in out
    assert f"  origin      {patch.description.origins[TABLE]}\n" in out
    assert f"  made on     {'c' * 64}\n" in out
    assert "size          9 rows, 936 bytes\n" in out
    assert 'scores        {"recall": 0.5}\n' in out and "data          none\n" in out


def test_patches_are_merged_and_scaled(folders, capsys):
    assert run("merge", folders / "a", folders / "b", "--out", folders / "both") == 0
    assert run("scale", folders / "both", "-0.5", "--out", folders / "half") == 0
    both = merged([read_patch(folders / "a"), read_patch(folders / "b")])
    assert read_patch(folders / "both").content_hash == both.content_hash
    assert read_patch(folders / "half").content_hash == scaled(both, -0.5).content_hash
    assert f"both: {both.num_rows} rows, {both.num_bytes:,} bytes" in capsys.readouterr().out


def test_a_patch_is_applied_and_found_again(memory_plus_folder, folders, capsys, caplog):
    target = folders / "model"
    assert run("apply", memory_plus_folder, folders / "a", "--out", target) == 0
    line = f"{TABLE}: 9 rows written; rounding error: largest 0, mean 0\n"
    assert capsys.readouterr().out == line
    assert f"lacks patches that the patch was made on: {'c' * 64}" in caplog.text
    assert run("diff", memory_plus_folder, target, "--out", folders / "back") == 0
    assert capsys.readouterr().out == f"{TABLE}: 9 rows differ\n"
    assert run("diff", target, target, "--out", folders / "none") == 0
    assert run("inspect", folders / "none") == 0
    assert f"{TABLE}: 0 of 64 rows x 24, float32\n" in capsys.readouterr().out


def test_mistakes_are_one_line_and_exit_code_2(memory_plus_folder, folders, capsys):
    saved_patch(folders / "foreign", model=IDENTITY)
    for arguments, named in [
        (("inspect", folders / "none"), "none: No such file"),
        (("merge", folders / "a", folders / "foreign"), "row_choice: .* different models"),
        (("scale", folders / "a", "nan"), "FACTOR: must be finite"),
        (("apply", memory_plus_folder, folders / "foreign"), "row_choice: the patch was made for"),
        (("diff", memory_plus_folder, folders / "a"), r"a/config\.json: No such file"),
    ]:
        out = () if arguments[0] == "inspect" else ("--out", folders / "new")
        assert run(*arguments, *out) == 2
        assert re.fullmatch(f"memplus: .*{named}.*\n", capsys.readouterr().err)
        assert not (folders / "new").exists()
