"""API keys: formats, roles, sources, and errors that never show a key."""

import pytest

from engine.errors import ConfigError
from server.access import AccessOptions
from server.api_keys import ApiKeys, parse_key


def test_keys_come_from_the_options_the_file_and_the_environment(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# operators\n\nroot-key alice admin\n  plain-key\nci-key build.bot\n")
    options = AccessOptions(api_key=("first", "second"), api_key_file=str(file))
    keys = options.keys("third,fourth bob\nfifth admin")
    found = {name: keys.find(name.encode()) for name in ("root-key", "plain-key", "ci-key")}
    assert {name: (key.name, key.is_admin) for name, key in found.items()} == {
        "root-key": ("alice", True),
        "plain-key": ("", False),
        "ci-key": ("build.bot", False),
    }
    assert keys.find(b"fourth").name == "bob" and keys.find(b"fifth").is_admin
    assert all(keys.find(name) for name in (b"first", b"second", b"third"))
    for wrong in (b"", b"First", b"first ", b"#", b"alice", b"root-key alice admin"):
        assert keys.find(wrong) is None


def test_without_any_key_there_are_none(tmp_path):
    assert not AccessOptions().keys("") and not AccessOptions().keys(" , \n")
    assert AccessOptions(api_key=("x",)).keys("")


def test_a_key_may_be_limited_to_named_patches():
    keys = AccessOptions(api_key=("all", "none patches=")).keys("two bob admin patches=a:b.c,x")
    limits = {name: keys.find(name.encode()).patches for name in ("all", "none", "two", "x")}
    assert limits == {"all": None, "none": frozenset(), "two": frozenset({"a", "b.c"}), "x": None}
    two, none = keys.find(b"two"), keys.find(b"none")
    assert two.is_admin and two.name == "bob" and two.may_use("a") and not two.may_use("c")
    assert keys.find(b"all").may_use("anything") and not none.may_use("a")


@pytest.mark.parametrize(
    "text",
    [
        *("", "sëcret", "secret,", "secret a b", "secret a! admin", "s" * 513, "secret admin a"),
        *("secret patches=a:", "secret patches=a+b", "secret patches=a admin", "secret patches=.a"),
    ],
)
def test_a_malformed_key_is_an_error_that_does_not_show_it(text):
    with pytest.raises(ConfigError, match=r"^here: ") as raised:
        parse_key(text, "here")
    assert "s\N{LATIN SMALL LETTER E WITH DIAERESIS}cret" not in str(raised.value)
    assert "secret" not in str(raised.value) and "ss" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "No such file"),
        (b"# nothing\n", "has no key"),
        (b"good\nbad one two\n", "line 2"),
        (b"\xff\xfe", "UTF-8"),
    ],
)
def test_a_bad_file_is_one_error_that_names_it(tmp_path, content, named):
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"api_key_file: {file}.*{named}"):
        AccessOptions(api_key_file=str(file)).keys("")


def test_a_key_may_be_given_once_only():
    with pytest.raises(ConfigError, match="twice"):
        AccessOptions(api_key=("same",)).keys("same admin")


def test_keys_are_not_in_representations():
    keys = ApiKeys([parse_key("secret alice", "")])
    key = keys.find(b"secret")
    assert "secret" not in repr(key) + repr(vars(keys)) and key.digest.hex() not in repr(key)
