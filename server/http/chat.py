"""``POST /v1/chat/completions``: conversations in the format of the model's chat template."""

import asyncio
from functools import partial
from typing import Any

from engine.errors import RequestError
from server.api_keys import ApiKey
from server.http.answer import Answer
from server.http.chat_choice import ChatChoice
from server.http.chat_request import ChatPrompt, ChatRequest
from server.http.generation import Generation, Ids
from server.http.required_calls import RequiredCalls
from server.http.service import Service
from server.http.tool_calls import parser_for
from server.http.tool_grammar import optional_calls, required_calls
from weights.checkpoints.chat_template import ChatTemplate
from weights.errors import ChatTemplateError


def chat_answer(service: Service, body: ChatRequest, key: ApiKey | None = None) -> Answer:
    """The answer to a chat request; it is generated when it is read.

    Raises:
        ApiError, RequestError: as ``Generation`` and ``Service.patches_for``, or the model has no
            chat template.
    """
    template = _template(service)
    parser = parser_for(template.source) if body.callable_tools else None
    grammar = body.grammar()
    if body.must_call or body.has_strict_tools:
        if parser is None:
            param = "tool_choice" if body.must_call else "tools"
            raise RequestError(param, "the model's chat template shows no tool calls")
        functions = [tool.function for tool in body.callable_tools]
        make_grammar = required_calls if body.must_call else optional_calls
        grammar = make_grammar(functions, parser, body.parallel_tool_calls)

    async def encode() -> list[Ids]:
        return [await chat_prompt(service, body)]

    def writer(prompt: int) -> ChatChoice:
        found = parser() if parser is not None else None
        required = RequiredCalls(parser) if parser is not None and body.must_call else None
        return ChatChoice(service.tokenizer, body, found, required)

    def prompt_fields() -> dict[str, Any]:
        return {"prompt_token_ids": generation.prompts[0]} if body.return_token_ids else {}

    find_patches = partial(service.patches_for, body.model, body.memory_patches, key)
    generation = Generation(service, body, "chatcmpl", 1, encode, grammar, find_patches)
    kinds = "chat.completion", "chat.completion.chunk"
    name = body.model or service.model_name
    return Answer(generation, name, kinds, writer, prompt_fields)


async def chat_prompt(service: Service, body: ChatPrompt) -> Ids:
    """Token ids of the prompt that the model's chat template makes of the messages.

    Raises:
        RequestError: the template does not accept them, or the prompt is too long.
    """
    template = _template(service)
    tools = body.callable_tools if isinstance(body, ChatRequest) else body.tools

    def render() -> str:
        return template.render(
            [message.for_template() for message in body.messages],
            tools=[tool.model_dump(exclude_unset=True) for tool in tools],
            add_generation_prompt=body.has_generation_prompt,
            continue_final_message=body.continue_final_message,
            variables=body.chat_template_kwargs,
        )

    try:
        text = await asyncio.to_thread(render)
    except ChatTemplateError as error:
        raise RequestError("messages", str(error)) from None
    # the template writes all special tokens itself
    return tuple(await service.encode(text, add_special_tokens=False))


def _template(service: Service) -> ChatTemplate:
    if service.chat_template is None:
        message = "the model has no chat template; start the server with --chat-template FILE"
        raise RequestError("messages", message)
    return service.chat_template
