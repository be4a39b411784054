"""From a prompt of a request to token ids, and how many tokens a response to them may have."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from rlhf_ray.config.serve import LimitsConfig
from rlhf_ray.data.encode import after_bos, encode_prompts, encode_texts
from rlhf_ray.data.prompts import Message, Prompt
from rlhf_ray.data.templates import ChatTemplate, Template
from rlhf_ray.errors import DataError
from rlhf_ray.models.backbone import Backbone
from rlhf_ray.models.context import rope_note
from rlhf_ray.serve.api_errors import ApiError

LONG_PROMPT = 20_000
"""Characters from which a prompt is encoded on a thread of its own."""


class PromptEncoder:
    """For one base. All methods raise ApiError."""

    def __init__(self, backbone: Backbone, limits: LimitsConfig) -> None:
        self.backbone, self.limits = backbone, limits
        self.vocabulary_size = int(backbone.model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]

    async def encode(self, prompt: Mapping[str, Any], template: Template) -> tuple[int, ...]:
        """Ids of a prompt (generation.py) under `template`. ApiError for an empty one, or one that the template cannot take."""
        if "ids" in prompt:
            ids = tuple(prompt["ids"])
            size = self.vocabulary_size
            if not all(0 <= i < size for i in ids):
                raise ApiError(400, f"A token id is not in the vocabulary of {size}.", "invalid_token", "prompt")
        elif len(str(prompt)) > LONG_PROMPT:
            ids = await asyncio.to_thread(self.tokenize, prompt, template)
        else:
            ids = self.tokenize(prompt, template)
        if not ids:
            raise ApiError(400, "The prompt is empty.", "empty_prompt", "prompt")
        return ids

    def tokenize(self, prompt: Mapping[str, Any], template: Template) -> tuple[int, ...]:
        """Ids of a text or a conversation; () if it is blank."""
        tokenizer = self.backbone.tokenizer
        if "raw" in prompt:
            if not prompt["raw"]:
                return ()
            # A raw text is all that the model reads, markers included, as in other services of this API.
            ids = encode_texts(tokenizer, [prompt["raw"]], parse=True)[0]
            return tuple(ids if prompt.get("bare") else after_bos(tokenizer, ids))
        given = prompt.get("tools", ""), prompt.get("template_kwargs", "")
        if given[1] and not isinstance(template, ChatTemplate):
            message = f"chat_template_kwargs: this adapter's template ({template.name}) is no chat template."
            raise ApiError(400, message, "template", "chat_template_kwargs")
        messages = tuple(map(_message, prompt.get("messages", ())))
        conversation = Prompt(prompt.get("text", ""), prompt.get("input", ""), messages, *given)
        if conversation.is_blank:
            return ()
        try:
            return tuple(encode_prompts(tokenizer, template, [conversation])[0])
        except DataError as error:
            message = f"This adapter cannot take the conversation: {error.problems[0].what}."
            raise ApiError(400, message, "template", "messages") from None

    def max_new_tokens(self, prompt_tokens: int, max_tokens: int | None) -> int:
        """Most tokens of a response to a prompt of `prompt_tokens`. max_tokens: of the request, None for the default."""
        context = min(self.backbone.context_length, self.limits.max_context or self.backbone.context_length)
        if max_tokens is None:
            max_tokens = min(self.limits.default_max_tokens, self.limits.max_tokens, max(context - prompt_tokens, 1))
        if prompt_tokens + max_tokens > context:
            message = (
                f"This model's maximum context length is {context} tokens"
                f"{self._reason(context)}. However, you requested"
                f" {prompt_tokens + max_tokens} tokens ({prompt_tokens} in the prompt, {max_tokens} for the completion)."
                " Please reduce the length of the prompt or of the completion."
            )
            raise ApiError(400, message, "context_length_exceeded", "messages")
        return max_tokens

    def _reason(self, context: int) -> str:
        if context < self.backbone.context_length:
            return " (limits.max_context)"
        return rope_note(self.backbone.model.config.get_text_config())


def _message(turn: Mapping[str, Any]) -> Message:
    """extra: as rows of data have it (`data/fields.py`), so that both render alike."""
    extra = {name: value for name, value in turn.items() if name not in ("role", "content")}
    return Message(turn["role"], turn["content"], json.dumps(extra, sort_keys=True) if extra else "")
