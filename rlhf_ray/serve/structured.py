"""Replies that follow a JSON schema: llguidance, an optional extra, says at every token what may come next."""

from __future__ import annotations

import asyncio
import importlib.util
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rlhf_ray.serve.api_errors import ApiError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MAX_SCHEMAS = 64
"""Compiled ones that are kept: clients ask with the same few schemas."""
MAX_GRAMMAR_SIZE = 100_000
"""Of llguidance's own measure: bounds what a schema of a megabyte may cost."""

WHITE_SPACE = r" |\n[ ]{0,16}"
"""Between two parts of a JSON value: as people indent it. Any amount of it, and small models write nothing else."""


def is_available() -> bool:
    return importlib.util.find_spec("llguidance") is not None


@dataclass(frozen=True, eq=False)
class JsonGrammar:
    """A compiled schema (`sampler.logits.Grammar`). compiled: a matcher at its beginning, which is only ever copied."""

    compiled: Any

    def matcher(self, stop_ids: Sequence[int]) -> JsonMatcher:
        return JsonMatcher(self.compiled.deep_copy(), list(stop_ids))


class JsonMatcher:
    """Where a reply stands in its schema (`sampler.logits.Matcher`)."""

    def __init__(self, matcher: Any, stop_ids: list[int]) -> None:
        self._matcher, self._stop_ids = matcher, stop_ids

    def allowed(self, vocabulary: int) -> Tensor:
        """bool[V]. The reply may end exactly where its JSON is complete, and with the model's own stop ids."""
        is_complete = bool(self._matcher.is_accepting())
        bits = np.zeros(vocabulary, dtype=bool)
        if not self._matcher.is_stopped():
            packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            found = np.unpackbits(packed, bitorder="little")[:vocabulary]
            bits[: len(found)] = found
        self._raise_on_error()
        mask = torch.from_numpy(bits)
        mask[self._stop_ids] = is_complete
        return mask

    def accept(self, token_id: int) -> None:
        if not self._matcher.consume_token(token_id):
            self._raise_on_error()

    def _raise_on_error(self) -> None:
        if self._matcher.is_error():
            raise RuntimeError(f"the schema cannot be followed: {self._matcher.get_error()[:200]}")


class SchemaCompiler:
    """For one base.   vocabulary: its tokens, those beyond the tokenizer's included."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocabulary: int) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._of_library: Any = None
        self._compiled: OrderedDict[str, JsonGrammar] = OrderedDict()
        self._lock = threading.Lock()

    async def compile(self, schema: str) -> JsonGrammar:
        """The grammar of a JSON schema (text). ApiError if it is none, or the library is not installed."""
        if not is_available():
            message = (
                "response_format and forced tool calls need llguidance, which this service does not have;"
                " its operator can add it: pip install 'rlhf_ray[structured]'."
            )
            raise ApiError(400, message, "unsupported_parameter", "response_format")
        if (known := self._compiled.get(schema)) is None:
            known = await asyncio.to_thread(self._compile, schema)
            self._compiled[schema] = known
            if len(self._compiled) > MAX_SCHEMAS:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(schema)
        return known

    def _compile(self, schema: str) -> JsonGrammar:
        import llguidance
        from llguidance.hf import from_tokenizer

        with self._lock:
            if self._of_library is None:
                self._of_library = from_tokenizer(self._tokenizer, n_vocab=self._vocabulary)
        limits = llguidance.LLParserLimits(max_grammar_size=MAX_GRAMMAR_SIZE)
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(
                schema, overrides={"whitespace_pattern": WHITE_SPACE}
            )
            matcher = llguidance.LLMatcher(self._of_library, grammar, log_level=0, limits=limits)
            problem = matcher.get_error() if matcher.is_error() else ""
        except ValueError as error:
            problem = str(error)
        if problem:
            first = problem.splitlines()[0][:300]
            message = f"The JSON schema cannot be followed: {first}."
            raise ApiError(400, message, "invalid_schema", "response_format")
        return JsonGrammar(matcher)
