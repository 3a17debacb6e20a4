"""Request fields that restrict an answer to a grammar."""

import json
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from engine.sampling.grammar import Grammar
from server.http.request_body import RequestBody

MAX_CHOICES = 1024


class JsonSchemaFormat(RequestBody):
    """The schema of a response format."""

    name: Annotated[str, Field(max_length=64)] = Field(
        default="", description="a name; it has no effect"
    )
    description: str | None = Field(default=None, description="a description; it has no effect")
    schema_: dict[str, Any] = Field(alias="schema", description="the JSON Schema")
    strict: bool = Field(default=True, description="accepted; the answer always fits the schema")


class ResponseFormat(RequestBody):
    """The format of the answer, as OpenAI's clients send it."""

    type: Literal["text", "json_object", "json_schema"] = Field(
        description="any text, a JSON object, or JSON that fits a schema"
    )
    json_schema: JsonSchemaFormat | None = Field(
        default=None, description="the schema, for json_schema"
    )

    @model_validator(mode="after")
    def _check_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema must be given if and only if type is json_schema")
        return self

    def grammar(self) -> Grammar | None:
        """The grammar of the format; None for any text."""
        if self.type == "text":
            return None
        if self.json_schema is None:
            return Grammar("json_object", param="response_format")
        return Grammar("json_schema", json.dumps(self.json_schema.schema_), "response_format")


class StructuredOutputs(RequestBody):
    """The grammar of the answer, as vLLM's clients send it; exactly one field."""

    model_config = ConfigDict(protected_namespaces=())

    json_: dict[str, Any] | str | None = Field(
        default=None, alias="json", description="a JSON Schema, as an object or as text"
    )
    regex: str | None = Field(default=None, description="a regular expression")
    choice: Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)] | None = Field(
        default=None, description="the allowed answers"
    )
    grammar_: str | None = Field(
        default=None, alias="grammar", description="a grammar in Lark or GBNF notation"
    )
    json_object: bool | None = Field(default=None, description="true: any JSON object")

    @model_validator(mode="after")
    def _check_one(self) -> "StructuredOutputs":
        given = (self.json_, self.regex, self.choice, self.grammar_, self.json_object or None)
        if sum(one is not None for one in given) != 1:
            raise ValueError("give exactly one of json, regex, choice, grammar, json_object")
        return self

    def grammar(self) -> Grammar:
        """The grammar."""
        if self.json_ is not None:
            source = self.json_ if isinstance(self.json_, str) else json.dumps(self.json_)
            return Grammar("json_schema", source)
        if self.regex is not None:
            return Grammar("regex", self.regex)
        if self.choice is not None:
            return Grammar("choice", tuple(self.choice))
        if self.grammar_ is not None:
            return Grammar("grammar", self.grammar_)
        return Grammar("json_object")
