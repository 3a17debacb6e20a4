"""List of all settings of ``memplus train``, from the fields that hold them, and an example."""

import inspect
import re
import typing
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from typing import Any

from engine.model.config import MEMORY_KINDS, MemoryConfig
from weights.training.model_keys import MODEL_SETTINGS, default_values
from weights.training.settings_toml import toml_value
from weights.training.train_config import DataConfig, OptimizerConfig, RunConfig

_SECTIONS = {"data": DataConfig, "optimizer": OptimizerConfig, "run": RunConfig}
_TYPES = {int: "integer", float: "number", bool: "true or false", str: "text"}
_INTRODUCTION = """\
Settings of `memplus train CONFIG.toml`. Relative paths are relative to the folder in which the
command runs. `--set SECTION.KEY=VALUE` overrides a key of the file.
"""
_EXAMPLE = {
    "data.train": '["texts"]',
    "run.steps": "1000",
    "model.hidden_size": "256",
    "model.intermediate_size": "768",
    "model.num_hidden_layers": "6",
    "model.num_attention_heads": "4",
    "model.tie_word_embeddings": "true",
    "model.memory.layers": '{"2" = "memory_plus", "4" = "memory_plus"}',
    "model.memory.num_heads": "4",
    "model.memory.num_subkeys": "256",
    "model.memory.top_k": "16",
    "model.memory.query_dim": "128",
    "model.memory.value_dim": "256",
    "model.memory.qk_norm": "true",
}


@dataclass(frozen=True)
class Setting:
    """One key of the TOML file.

    Attributes:
        section: its section.
        key: its name there.
        kind: its type, in words.
        default: its default as TOML; ``required`` or ``none`` if it has none.
        meaning: its meaning and unit.
    """

    section: str
    key: str
    kind: str
    default: str
    meaning: str


def all_settings() -> list[Setting]:
    """Every key of every section, in the order of the file."""
    values = default_values()
    found = [
        Setting("model", key, kind, default or toml_value(values[key]), meaning)
        for key, kind, default, meaning in MODEL_SETTINGS
    ]
    layers = f"kind of each memory layer, by its index: {', '.join(MEMORY_KINDS)}"
    found.append(Setting("model.memory", "layers", "table", "required", layers))
    found += _fields("model.memory", MemoryConfig)
    for section, kind in _SECTIONS.items():
        found += _fields(section, kind)
    return found


def describe_settings() -> str:
    """The list for the terminal."""
    lines = [_INTRODUCTION]
    section = ""
    for one in all_settings():
        if one.section != section:
            section = one.section
            lines += ["", f"[{section}]"] if len(lines) > 1 else [f"[{section}]"]
        lines.append(f"  {one.key} ({one.kind}; {_default_text(one)})")
        lines.append(f"      {one.meaning}")
    return "\n".join(lines)


def settings_table(section: str) -> str:
    """The section's keys as a table in Markdown, as docs/training.md has it."""
    rows = [
        f"| `{one.key}` | {one.kind} | {_code(one.default)} | {one.meaning} |"
        for one in all_settings()
        if one.section == section
    ]
    return "\n".join(("| key | type | default | meaning |", "|---|---|---|---|", *rows))


def example_config() -> str:
    """A TOML file that trains a small model; the keys with defaults are comments."""
    lines = ["# memplus train CONFIG.toml --out DIR; relative to the folder in which it runs"]
    section = ""
    for one in all_settings():
        if one.section != section:
            section = one.section
            lines += ["", f"[{section}]"]
        value = _EXAMPLE.get(f"{section}.{one.key}")
        if value is not None:
            lines.append(f"{one.key} = {value}  # {one.meaning}")
        elif one.default not in ("required", "none"):
            lines.append(f"# {one.key} = {one.default}  # {one.meaning}")
        else:
            lines.append(f"# {one.key}: {one.kind}, {one.meaning}")
    return "\n".join(lines) + "\n"


def _fields(section: str, kind: type) -> Iterator[Setting]:
    hints, meanings = typing.get_type_hints(kind), attribute_texts(kind)
    for field in fields(kind):
        choices = field.metadata.get("choices")
        name = " or ".join(choices) if choices else _type_text(hints[field.name])
        default = "required" if field.default is MISSING else toml_value(field.default)
        yield Setting(section, field.name, name, default, meanings[field.name])


def attribute_texts(kind: type) -> dict[str, str]:
    """The texts of ``Attributes:`` in a dataclass's docstring, by field."""
    part = (inspect.getdoc(kind) or "").partition("Attributes:\n")[2]
    found: dict[str, str] = {}
    name = ""
    for line in part.splitlines():
        if match := re.match(r" {4}(\w+): (.*)", line):
            name = match[1]
            found[name] = match[2]
        elif line.startswith("        "):
            found[name] += f" {line.strip()}"
        else:
            break
    return {name: text.replace("``", "`").rstrip(".") for name, text in found.items()}


def _type_text(hint: Any) -> str:
    return _TYPES.get(hint, "list of texts")


def _default_text(one: Setting) -> str:
    return one.default if one.default == "required" else f"default {one.default}"


def _code(text: str) -> str:
    return text if text in ("required", "none") else f"`{text}`"
