"""Text to token ids. Text that comes from data is encoded as text: a "</s>" in a row becomes the control token only where the
caller asks for it (`parse`), for texts that are written with the model's own markers.

Prompt and reply are encoded apart and then joined, because that is what generation does: the reply's first token is chosen after
the prompt's last one, whatever longer token the two might have formed. `end_of_turn` ends a reply.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rlhf_ray.data.prompts import Message, Prompt
from rlhf_ray.data.templates import ChatTemplate, PromptMismatch, Template
from rlhf_ray.errors import DataError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SLICE = 512
_ASKED = Message("user", "Which number comes after three?")
_ANSWERED = Message("assistant", "The number after three is four.")


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Tokens that text must never turn into: special tokens but the unknown token, and markers of the chat template."""
    markup = str(tokenizer.chat_template or "")
    special = set(tokenizer.all_special_ids)
    return {
        token.content: i
        for i, token in tokenizer.added_tokens_decoder.items()
        if (token.special or i in special or (token.content in markup and not token.content.isspace()))
        and i != tokenizer.unk_token_id
    }


def bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[bos] if the tokenizer itself starts a text with it, else []."""
    bos = tokenizer.bos_token_id
    starts = bos is not None and tokenizer("a").input_ids[:1] == [bos]
    return [bos] if starts and tokenizer("a", add_special_tokens=False).input_ids[:1] != [bos] else []


def after_bos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """`ids` with `bos_ids` before them, unless they begin with that already."""
    bos = bos_ids(tokenizer)
    return ids if bos and ids[:1] == bos else bos + ids


def end_of_turn(tokenizer: PreTrainedTokenizerBase, template: Template) -> int | None:
    """The token that ends a reply under `template`: the chat template's own, else the tokenizer's eos; None if there is neither."""
    own = own_end_of_turn(tokenizer, template)
    return tokenizer.eos_token_id if own is None else own


def own_end_of_turn(tokenizer: PreTrainedTokenizerBase, template: Template) -> int | None:
    """The control token that a chat template itself puts after a reply: <|im_end|> of ChatML, <end_of_turn> of Gemma, <|end|> of
    Phi-3, <|eot_id|> of Llama 3. None for any other template.

    It is read off what the template renders: the first control token after the assistant's text, the same at the end of a
    conversation and inside one (else it is the start of the next turn, or what ends the whole text)."""
    if not isinstance(template, ChatTemplate):
        return None
    control = set(control_tokens(tokenizer).values())
    ends = []
    for talk in ((_ASKED, _ANSWERED), (_ASKED, _ANSWERED, _ASKED)):
        try:
            text = template.render_whole(talk)
        except PromptMismatch:  # told of the first row that it refuses
            return None
        after = text.rpartition(_ANSWERED.content)[2].partition(_ASKED.content)[0]
        (ids,) = _batched(tokenizer, [after], split_special_tokens=False)
        ends.append(next((i for i in ids if i in control), None))
    return ends[0] if ends[0] == ends[1] else None


def spelled_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[str]]:
    """The control tokens that each text spells, each once, in order."""
    control = _any_of(control_tokens(tokenizer))
    return [list(dict.fromkeys(control.findall(text))) for text in texts]


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], parse: bool = False) -> list[list[int]]:
    """Ids of each text, without bos or eos and without any control token. One batched call.

    parse: what spells a control token becomes that token.

    Raises DataError if the tokenizer cannot tell a control token from ordinary text.
    """
    if not texts:
        return []
    if parse:
        return _batched(tokenizer, texts, split_special_tokens=False)
    ids = _plain(tokenizer, texts)
    control = control_tokens(tokenizer)
    forbidden = frozenset(control.values())
    for i in [i for i, row in enumerate(ids) if not forbidden.isdisjoint(row)]:
        ids[i] = _encode_in_pieces(tokenizer, texts[i], control)
    return ids


def _plain(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    return _batched(tokenizer, texts, split_special_tokens=True)


def _batched(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], split_special_tokens: bool) -> list[list[int]]:
    """Ids of each text. In slices, since an encoding is some hundred times larger than its ids while it is made."""
    ids: list[list[int]] = []
    for start in range(0, len(texts), _SLICE):
        ids += tokenizer(
            list(texts[start : start + _SLICE]),
            add_special_tokens=False,
            split_special_tokens=split_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        ).input_ids
    return ids


def _encode_in_pieces(tokenizer: PreTrainedTokenizerBase, text: str, control: dict[str, int]) -> list[int]:
    """For tokenizers whose model maps a whole word to a control token: every such word is cut after its first character."""
    cuts = [0, *(match.start() + 1 for match in _any_of(control).finditer(text)), len(text)]
    pieces = [text[a:b] for a, b in pairwise(cuts)]
    ids = [i for row in _plain(tokenizer, pieces) for i in row]
    found = set(control.values()).intersection(ids)
    if found:
        token = tokenizer.convert_ids_to_tokens(min(found))
        raise DataError.at("tokenizer", f"ordinary text becomes the control token {token!r}", fix="another tokenizer")
    return ids


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def _spells(control: re.Pattern[str], message: Message, said: frozenset[str]) -> bool:
    """Whether a message spells a control token; what the assistant may say (`speakable_tokens`) is none in its own turns."""
    found = set(control.findall(message.content + _unescaped(message.extra)))
    return bool(found - said if message.role == "assistant" else found)


def _unescaped(text: str) -> str:
    """JSON as its strings are rendered: tokens are not all of ASCII letters."""
    return json.dumps(json.loads(text), ensure_ascii=False) if text else ""


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _keys(part)


def speakable_tokens(tokenizer: PreTrainedTokenizerBase, template: Template) -> frozenset[str]:
    """Tokens that a model writes itself within its turn, as <think> and <tool_call>: added tokens that are not special, and that
    the chat template does not write around turns. In a reply they are those tokens, as if the model had written it."""
    if not isinstance(template, ChatTemplate):
        return frozenset()
    added = {t.content for t in tokenizer.added_tokens_decoder.values() if not t.special}
    try:
        turns = template.render_whole((_ASKED, _ANSWERED, _ASKED))
    except PromptMismatch:
        return frozenset()
    special = set(tokenizer.all_special_tokens)
    return frozenset(token for token in added - special if token not in turns)


def encode_replies(
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    texts: Sequence[str],
    parse: bool,
    rendered: Sequence[str] = (),
) -> list[list[int]]:
    """`encode_texts` of replies, in which tokens that a model may say are those tokens.   rendered: texts with markers that the
    template wrote, and none that the data spell."""
    ids = encode_texts(tokenizer, texts, parse)
    if parse:
        return ids
    said, control, written = speakable_tokens(tokenizer, template), _any_of(control_tokens(tokenizer)), set(rendered)
    spelled = [set(control.findall(text)) for text in texts]
    again = [i for i, text in enumerate(texts) if text in written or (spelled[i] and spelled[i] <= said)]
    for i, row in zip(again, _batched(tokenizer, [texts[i] for i in again], split_special_tokens=False)):
        ids[i] = row
    return ids


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    prompts: Sequence[Prompt],
    labels: Sequence[str] = (),
    parse: bool = False,
) -> list[list[int]]:
    """Ids of each prompt under the template, with bos where the tokenizer (or the chat template) sets one. No eos.

    An empty prompt is bos alone.   labels: one per prompt, `file:line`.   parse: see `encode_texts`; a bos that the text begins
    with is not set twice.   Raises DataError telling every prompt that the template cannot render.
    """
    names = labels or [f"prompt {i}" for i in range(1, len(prompts) + 1)]
    texts, problems = [], []
    for name, prompt in zip(names, prompts, strict=True):
        try:
            texts.append(template.render(prompt))
        except PromptMismatch as error:
            problems.append(Problem(name, str(error), fix=error.fix))
    DataError.raise_all(problems)
    if isinstance(template, ChatTemplate):
        return _encode_chats(tokenizer, template, prompts, texts, names, parse)
    return [after_bos(tokenizer, ids) for ids in encode_texts(tokenizer, texts, parse)]


def _encode_chats(
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    prompts: Sequence[Prompt],
    texts: Sequence[str],
    names: Sequence[str],
    parse: bool,
) -> list[list[int]]:
    """The template's own markers become control tokens; where messages, tools or variables contain such markers, theirs are encoded
    as text, unless `parse`."""
    bos, control = bos_ids(tokenizer), _any_of(control_tokens(tokenizer))
    said = speakable_tokens(tokenizer, template)
    encoded = _batched(tokenizer, texts, split_special_tokens=False)
    problems = []
    for i, prompt in enumerate(prompts):
        if prompt.is_blank:
            encoded[i] = list(bos)
        elif not parse and (
            any(_spells(control, m, said) for m in prompt.as_messages())
            or control.search(_unescaped(prompt.tools) + _unescaped(prompt.template_kwargs))
        ):
            if prompt.tools and any(map(control.search, _keys(json.loads(prompt.tools)))):
                problems.append(Problem(names[i], "tools: the name of a field spells a control token"))
                continue
            try:
                encoded[i] = template.encode_safely(prompt)
            except PromptMismatch as error:
                problems.append(Problem(names[i], str(error)))
    DataError.raise_all(problems)
    return encoded
