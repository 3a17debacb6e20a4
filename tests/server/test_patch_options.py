"""Options of row patches: names, folders, and the engine's settings that follow from them."""

import pytest

from engine.config import EngineConfig
from engine.errors import ConfigError
from server.cli.options import Parser, add_options, from_options
from server.patch_options import PatchOptions

ABC = "abcdefghijklmnopq"
SEVENTEEN = tuple(f"{name}=d" for name in ABC)


def parsed(*arguments: str) -> PatchOptions:
    parser = Parser()
    add_options(parser, PatchOptions)
    return from_options(PatchOptions, parser.parse_args(arguments))


def test_patches_may_be_given_together_or_one_by_one(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    together = parsed("--patch", f"a={tmp_path}/link", "b=/x=y", "--default-patches", "b")
    assert together == parsed(
        *("--patch", f"a={tmp_path}/link", "--default-patches", "b", "--patch", "b=/x=y")
    )
    assert {name: str(folder) for name, folder in together.folders.items()} == {
        "a": f"{tmp_path}/target",
        "b": "/x=y",
    }


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"patch": ("a",)}, "patch: expected NAME=DIR"),
        ({"patch": ("a=",)}, "patch: expected NAME=DIR"),
        ({"patch": ("=d",)}, "patch: the name of '=d'"),
        ({"patch": (".a=d",)}, "must not begin with"),
        ({"patch": ("-a=d",)}, "must not begin with"),
        ({"patch": ("a/b=d",)}, "patch: the name"),
        ({"patch": ("a+b=d",)}, "patch: the name"),
        ({"patch": ("a\n=d",)}, "patch: the name"),
        ({"patch": ("a" * 65 + "=d",)}, "1 to 64"),
        ({"patch": ("a=d", "a=e")}, "patch: the name 'a' is given twice"),
        ({"default_patches": ("a",)}, "default_patches: --patch has no patch 'a'"),
        ({"patch": ("a=d",), "default_patches": ("a", "a")}, "default_patches: 'a' is given"),
        (
            {"patch": SEVENTEEN, "default_patches": tuple(ABC)},
            "default_patches: at most 16, not 17",
        ),
    ],
)
def test_mistakes_name_the_option(options, named):
    with pytest.raises(ConfigError, match=named):
        PatchOptions(**options)


def test_the_folders_of_patches_must_exist(tmp_path):
    PatchOptions(patch=(f"a={tmp_path}",), patch_dir=str(tmp_path)).check_folders()
    with pytest.raises(ConfigError, match=r"^patch_dir: .*none: is not a folder"):
        PatchOptions(patch_dir=str(tmp_path / "none")).check_folders()
    with pytest.raises(ConfigError, match=r"^patch: law: .*none: is not a folder"):
        PatchOptions(patch=(f"a={tmp_path}", f"law={tmp_path}/none")).check_folders()


def test_an_engine_without_patches_reserves_nothing_for_them():
    assert PatchOptions().engine_config(EngineConfig()).max_patches == 0
    given = EngineConfig(max_patches=3, max_patch_rows=9)
    for options in (PatchOptions(patch=("a=d",)), PatchOptions(patch_dir="d")):
        assert options.engine_config(given) == given
    with pytest.raises(ConfigError, match="max_patches: needs --patch or --patch-dir"):
        PatchOptions().engine_config(given)
    assert PatchOptions().engine_config(EngineConfig(max_patches=0)).max_patches == 0
    for one in ({"max_patch_rows": 5}, {"patch_memory_gib": 2.0}):
        with pytest.raises(ConfigError, match="needs --patch or --patch-dir"):
            PatchOptions().engine_config(EngineConfig(max_patches=0, **one))


def test_an_engine_that_allows_too_few_patches_is_refused():
    two = PatchOptions(patch=("a=d", "b=e"))
    assert two.engine_config(EngineConfig(max_patches=2)).max_patches == 2
    for options, most, problem in (
        (two, 1, "1 is too few; 2 are given by --patch"),
        (two, 0, "0 is too few; 2 are given by --patch"),
        (PatchOptions(patch_dir="d"), 0, "0 is too few; --patch-dir needs 1"),
    ):
        with pytest.raises(ConfigError, match=f"^max_patches: {problem}$"):
            options.engine_config(EngineConfig(max_patches=most))
