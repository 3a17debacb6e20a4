"""The bodies of ``POST /tokenize`` and ``POST /detokenize``."""

from typing import Annotated

from pydantic import Field, model_validator

from server.http.chat_message import MAX_MESSAGES, ChatMessage, Text
from server.http.chat_request import ChatPrompt
from server.http.request_body import RequestBody


class TokenizeRequest(ChatPrompt):
    """Token ids of a text, or of the prompt that the chat template makes of messages."""

    model: str | None = Field(default=None, description="the served model's name")
    prompt: Text | None = Field(default=None, description="a text")
    messages: Annotated[list[ChatMessage], Field(max_length=MAX_MESSAGES)] = Field(
        default=[], description="a conversation, instead of a text"
    )
    add_special_tokens: bool = Field(
        default=True, description="add the model's special tokens, often a begin token, to a text"
    )
    return_token_strs: bool = Field(default=False, description="also return each token's text")

    @model_validator(mode="after")
    def _check_one_given(self) -> "TokenizeRequest":
        if (self.prompt is None) == (not self.messages):
            raise ValueError("prompt: give either prompt or messages")
        return self


class DetokenizeRequest(RequestBody):
    """The text of token ids."""

    model: str | None = Field(default=None, description="the served model's name")
    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field(description="token ids")
