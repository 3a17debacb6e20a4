"""Chat messages and tools as clients send them, and as chat templates read them."""

import contextlib
import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from server.http.checked_fields import check_text
from server.http.request_body import RequestBody, drop_neutral

MAX_MESSAGES = 4096
MAX_TOOLS = 128

Text = Annotated[str, AfterValidator(check_text)]
FunctionName = Annotated[str, Field(pattern="^[A-Za-z0-9_.-]{1,64}$")]
# fields of OpenAI's response messages that clients send back
_NEUTRAL = {"refusal": "", "annotations": [], "audio": {}, "function_call": {}}


class ContentPart(RequestBody):
    """A part of a message's content."""

    type: Literal["text"] = Field(description="only texts; the model reads no images or sounds")
    text: Text = Field(description="the text")


class CalledFunction(RequestBody):
    """The function of a tool call."""

    name: FunctionName = Field(description="the function's name")
    arguments: Text = Field(description="the arguments, a JSON object as text")


class ToolCall(RequestBody):
    """A call that an assistant's message made."""

    id: str = Field(default="", max_length=256, description="the call's id")
    type: Literal["function"] = Field(default="function", description="always function")
    function: CalledFunction = Field(description="the called function")
    index: int = Field(default=0, description="position of the call, in streamed messages")


class ChatMessage(RequestBody):
    """A message of the conversation."""

    role: Annotated[str, Field(pattern="^[A-Za-z_]{1,32}$")] = Field(
        description="system, developer, user, assistant or tool, as far as the template knows it"
    )
    content: Text | Annotated[list[ContentPart], Field(max_length=1024)] | None = Field(
        default=None, description="a text, or parts that are joined by newlines"
    )
    name: Annotated[str, Field(max_length=256)] | None = Field(
        default=None, description="the participant's name"
    )
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] = Field(
        default=[], description="calls that the assistant made"
    )
    tool_call_id: Annotated[str, Field(max_length=256)] | None = Field(
        default=None, description="the call that a tool's message answers"
    )
    reasoning_content: Text | None = Field(
        default=None, description="the assistant's reasoning, for templates that show it"
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, values: Any) -> Any:
        return drop_neutral(values, _NEUTRAL)

    def for_template(self) -> dict[str, Any]:
        """The message as templates expect it: content as one text, arguments as objects."""
        message: dict[str, Any] = {"role": self.role, "content": self.text}
        for name in ("name", "tool_call_id", "reasoning_content"):
            value = getattr(self, name)
            if value is not None:
                message[name] = value
        if self.tool_calls:
            message["tool_calls"] = [_call_for_template(call) for call in self.tool_calls]
        return message

    @property
    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""


class FunctionDefinition(RequestBody):
    """A function that the model may call."""

    name: FunctionName = Field(description="the function's name")
    description: Text | None = Field(default=None, description="what the function does")
    parameters: dict[str, Any] = Field(
        default={}, description="the arguments, as a JSON Schema of an object"
    )
    strict: bool = Field(
        default=False,
        description="calls always match the schema, as they do with tool_choice required",
    )


class Tool(RequestBody):
    """A tool that the model may call."""

    type: Literal["function"] = Field(description="always function")
    function: FunctionDefinition = Field(description="the function")


class ChosenFunction(RequestBody):
    """The function that must be called."""

    name: FunctionName = Field(description="the function's name")


class ToolChoice(RequestBody):
    """A tool that must be called."""

    type: Literal["function"] = Field(description="always function")
    function: ChosenFunction = Field(description="the function")


def _call_for_template(call: ToolCall) -> dict[str, Any]:
    arguments: Any = call.function.arguments
    # a client may send back the arguments of an answer that was cut off
    with contextlib.suppress(ValueError):
        arguments = json.loads(arguments)
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}
