"""The OpenAPI document of the service: made from the very types that requests are read with, and from what the routes answer."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from pydantic import BaseModel

from rlhf_ray.serve.openai_types import (
    ChatRequest,
    CompareRequest,
    CompletionRequest,
    DetokenizeRequest,
    PreferenceRequest,
    TokenizeRequest,
)
from rlhf_ray.serve.score import ScoreRequest

REF = "#/components/schemas/{model}"
STRING, INTEGER, NUMBER, BOOLEAN = ({"type": kind} for kind in ("string", "integer", "number", "boolean"))


def _null(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _object(optional: dict[str, Any] | None = None, **required: Any) -> dict[str, Any]:
    properties = {**required, **(optional or {})}
    return {"type": "object", "properties": properties, "required": list(required)}


USAGE = _object(prompt_tokens=INTEGER, completion_tokens=INTEGER, total_tokens=INTEGER)
LIKELIEST = _object(token=STRING, logprob=NUMBER, bytes=_list(INTEGER))
CALL = _object(id=STRING, type={"const": "function"}, function=_object(name=STRING, arguments=STRING))
PROMPT_LOGPROBS = _null(_list(_null({"type": "object"})))
SCORES = {"reward": _null(NUMBER), "kl": _null(NUMBER)}
FINISH = _null({"enum": ["stop", "length", "tool_calls"]})
CHAT_LOGPROBS = _null(
    _object(content=_list(_object({"top_logprobs": _list(LIKELIEST)}, **LIKELIEST["properties"])), refusal={})
)
CHAT_CHOICE = _object(
    SCORES,
    index=INTEGER,
    finish_reason=FINISH,
    message=_object({"tool_calls": _list(CALL)}, role={"const": "assistant"}, content=_null(STRING), refusal={}),
    logprobs=CHAT_LOGPROBS,
)
TEXT_CHOICE = _object(
    {**SCORES, "prompt_logprobs": PROMPT_LOGPROBS},
    index=INTEGER,
    finish_reason=FINISH,
    text=STRING,
    logprobs=_null(
        _object(
            tokens=_list(STRING),
            token_logprobs=_list(_null(NUMBER)),
            top_logprobs=_null(_list(_null({"type": "object", "additionalProperties": NUMBER}))),
            text_offset=_list(INTEGER),
        )
    ),
)
MODEL = _object(
    {"root": {}, "parent": {}, "kind": STRING}, id=STRING, object={"const": "model"}, created=INTEGER, owned_by=STRING
)
ADAPTER = _object(id=_null(STRING), sha256=_null(STRING))

ASKS_FOR_NOTHING = {
    "anyOf": [{"enum": [None, False, "", []]}, {"type": "object", "additionalProperties": {"type": "null"}}],
    "description": "accepted and ignored, whatever its name",
}
"""Of a field that is not known (`openai_messages.StrictModel`)."""


def _reply(kind: str, choice: dict[str, Any]) -> dict[str, Any]:
    return _object(
        {"prompt_logprobs": PROMPT_LOGPROBS, "system_fingerprint": _null(STRING)},
        id=STRING,
        object={"const": kind},
        created=INTEGER,
        model=STRING,
        adapter=ADAPTER,
        choices=_list(choice),
        usage=USAGE,
    )


SCHEMAS: dict[str, dict[str, Any]] = {
    "Error": _object(error=_object(message=STRING, type=STRING, param=_null(STRING), code=_null(STRING))),
    "Model": MODEL,
    "Models": _object(object={"const": "list"}, data=_list(MODEL)),
    "ChatCompletion": _reply("chat.completion", CHAT_CHOICE),
    "Completion": _reply("text_completion", TEXT_CHOICE),
    "Comparison": _object(
        id=STRING,
        object={"const": "comparison"},
        created=INTEGER,
        adapters={"type": "object"},
        choices=_list(
            _object(
                {"prompt_logprobs": PROMPT_LOGPROBS},
                model=STRING,
                completion_tokens=INTEGER,
                **CHAT_CHOICE["properties"],
            )
        ),
        usage=USAGE,
    ),
    "StoredPreference": _object(id=STRING, object={"const": "preference"}, created=INTEGER),
    "Scores": _object(
        object={"const": "score"},
        model=STRING,
        sha256=STRING,
        ids=_list({"type": ["string", "integer"]}),
        rewards=_list(_null(NUMBER)),
        usage=USAGE,
    ),
    "Tokens": _object(
        {"token_strs": _null(_list(STRING))}, count=INTEGER, max_model_len=INTEGER, tokens=_list(INTEGER)
    ),
    "DetokenizedText": _object(prompt=STRING),
    "TokenizerInfo": _object(
        {f"{name}_token": _null(STRING) for name in ("bos", "eos", "pad", "unk")},
        tokenizer_class=STRING,
        model_max_length=INTEGER,
        chat_template=_null(STRING),
    ),
    "Version": _object(version=STRING),
}
SCHEMAS["Comparison"]["properties"]["choices"]["items"]["required"] = ["index", "finish_reason", "message", "model"]

ERRORS = {
    400: "a body or field that is not accepted, or a prompt that does not fit the model",
    403: "a name or origin under which this service is not used",
    404: "there is no such model, or the key may not use it",
    408: "the body did not come in time",
    413: "the body is too long",
    415: "the body is not sent as application/json",
    429: "at capacity; see Retry-After",
    500: "a fault of the service",
    503: "nothing answers, an adapter is not fit to be served, or keys cannot be checked",
    504: "the reply was not finished in time",
}


def document(with_keys: bool) -> dict[str, Any]:
    """OpenAPI 3.1.   with_keys: requests need an API key."""
    schemas = dict(SCHEMAS)

    def post(summary: str, body: type[BaseModel], answer: str, streams: bool = False) -> dict[str, Any]:
        whole = body.model_json_schema(ref_template=REF, by_alias=True)
        for name, schema in ({**whole.pop("$defs", {}), body.__name__: whole}).items():
            is_strict = schema.get("additionalProperties") is False
            schemas[name] = {**schema, "additionalProperties": ASKS_FOR_NOTHING} if is_strict else schema
        asked = {"required": True, "content": {"application/json": {"schema": _ref(body.__name__)}}}
        return {"summary": summary, "requestBody": asked, "responses": _responses(answer, ERRORS, streams, with_keys)}

    def get(summary: str, answer: str | None, *errors: int, path: str = "") -> dict[str, Any]:
        told = {code: ERRORS[code] for code in (*errors, 403)}
        found: dict[str, Any] = {
            "summary": summary,
            "responses": _responses(answer, told, False, with_keys and bool(errors)),
        }
        if path:
            found["parameters"] = [{"name": path, "in": "path", "required": True, "schema": STRING}]
        return found

    generated = "streamed as server-sent events with `stream: true`, whatever the Idempotency-Key"
    return {
        "openapi": "3.1.0",
        "info": {"title": "rlhf_ray", "version": version("rlhf_ray")},
        "paths": {
            "/v1/models": {"get": get("The models that there are", "Models", 500, 503)},
            "/v1/models/{model}": {"get": get("One of them", "Model", 404, 500, 503, path="model")},
            "/v1/chat/completions": {"post": post(f"The next turn; {generated}", ChatRequest, "ChatCompletion", True)},
            "/v1/completions": {"post": post(f"Text that goes on; {generated}", CompletionRequest, "Completion", True)},
            "/v1/compare": {
                "post": post(f"One prompt, several models; {generated}", CompareRequest, "Comparison", True)
            },
            "/v1/preferences": {"post": post("Which reply is better", PreferenceRequest, "StoredPreference")},
            "/v1/score": {"post": post("Rewards of replies that were written elsewhere", ScoreRequest, "Scores")},
            "/tokenize": {"post": post("What a model reads of a prompt", TokenizeRequest, "Tokens")},
            "/detokenize": {"post": post("The text of tokens", DetokenizeRequest, "DetokenizedText")},
            "/tokenizer_info": {
                "get": get("What a client that tokenizes here needs to know", "TokenizerInfo", 500, 503)
            },
            "/version": {"get": get("This service's version", "Version")},
            "/health": {"get": get("Whether a replica answers", None, 503)},
        },
        "components": {
            "schemas": schemas,
            **({"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}} if with_keys else {}),
        },
        **({"security": [{"key": []}]} if with_keys else {}),
    }


def _ref(name: str) -> dict[str, str]:
    return {"$ref": REF.format(model=name)}


def _responses(answer: str | None, errors: dict[int, str], streams: bool, with_keys: bool) -> dict[str, Any]:
    told = {**errors, **({401: "no API key, or one that is not good"} if with_keys else {})}
    content: dict[str, Any] = {} if answer is None else {"application/json": {"schema": _ref(answer)}}
    if streams:
        content["text/event-stream"] = {"schema": STRING}
    failed = {} if answer is None else {"content": {"application/json": {"schema": _ref("Error")}}}
    return {
        "200": {"description": "done", **({"content": content} if content else {})},
        **{str(code): {"description": text, **failed} for code, text in sorted(told.items())},
    }
