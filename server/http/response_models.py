"""Responses as the OpenAPI document describes them; routes write them without these classes."""

from typing import Literal

from pydantic import BaseModel, Field


class ErrorDetails(BaseModel):
    """An error in OpenAI's format."""

    message: str = Field(description="the reason")
    type: str = Field(
        description="invalid_request_error, server_error, overloaded_error or timeout_error"
    )
    param: str | None = Field(description="the field with the mistake")
    code: str | None = Field(description="a code for programs")


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorDetails = Field(description="the error")


class PromptDetails(BaseModel):
    """Details of the prompt's tokens."""

    cached_tokens: int = Field(description="prompt tokens found in the prefix cache")


class CompletionDetails(BaseModel):
    """Details of the generated tokens."""

    accepted_prediction_tokens: int = Field(description="draft tokens that were accepted")
    rejected_prediction_tokens: int = Field(description="draft tokens that were rejected")


class Usage(BaseModel):
    """Token counts."""

    prompt_tokens: int = Field(description="tokens of all prompts")
    completion_tokens: int = Field(description="generated tokens of all answers")
    total_tokens: int = Field(description="their sum")
    prompt_tokens_details: PromptDetails = Field(description="details of the prompts")
    completion_tokens_details: CompletionDetails = Field(description="details of the answers")


class LayerReads(BaseModel):
    """The rows that one memory layer read for one token."""

    layer: int = Field(description="index of the layer")
    rows: list[int] = Field(description="rows with the largest weights, largest first")
    weights: list[float] = Field(description="their weights, summed over the heads")


class CommonAnswer(BaseModel):
    """Fields of the answers of both routes."""

    id: str = Field(description="the request's id")
    created: int = Field(description="seconds since 1970")
    model: str = Field(description="the served model's name")
    usage: Usage = Field(description="token counts")


class CommonChoice(BaseModel):
    """Fields of the choices of both routes."""

    index: int = Field(description="prompt index * n + sample")
    finish_reason: Literal["stop", "length", "tool_calls"] | None = Field(
        description="why the answer ended; null before its last chunk"
    )
    stop_reason: str | int | None = Field(description="the stop string or id that ended it")
    memory_trace: list[list[LayerReads]] | None = Field(
        default=None, description="for each token, the reads of each memory layer"
    )
    token_ids: list[int] | None = Field(default=None, description="generated token ids")


class Logprobs(BaseModel):
    """Log-probabilities of a completion's tokens."""

    tokens: list[str] = Field(description="texts of the tokens")
    token_logprobs: list[float | None] = Field(description="null for a prompt's first token")
    top_logprobs: list[dict[str, float] | None] = Field(description="likeliest tokens, by text")
    text_offset: list[int] = Field(description="the tokens' places in the text, in characters")


class PromptLogprob(BaseModel):
    """The log-probability of one token at a place of the prompt."""

    logprob: float = Field(description="natural logarithm of the probability")
    rank: int = Field(description="rank among all tokens, from 1")
    decoded_token: str = Field(description="the token's text")


class CompletionChoice(CommonChoice):
    """One answer, or a part of it in a stream."""

    text: str = Field(description="generated text")
    logprobs: Logprobs | None = Field(description="if requested")
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = Field(
        default=None, description="for each prompt token, log-probabilities by token id"
    )
    prompt_token_ids: list[int] | None = Field(default=None, description="the prompt's token ids")


class Completion(CommonAnswer):
    """A completion."""

    object: Literal["text_completion"] = Field(description="always text_completion")
    choices: list[CompletionChoice] = Field(description="the answers")


class CalledFunction(BaseModel):
    """The function of a call."""

    name: str = Field(description="the function's name")
    arguments: str = Field(description="the arguments, a JSON object as text")


class ToolCall(BaseModel):
    """A call of a function."""

    id: str = Field(description="the call's id")
    type: Literal["function"] = Field(description="always function")
    function: CalledFunction = Field(description="the called function")


class Message(BaseModel):
    """The assistant's message."""

    role: Literal["assistant"] = Field(description="always assistant")
    content: str | None = Field(description="the text; null if there are only calls")
    refusal: None = Field(description="always null")
    tool_calls: list[ToolCall] | None = Field(default=None, description="calls, if there are any")


class TokenLogprob(BaseModel):
    """A token and its log-probability."""

    token: str = Field(description="the token's text")
    logprob: float = Field(description="natural logarithm of the probability")
    bytes: list[int] = Field(description="the text's UTF-8 bytes")


