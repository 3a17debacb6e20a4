"""A model's chat template: chat messages to the text of a prompt, in sandboxed jinja2."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from weights.errors import ChatTemplateError, CheckpointError
from weights.text_files import ENCODING, read_json_object, regular_file_bytes

# text after the last message, at which the prompt ends; templates that trim drop its last space
_CUT = "<memplus:end of the last message>"
# the template that Hugging Face uses for requests with tools, if a model has several
_WITH_TOOLS = "tool_use"
_MAX_BYTES = 2**24


class ChatTemplate:
    """The compiled template of a model, in Hugging Face's dialect of jinja2.

    Attributes:
        source: the template's text.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        with_tools: str | None = None,
    ) -> None:
        """Compile a template.

        Args:
            source: the template's text.
            special_tokens: texts by name (``bos_token``), which the template can use.
            with_tools: another template for requests with tools.

        Raises:
            ChatTemplateError: a template is not valid jinja2.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        try:
            self._template = environment.from_string(source)
            self._with_tools = environment.from_string(with_tools) if with_tools else self._template
        except jinja2.TemplateError as error:
            message = f"the model's chat template is not valid: {_one_line(error)}"
            raise ChatTemplateError(message) from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text, with all special tokens that the model needs.

        Args:
            messages: objects with ``role`` and, mostly, ``content``.
            tools: functions that the model may call, in OpenAI's format.
            add_generation_prompt: end with the start of an assistant's message.
            continue_final_message: end within the last message, whose content is a text.
            variables: further variables of the template.

        Raises:
            ChatTemplateError: the template does not accept these messages.
        """
        if continue_final_message:
            last = dict(messages[-1])
            last["content"] = f"{last.get('content') or ''}{_CUT} "
            messages = [*messages[:-1], last]
        values: dict[str, Any] = {**self._special_tokens, **(variables or {})}
        values |= {"messages": list(messages), "tools": list(tools) if tools else None}
        values["add_generation_prompt"] = add_generation_prompt
        try:
            text = (self._with_tools if tools else self._template).render(values)
        except Exception as error:  # templates are programs: any exception can come out of one
            message = f"the chat template refuses the messages: {_one_line(error)}"
            raise ChatTemplateError(message) from None
        if not continue_final_message:
            return text
        before, cut, after = text.rpartition(_CUT)
        if not cut:
            raise ChatTemplateError("the chat template does not show the last message")
        return before if after.startswith(" ") else before.rstrip()


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` blocks, which mark the assistant's text for training."""

    tags = frozenset({"generation"})  # type: ignore[assignment]  # jinja2 only reads it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def load_chat_template(folder: Path, override: Path | None = None) -> ChatTemplate | None:
    """The template of a model folder, or of the file ``override``; None if there is none.

    Raises:
        ChatTemplateError: the template is not valid jinja2.
        CheckpointError: a file cannot be read.
    """
    config = _tokenizer_config(folder)
    special = {
        name: value["content"] if isinstance(value, dict) else value
        for name, value in config.items()
        if name.endswith("_token") and isinstance(value, str | dict)
    }
    path = override or folder / "chat_template.jinja"
    if override is not None or path.exists():
        if override is None:  # a caller may give a pipe
            regular_file_bytes(path, _MAX_BYTES)
        return ChatTemplate(_read(path), special)
    given = config.get("chat_template")
    if given is None and (folder / "chat_template.json").exists():
        given = read_json_object(folder / "chat_template.json").get("chat_template")
    if isinstance(given, list):
        named = {one.get("name"): one.get("template") for one in given if isinstance(one, dict)}
        plain = named.get("default") or next(iter(named.values()), None)
        return ChatTemplate(str(plain), special, named.get(_WITH_TOOLS)) if plain else None
    return ChatTemplate(given, special) if isinstance(given, str) else None


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_json_object(path) if path.exists() else {}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding=ENCODING)
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None


def _tojson(value: Any, **options: Any) -> str:
    # jinja2's own filter escapes characters for HTML
    return json.dumps(value, **{"ensure_ascii": False} | options)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
