"""The body of ``POST /v1/completions``."""

from collections.abc import Sequence
from typing import Any

from pydantic import Field, model_validator

from server.http.checked_fields import PromptField
from server.http.generation_options import MAX_SAMPLES, GenerationOptions
from server.http.request_body import drop_neutral


class CompletionRequest(GenerationOptions):
    """Continue one or more prompts."""

    prompt: PromptField = Field(
        description="a text, token ids, or a list of texts or of lists of token ids"
    )
    best_of: int | None = Field(
        default=None,
        ge=1,
        le=MAX_SAMPLES,
        description="generate this many answers per prompt and return the n likeliest",
    )
    logprobs: int | None = Field(
        default=None,
        description="return the log-probability of each token and of this many likeliest ones",
    )
    prompt_logprobs: int | None = Field(
        default=None,
        description="return the log-probability of each prompt token and of this many likeliest",
    )
    echo: bool = Field(default=False, description="return the prompt before the answer")
    add_special_tokens: bool = Field(
        default=True, description="add the model's special tokens, often a begin token, to texts"
    )
    truncate_prompt_tokens: int | None = Field(
        default=None,
        ge=-1,
        description="keep only this many tokens at the end of a prompt; -1 keeps what fits",
    )
    suffix: str | None = Field(
        default=None, description="accepted for OpenAI's clients; only an empty one is supported"
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, values: Any) -> Any:
        return drop_neutral(values, {"suffix": ""})

    @model_validator(mode="after")
    def _check_together(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"best_of: must be at least n ({self.n}), not {self.best_of}")
        if self.num_samples > self.n and self.stream:
            raise ValueError(
                "best_of: more than n cannot be streamed, because all must end before ranking"
            )
        if self.truncate_prompt_tokens == 0:
            raise ValueError(
                "truncate_prompt_tokens: must be -1 or at least 1, because 0 leaves no prompt"
            )
        return self

    @property
    def num_samples(self) -> int:
        return self.best_of or self.n

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """The prompts as a list: either all texts or all token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt

    def decided(self, most_tokens: int) -> dict[str, Any]:
        listed = {"logprobs": self.logprobs, "prompt_logprobs": self.prompt_logprobs}
        given: dict[str, Any] = {name: n for name, n in listed.items() if n is not None}
        if self.echo and (self.logprobs is not None or self.max_tokens == 0):
            given["prompt_logprobs"] = max(self.logprobs or 0, self.prompt_logprobs or 0)
        if self.num_samples > self.n:
            given.setdefault("logprobs", 0)  # they rank the samples
        return given
