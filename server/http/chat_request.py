"""The body of ``POST /v1/chat/completions``."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from server.http.chat_message import MAX_MESSAGES, MAX_TOOLS, ChatMessage, Tool, ToolChoice
from server.http.generation_options import GenerationOptions
from server.http.request_body import RequestBody, drop_neutral

# OpenAI's fields that have no effect with these values
_NEUTRAL = {
    "store": False,
    "service_tier": "auto",
    "modalities": ["text"],
    "metadata": {},
    "function_call": "none",
    "functions": [],
    "best_of": 1,
}
_RESERVED = {"messages", "tools", "add_generation_prompt"}


class ChatPrompt(RequestBody):
    """Fields that make a prompt of messages."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)] = Field(
        description="the conversation so far"
    )
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] = Field(
        default=[], description="functions that the model may call"
    )
    add_generation_prompt: bool | None = Field(
        default=None,
        description="end the prompt with the start of an assistant's message (default: true,"
        " unless continue_final_message is set)",
    )
    continue_final_message: bool = Field(
        default=False, description="continue the last message instead of beginning a new one"
    )
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=64)] = Field(
        default={}, description="further variables of the model's chat template"
    )

    @model_validator(mode="after")
    def _check_prompt(self) -> "ChatPrompt":
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError(
                "add_generation_prompt: cannot be true together with continue_final_message"
            )
        if self.continue_final_message and self.messages and self.messages[-1].tool_calls:
            raise ValueError("continue_final_message: the last message has tool calls")
        reserved = sorted(_RESERVED & self.chat_template_kwargs.keys())
        if reserved:
            raise ValueError(f"chat_template_kwargs: {reserved[0]} has a field of the request")
        return self

    @property
    def has_generation_prompt(self) -> bool:
        """Whether the prompt ends with the start of an assistant's message."""
        if self.add_generation_prompt is None:
            return not self.continue_final_message
        return self.add_generation_prompt


class ChatRequest(ChatPrompt, GenerationOptions):
    """Continue a conversation."""

    max_completion_tokens: int | None = Field(
        default=None, description="OpenAI's newer name of max_tokens"
    )
    logprobs: bool = Field(
        default=False, description="return the log-probability of each generated token"
    )
    top_logprobs: int | None = Field(
        default=None, description="also return those of this many likeliest tokens; needs logprobs"
    )
    tool_choice: Literal["none", "auto", "required"] | ToolChoice = Field(
        default="auto",
        description="none: no call; auto: the model decides; required: at least one call;"
        " an object: this function",
    )
    parallel_tool_calls: bool = Field(default=True, description="allow more than one call")
    safety_identifier: str | None = Field(
        default=None, description="accepted for OpenAI's clients; not used"
    )
    prompt_cache_key: str | None = Field(
        default=None, description="accepted for OpenAI's clients; equal prefixes are always cached"
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, values: Any) -> Any:
        return drop_neutral(values, _NEUTRAL)

    @model_validator(mode="after")
    def _check_together(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs to be true")
        if None not in (self.max_tokens, self.max_completion_tokens) and (
            self.max_tokens != self.max_completion_tokens
        ):
            raise ValueError("max_completion_tokens: differs from max_tokens")
        if self.response_format or self.structured_outputs:
            if self.must_call:
                raise ValueError("tool_choice: a required call cannot be combined with a format")
            if self.has_strict_tools:
                raise ValueError("tools: strict cannot be combined with a format")
        if self.must_call and not self.tools:
            raise ValueError("tool_choice: needs tools")
        if isinstance(self.tool_choice, ToolChoice) and not self.callable_tools:
            name = self.tool_choice.function.name
            raise ValueError(f"tool_choice: tools has no function {name!r}")
        return self

    @property
    def must_call(self) -> bool:
        """Whether the answer has to be a call."""
        return self.tool_choice not in ("none", "auto")

    @property
    def has_strict_tools(self) -> bool:
        """Whether the arguments of a call have to fit its function's schema."""
        return any(tool.function.strict for tool in self.callable_tools)

    @property
    def callable_tools(self) -> Sequence[Tool]:
        """The tools that the answer may call."""
        if isinstance(self.tool_choice, ToolChoice):
            name = self.tool_choice.function.name
            return [tool for tool in self.tools if tool.function.name == name]
        return [] if self.tool_choice == "none" else self.tools

    def decided(self, most_tokens: int) -> dict[str, Any]:
        given: dict[str, Any] = {"logprobs": self.top_logprobs or 0} if self.logprobs else {}
        if self.max_completion_tokens is not None:
            given["max_tokens"] = self.max_completion_tokens
        elif self.max_tokens is None:
            # a chat answer ends by itself, so by default only the model's length limits it
            given["max_tokens"] = max(most_tokens, 1)
        return given
