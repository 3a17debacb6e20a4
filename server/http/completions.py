"""``POST /v1/completions``: prompts of text or token ids."""

from functools import partial

from server.api_keys import ApiKey
from server.http.answer import Answer
from server.http.completion_choice import CompletionChoice
from server.http.completion_request import CompletionRequest
from server.http.generation import Generation, Ids
from server.http.service import Service
from weights.checkpoints.truncation import last_tokens


def completion_answer(
    service: Service, body: CompletionRequest, key: ApiKey | None = None
) -> Answer:
    """The answer to a completion request; it is generated when it is read.

    Raises:
        ApiError, RequestError: as ``Generation`` and ``Service.patches_for``.
    """

    async def encode() -> list[Ids]:
        return [await _prompt_ids(service, body, prompt) for prompt in body.prompts]

    def writer(prompt: int) -> CompletionChoice:
        given = body.prompts[prompt]
        # echo a text prompt as it was sent, unless it was truncated
        text = given if isinstance(given, str) and not body.truncate_prompt_tokens else None
        return CompletionChoice(service.tokenizer, body, generation.prompts[prompt], text)

    count, grammar = len(body.prompts), body.grammar()
    find_patches = partial(service.patches_for, body.model, body.memory_patches, key)
    generation = Generation(service, body, "cmpl", count, encode, grammar, find_patches)
    name = body.model or service.model_name
    return Answer(generation, name, ("text_completion", "text_completion"), writer)


async def _prompt_ids(service: Service, body: CompletionRequest, prompt: str | list[int]) -> Ids:
    keep = body.truncate_prompt_tokens
    if isinstance(prompt, str):
        ids = await service.encode(prompt, body.add_special_tokens, only_end=keep is not None)
    else:
        ids = prompt
    if keep is not None:
        longest = service.limits.max_model_len
        most = longest - body.sampling(longest).max_tokens
        keep = max(most, 1) if keep == -1 else keep
        has_special = isinstance(prompt, str) and body.add_special_tokens
        ids = last_tokens(service.tokenizer, ids, keep) if has_special else ids[-keep:]
    return tuple(ids)
