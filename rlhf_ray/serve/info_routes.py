"""Routes that write no reply: health, version, the API's own description, and a prompt's tokens (vLLM's /tokenize, /detokenize)."""

from __future__ import annotations

import functools
from importlib.metadata import version
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from rlhf_ray.config.serve import ServeConfig
from rlhf_ray.serve.api_errors import ApiError
from rlhf_ray.serve.openai_types import DetokenizeRequest, TokenizeRequest, prompt_of_chat
from rlhf_ray.serve.openapi import document
from rlhf_ray.serve.request_body import parsed, read_body
from rlhf_ray.serve.request_context import Backend, RequestContext

BASE = "base"


class InfoRoutes:
    """Handlers of `api.HttpApi`."""

    def __init__(self, config: ServeConfig, backend: Backend) -> None:
        self.config, self.backend = config, backend
        self._document = functools.cache(document)

    async def health(self, request: Request) -> Response:
        """200 without a body if a replica answers, as vLLM's; needs no key."""
        try:
            await self.backend.check_health()
        except ApiError:
            return Response(status_code=503)
        return Response()

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": version("rlhf_ray")})

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(self._document(self.config.api_keys is not None))

    async def tokenize(self, context: RequestContext) -> Response:
        asked = await parsed(await read_body(context.request, self.config.limits), TokenizeRequest)
        model = asked.model or BASE
        context.require_access(model)
        if asked.messages is not None:
            prompt = prompt_of_chat(asked.messages, asked.tools, asked.chat_template_kwargs, self.config.limits)
        else:
            prompt = {"raw": asked.prompt, "bare": asked.add_special_tokens is False}
        told = _answer(await self.backend.tokenize(model, prompt))
        texts = told["texts"] if asked.return_token_strs else None
        ids = told["ids"]
        return JSONResponse({"count": len(ids), "max_model_len": told["context"], "tokens": ids, "token_strs": texts})

    async def tokenizer_info(self, context: RequestContext) -> Response:
        return JSONResponse(await self.backend.tokenizer_info())

    async def detokenize(self, context: RequestContext) -> Response:
        asked = await parsed(await read_body(context.request, self.config.limits), DetokenizeRequest)
        context.require_access(asked.model or BASE)
        return JSONResponse({"prompt": _answer(await self.backend.detokenize(asked.tokens))["text"]})


def _answer(told: dict[str, Any]) -> dict[str, Any]:
    if "error" in told:
        raise ApiError(**told["error"])
    return told
