"""Reads the added and special tokens that a checkpoint folder lists beside its vocabulary."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken

from weights.checkpoints.json_fields import typed
from weights.errors import CheckpointError
from weights.text_files import read_json_object

CONFIG_FILE = "tokenizer_config.json"
_ADDED_FILE, _MAP_FILE = "added_tokens.json", "special_tokens_map.json"
_NAMED = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_LISTED = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_MAX_ID = 2**20


class ListedToken(NamedTuple):
    """A token of a folder's files; ``token_id`` is None if they only name it."""

    token: AddedToken
    token_id: int | None


@dataclass(frozen=True)
class TokenizerConfig:
    """The settings of a folder that say how text becomes tokens.

    Attributes:
        listed: added and special tokens; those with ids come first, in the order of their ids.
        bos: name of the begin token; None if the files do not name it.
        eos: name of the end token.
        add_bos: whether a text begins with the begin token; None if the files do not say it.
        add_eos: whether a text ends with the end token.
        add_prefix_space: whether a space is added before a text, if not as the vocabulary says.
        is_legacy: whether that space is added after every special token too.
        splits_special: whether the names of special tokens in a text are plain text.
    """

    listed: tuple[ListedToken, ...] = ()
    bos: str | None = None
    eos: str | None = None
    add_bos: bool | None = None
    add_eos: bool = False
    add_prefix_space: bool | None = None
    is_legacy: bool = True
    splits_special: bool = False


def read_tokenizer_config(folder: Path) -> TokenizerConfig:
    """Read the folder's JSON files about tokens; those that do not exist say nothing.

    As in Hugging Face's code, ``added_tokens_decoder`` of tokenizer_config.json stands for the
    other two files, and tokens that are named without an id get the next free ids.

    Raises:
        CheckpointError: a file is not a JSON object, or has a wrong value.
    """
    config = _read(folder / CONFIG_FILE)
    path = folder / CONFIG_FILE
    try:
        if "added_tokens_decoder" in config:
            names, added = config, dict(_decoder(config["added_tokens_decoder"]))
        else:
            path = folder / _MAP_FILE
            names = config | _read(path)
            special = {token.content for token in _named(names)}
            path = folder / _ADDED_FILE
            added = dict(_added(_read(path), special))
        listed = [ListedToken(added[token_id], token_id) for token_id in sorted(added)]
        known = {one.token.content for one in listed}
        for token in _named(names):
            if token.content not in known:
                known.add(token.content)
                listed.append(ListedToken(token, None))
        path = folder / CONFIG_FILE
        flag = {key: _flag(config, key) for key in _CONFIG_FLAGS}
        return TokenizerConfig(
            listed=tuple(listed),
            bos=_name(names, "bos_token"),
            eos=_name(names, "eos_token"),
            add_bos=flag["add_bos_token"],
            add_eos=bool(flag["add_eos_token"]),
            add_prefix_space=flag["add_prefix_space"],
            is_legacy=flag["legacy"] is not False,
            splits_special=bool(flag["split_special_tokens"]),
        )
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


_CONFIG_FLAGS = (
    *("add_bos_token", "add_eos_token", "add_prefix_space"),
    *("legacy", "split_special_tokens"),
)


def _read(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.exists() else {}


def _flag(config: Mapping[str, Any], key: str) -> bool | None:
    value = config.get(key)
    return None if value is None else bool(typed(key, value, bool))


def _name(names: Mapping[str, Any], key: str) -> str | None:
    value = names.get(key)
    return None if value is None else _token(key, value).content


def _decoder(listed: object) -> Iterator[tuple[int, AddedToken]]:
    for name, value in typed("added_tokens_decoder", listed, dict).items():
        where = f"added_tokens_decoder.{name}"
        if not (name.isascii() and name.isdigit()):
            raise ValueError(f"{where}: is not a token id")
        special = bool(typed(where, value, dict).get("special", False))
        yield _checked_id(where, int(name)), _token(where, value, special)


def _added(listed: Mapping[str, object], special: set[str]) -> Iterator[tuple[int, AddedToken]]:
    for content, token_id in listed.items():
        token = AddedToken(content, special=content in special, normalized=content not in special)
        yield _checked_id(content, typed(content, token_id, int)), token


def _checked_id(where: str, token_id: int) -> int:
    if not 0 <= token_id < _MAX_ID:
        raise ValueError(f"{where}: the id {token_id} is not from 0 to {_MAX_ID - 1}")
    return token_id


def _named(names: Mapping[str, Any]) -> Iterator[AddedToken]:
    """The special tokens that settings name, in the order in which new ones get ids."""
    for key in _NAMED:
        if names.get(key) is not None:
            yield _token(key, names[key])
    for key in _LISTED:
        values = names.get(key) or []
        # some files give each a name for use in code
        for value in values.values() if isinstance(values, dict) else typed(key, values, list):
            yield _token(key, value)


def _token(where: str, value: object, special: bool = True) -> AddedToken:
    """A token that is written as its content, or as an object with flags."""
    if isinstance(value, str):
        value = {"content": value}
    fields = typed(where, value, dict)
    content = typed(f"{where}.content", fields.get("content"), str)
    if not content:
        raise ValueError(f"{where}: is empty")
    flags = {key: typed(f"{where}.{key}", fields[key], bool) for key in _FLAGS if key in fields}
    return AddedToken(content, **({"normalized": not special} | flags | {"special": special}))
