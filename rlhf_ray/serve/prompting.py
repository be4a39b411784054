"""From what a client says to token ids, and how long a reply to them may be."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from rlhf_ray.config.serve import LimitsConfig
from rlhf_ray.data.encode import bos_ids, encode_prompts, encode_texts
from rlhf_ray.data.prompts import Message, Prompt
from rlhf_ray.data.templates import Template
from rlhf_ray.errors import DataError
from rlhf_ray.models.backbone import Backbone
from rlhf_ray.serve.api_errors import ApiError

LONG_TEXT = 20_000
"""Characters from which a prompt is encoded on a thread of its own."""


class Prompting:
    """On one base. All methods raise ApiError."""

    def __init__(self, backbone: Backbone, limits: LimitsConfig) -> None:
        self.backbone, self.limits = backbone, limits
        self.rows = int(backbone.model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]

    async def ids(self, prompt: Mapping[str, Any], template: Template) -> tuple[int, ...]:
        """Ids of a prompt (generation.py) under `template`. ApiError for what is empty, or what the template cannot say."""
        if "ids" in prompt:
            ids = tuple(prompt["ids"])
            if not all(0 <= i < self.rows for i in ids):
                raise ApiError(400, f"A token id is not in the vocabulary of {self.rows}.", "invalid_token", "prompt")
        elif len(str(prompt)) > LONG_TEXT:
            ids = await asyncio.to_thread(self.encode, prompt, template)
        else:
            ids = self.encode(prompt, template)
        if not ids:
            raise ApiError(400, "The prompt is empty.", "empty_prompt", "prompt")
        return ids

    def encode(self, prompt: Mapping[str, Any], template: Template) -> tuple[int, ...]:
        """Ids of a text or a conversation; () where nothing is said."""
        tokenizer = self.backbone.tokenizer
        if "raw" in prompt:
            if not prompt["raw"]:
                return ()
            return (*bos_ids(tokenizer), *encode_texts(tokenizer, [prompt["raw"]])[0])
        messages = tuple(Message(m["role"], m["content"]) for m in prompt.get("messages", ()))
        asked = Prompt(prompt.get("text", ""), prompt.get("input", ""), messages)
        if asked.is_blank:
            return ()
        try:
            return tuple(encode_prompts(tokenizer, template, [asked])[0])
        except DataError as error:
            told = f"This adapter cannot take the conversation: {error.problems[0].what}."
            raise ApiError(400, told, "template", "messages") from None

    def room(self, prompt: int, asked: int | None) -> int:
        """Most tokens of a reply to a prompt of so many tokens."""
        context = self.backbone.context_length
        default = min(self.limits.default_max_tokens, self.limits.max_tokens, max(context - prompt, 1))
        wanted = asked if asked is not None else default
        if prompt + wanted > context:
            told = f"The prompt has {prompt} tokens and up to {wanted} are asked for; this model has room for {context} together."
            raise ApiError(400, told, "context_length_exceeded", "messages")
        return wanted