class ChosenLogprob(TokenLogprob):
    """A generated token with the likeliest ones at its place."""

    top_logprobs: list[TokenLogprob] = Field(description="the likeliest tokens")


class ChatLogprobs(BaseModel):
    """Log-probabilities of a message's tokens."""

    content: list[ChosenLogprob] = Field(description="one entry per token")
    refusal: None = Field(description="always null")


class ChatChoice(CommonChoice):
    """One answer."""

    message: Message = Field(description="the message")
    logprobs: ChatLogprobs | None = Field(description="if requested")


class ChatCompletion(CommonAnswer):
    """A chat completion."""

    object: Literal["chat.completion"] = Field(description="always chat.completion")
    choices: list[ChatChoice] = Field(description="the answers")
    prompt_token_ids: list[int] | None = Field(default=None, description="the prompt's token ids")


class Model(BaseModel):
    """A served model."""

    id: str = Field(description="the model's name")
    object: Literal["model"] = Field(description="always model")
    created: int = Field(
        description="when the server started, or the patch was loaded, in seconds since 1970"
    )
    owned_by: str = Field(description="always memplus")
    root: str = Field(description="for vLLM's clients; the model without patches")
    parent: str | None = Field(description="the model that a row patch changes; null without one")
    max_model_len: int = Field(description="most tokens of a prompt and its answer together")
    has_chat_template: bool = Field(description="whether it takes chat requests")


class ModelList(BaseModel):
    """The served models."""

    object: Literal["list"] = Field(description="always list")
    data: list[Model] = Field(description="the model, and one for each loaded row patch")


class Tokens(BaseModel):
    """A text's tokens."""

    count: int = Field(description="number of tokens")
    max_model_len: int = Field(description="most tokens of a prompt and its answer together")
    tokens: list[int] = Field(description="token ids")
    token_strs: list[str] | None = Field(default=None, description="texts of the tokens")


class Detokenized(BaseModel):
    """The text of token ids."""

    prompt: str = Field(description="the text, without special tokens")


class ReadRow(BaseModel):
    """A row and its reads."""

    row: int = Field(description="the row's number")
    reads: int = Field(description="counted reads")


class ReadBucket(BaseModel):
    """Rows with about the same number of reads."""

    min_reads: int = Field(description="fewest counted reads")
    max_reads: int = Field(description="most counted reads")
    rows: int = Field(description="number of rows")


class RowUsage(BaseModel):
    """Reads of a table's rows, counted in one of 16 steps."""

    counted_reads: int = Field(description="reads that were counted")
    most_read: list[ReadRow] = Field(description="the rows with the most reads")
    histogram: list[ReadBucket] = Field(description="number of rows by reads")


class Table(BaseModel):
    """A value table."""

    table: str = Field(description="the table's name")
    tier: Literal["device", "host", "disk"] = Field(description="where its rows are stored")
    rows: int = Field(description="number of rows")
    row_values: int = Field(description="values per row")
    layers: list[int] = Field(description="memory layers that read it")
    usage: RowUsage | None = Field(description="null if its reads are not counted")


class Memory(BaseModel):
    """The model's value tables."""

    object: Literal["memory"] = Field(description="always memory")
    data: list[Table] = Field(description="the tables; none if the model has no memory layers")


class MemoryPatch(BaseModel):
    """A loaded row patch."""

    object: Literal["memory_patch"] = Field(description="always memory_patch")
    name: str = Field(description="its name for requests")
    created: int = Field(description="when it was loaded, in seconds since 1970")
    default: bool = Field(description="whether requests use it that name no patches")
    content_hash: str = Field(description="BLAKE3 of its rows and deltas")
    rows: int = Field(description="rows that it changes, over all tables")
    bytes: int = Field(description="memory that it takes")
    tables: dict[str, int] = Field(description="rows that it changes, by table")
    data: str | None = Field(description="hash of the data that it was learned from")


class MemoryPatchList(BaseModel):
    """The loaded row patches."""

    object: Literal["list"] = Field(description="always list")
    data: list[MemoryPatch] = Field(description="the patches, by name")


class DeletedPatch(BaseModel):
    """A row patch that was removed."""

    object: Literal["memory_patch.deleted"] = Field(description="always memory_patch.deleted")
    name: str = Field(description="its name")
    deleted: Literal[True] = Field(description="always true")
