"""Conversations of the OpenAI API as this service accepts them: messages, tool calls, tools, and the format of a reply.

A message that this service, or another one, returned is accepted as it came, in the history of the next request."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from rlhf_ray.serve.strict_json import load_json

Text = Annotated[str, Field(max_length=1_000_000)]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
MAX_LIST = 10_000
"""Entries of a list that the service's limits bound further. A list ends at its first fault, and a union is told apart by its first
entry: a megabyte of faults, in each of four forms, kept every other client waiting for 13 s."""


def _asks_for_nothing(value: Any) -> bool:
    if isinstance(value, dict):
        return all(part is None for part in value.values())
    return value is None or value is False or value in ("", [])


class StrictModel(BaseModel):
    """Unknown fields are refused, but for those that ask for nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, values: Any) -> Any:
        """Without unknown fields that are null, false or empty: clients send those of other services along."""
        if not isinstance(values, dict):
            return values
        return {
            name: value for name, value in values.items() if name in cls.model_fields or not _asks_for_nothing(value)
        }


def text_or_parts(content: Any) -> str:
    return "a-parts" if isinstance(content, list) else "a-text"


class TextPart(StrictModel):
    type: Literal["text"]
    text: Text


class CalledFunction(StrictModel):
    """arguments: a JSON object, as text."""

    name: Name
    arguments: Text = "{}"

    @model_validator(mode="after")
    def _arguments_are_json(self) -> CalledFunction:
        try:
            found = load_json(self.arguments or "{}")
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise ValueError("arguments: expected a JSON object, as text")
        return self


class ToolCall(StrictModel):
    id: Annotated[str, Field(max_length=256)] = ""
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """As chat templates read it: with arguments as an object."""
        arguments = json.loads(self.function.arguments or "{}")
        return {
            "type": "function",
            **({"id": self.id} if self.id else {}),
            "function": {"name": self.function.name, "arguments": arguments},
        }


class ChatMessage(StrictModel):
    """name of a tool, and the assistant's reasoning: given to the chat template, which writes what the model is to read again (what
    it thought between two calls of tools, say). Any other name is accepted and ignored.

    content: None, or none at all, of an assistant who said nothing."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: (
        Annotated[
            Annotated[Text, Tag("a-text")]
            | Annotated[list[TextPart], Field(max_length=100, fail_fast=True), Tag("a-parts")],
            Discriminator(text_or_parts),
        ]
        | None
    ) = None
    name: Annotated[str, Field(max_length=256)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128, fail_fast=True)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    annotations: list[Any] | None = None
    provider_specific_fields: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _only_the_assistant(self) -> ChatMessage:
        if self.content is None and self.role != "assistant":
            raise ValueError("content: expected a text")
        if self.role != "assistant" and (self.reasoning_content or self.reasoning):
            raise ValueError("reasoning_content: only the assistant reasons")
        if self.role != "assistant" and self.tool_calls:
            raise ValueError("tool_calls: only the assistant calls tools")
        if self.role != "tool" and self.tool_call_id:
            raise ValueError("tool_call_id: only of a tool's answer")
        return self

    def to_dict(self) -> dict[str, Any]:
        """As chat templates read it."""
        said = self.content or ""
        text = said if isinstance(said, str) else "".join(part.text for part in said)
        found: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text}
        if self.tool_calls:
            found["tool_calls"] = [call.to_dict() for call in self.tool_calls]
        names = {"assistant": ("reasoning_content", "reasoning"), "tool": ("tool_call_id", "name")}.get(self.role, ())
        return found | {name: value for name in names if (value := getattr(self, name))}


Messages = Annotated[list[ChatMessage], Field(max_length=MAX_LIST, fail_fast=True)]


class Function(StrictModel):
    """A function that the assistant may call. parameters: a JSON schema of its arguments."""

    name: Name
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(StrictModel):
    type: Literal["function"]
    function: Function

    def to_dict(self) -> dict[str, Any]:
        """As chat templates read it."""
        return {"type": "function", "function": self.function.model_dump(exclude_none=True, exclude={"strict"})}


class NamedFunction(StrictModel):
    name: Name


class NamedTool(StrictModel):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(StrictModel):
    name: Annotated[str, Field(max_length=256)] | None = None
    description: Text | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(StrictModel):
    """What a reply is made of: any text, any JSON object, or JSON that a schema allows."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_there_is_one(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema: expected with the type json_schema, and only there")
        return self

    def schema_text(self) -> str | None:
        """The JSON schema of the reply; None if it may be any text."""
        if self.type == "text":
            return None
        return json.dumps(self.json_schema.schema_ if self.json_schema is not None else {"type": "object"})


def calls_schema(tools: list[Tool], at_most: int | None = None) -> str:
    """A JSON schema of one call or several of these tools, as `tool_choice: required` asks. at_most: calls; None is no limit."""
    one_of = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "parameters": _moved(
                    tool.function.parameters or {"type": "object"}, f"#/items/anyOf/{i}/properties/parameters"
                ),
            },
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for i, tool in enumerate(tools)
    ]
    most = {} if at_most is None else {"maxItems": at_most}
    return json.dumps({"type": "array", "minItems": 1, **most, "items": {"anyOf": one_of}})


def _moved(schema: Any, to: str) -> Any:
    """A JSON schema that becomes a part of another one, at the JSON pointer `to`: its references to its own parts (`$defs`, as
    Pydantic writes them) lead there. Values are left alone."""
    if isinstance(schema, list):
        return [_moved(part, to) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {
        key: part if key in ("const", "enum", "default", "examples") else _moved(part, to)
        for key, part in schema.items()
    }
    reference = schema.get("$ref")
    if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
        found["$ref"] = to + reference[1:]
    return found
