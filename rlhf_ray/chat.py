"""Conversations with one or several policies at the terminal: replies appear token by token, and every policy has a conversation
of its own.

Policies, base, template and sampling are found as `generate` finds them, and the first reply is the one that `generate` gives with
the same seed. Runs in this process, without Ray.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from rlhf_ray.console import Console, LocalConsole, quiet_libraries, visible
from rlhf_ray.data.encode import encode_prompts
from rlhf_ray.data.prompts import Message, Prompt
from rlhf_ray.data.templates import InstructionTemplate, PlainTemplate
from rlhf_ray.errors import ConfigError, DataError, InvariantError
from rlhf_ray.maths.rng import row_seed
from rlhf_ray.models.lineage import header_line
from rlhf_ray.runtime.session import process_session
from rlhf_ray.sampler.engine import DecodeRequest, Sampler
from rlhf_ray.serve.response_text import ResponseText
from rlhf_ray.stages.evaluation_models import (
    RANDOMNESS,
    EvaluationModels,
    Policy,
    decoding_line,
    load_evaluation_models,
)
from rlhf_ray.stages.generate import plan_job

COMMANDS = "/reset forgets the conversation, /system TEXT sets the system message, /exit ends"
_COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?")
_NEXT_SPEAKER = "\n\nHuman:"
"""Ends a reply under template none, where a conversation is a transcript that a base model goes on with."""


@dataclass
class Talk:
    """One policy's conversation so far.   label: what it was called on the command line."""

    policy: Policy
    label: str
    sampler: Sampler
    turns: list[Message] = field(default_factory=list)


@dataclass
class Chat:
    """Made by `load_chat`. system: a system message, before every conversation.  asked: user turns since the start, which seed the
    replies."""

    models: EvaluationModels
    talks: list[Talk]
    system: str = ""
    asked: int = 0

    @property
    def remembers(self) -> bool:
        """Instruction templates take one instruction: there every turn is a conversation of its own."""
        return not isinstance(self.models.template, InstructionTemplate)

    def reset(self) -> None:
        for talk in self.talks:
            talk.turns.clear()

    def set_system(self, text: str) -> None:
        """ConfigError under a template that has no place for one."""
        if text and not self.remembers:
            name = self.models.template.name
            raise ConfigError.at("system", f"template '{name}' has no system message", "template chat or none")
        self.system = text

    def reply(self, talk: Talk, text: str) -> Iterator[str]:
        """The pieces of the policy's reply to `text`, as they come. Afterwards both turns are in its conversation; where the
        consumer stops early, the reply as far as it came.

        DataError, with the conversation as it was, if the template cannot take it or no room is left for a reply."""
        prompt, ids = self._prompt(talk, text)
        budget = min(self.models.config.response_length, self.models.limit - len(ids))
        if budget < 1:
            raise DataError.at(
                talk.label,
                "the conversation is full",
                f"at most {self.models.limit - 1} tokens",
                str(len(ids)),
                "/reset",
            )
        plain = isinstance(self.models.template, PlainTemplate)
        stops = (_NEXT_SPEAKER,) if plain and prompt.messages else ()
        written = ResponseText(self.models.backbone.tokenizer, stops, ids if plain else ())
        request = talk.sampler.submit(self._request(talk, ids, budget))
        try:
            with talk.sampler.session():
                while talk.sampler.busy and not written.stopped:
                    for event in talk.sampler.step():
                        if event.end == "error":
                            raise InvariantError.at(talk.label, "the model's logits are not finite", "finite numbers")
                        yield written.push(event.token_id)
            yield written.finish()
        finally:
            talk.sampler.cancel(request)
            if self.remembers:
                talk.turns += [Message("user", text), Message("assistant", written.text.strip())]

    def _prompt(self, talk: Talk, text: str) -> tuple[Prompt, tuple[int, ...]]:
        """An instruction, or the whole conversation. A first text without a system message is a prompt as `generate` asks it."""
        before = ([Message("system", self.system)] if self.system else []) + talk.turns
        prompt = Prompt(messages=(*before, Message("user", text))) if before else Prompt(text)
        template, tokenizer = self.models.template, self.models.backbone.tokenizer
        (ids,) = encode_prompts(tokenizer, template, [prompt], [talk.label])
        return prompt, tuple(ids)

    def _request(self, talk: Talk, ids: tuple[int, ...], budget: int) -> DecodeRequest:
        config = self.models.config
        stack: Any = self.models.models.stack_of(talk.policy.role)
        return DecodeRequest(
            prompt_ids=ids,
            row_seed=row_seed(config.seed, RANDOMNESS, self.asked, 0),
            max_new_tokens=budget,
            stop_ids=stack.backbone.stop_ids(self.models.template),
            temperature=config.sampling.temperature,
            top_p=config.sampling.top_p,
            top_k=config.sampling.top_k,
            greedy=not config.sampling.do_sample,
            adapter=talk.policy.active.name,
        )


@quiet_libraries()
def load_chat(
    policies: Sequence[str],
    *,
    model: str | None = None,
    fields: Mapping[str, Any] | None = None,
    system: str = "",
    num_threads: int | None = None,
    console: Console | None = None,
) -> Chat:
    """Load the policies (`base`, RUN, RUN@STEP, adapter folder, merged checkpoint) for a conversation.

    model: the base; default: the one that the first policy was trained on.   fields: of an evaluation job: template,
    response_length, sampling, seed, load_in_8bit, load_in_4bit; None is not given.
    Raises ConfigError, ArtifactError for what does not fit."""
    console = console or LocalConsole()
    if not policies:
        raise ConfigError.at("chat", "no policy is named", "base, a run, RUN@STEP or a folder")
    config, _ = plan_job(policies, (), model, fields or {}, console, scored=False)
    models = load_evaluation_models(config, process_session(console, num_threads), None)
    talks = []
    for label, policy in zip(policies, models.loaded(), strict=True):
        stack: Any = models.models.stack_of(policy.role)
        talks.append(Talk(policy, label, Sampler(stack.model, stack.backbone.pad_id, max_rows=1)))
    chat = Chat(models, talks)
    chat.set_system(system)
    shown = [header_line("template", models.template.name), header_line("decoding", decoding_line(config))]
    console.header("chat", [*models.lines, *shown, header_line("commands", COMMANDS)])
    for line in models.warnings:
        console.warn(line)
    if not chat.remembers:
        console.log(f"template {models.template.name} takes one instruction: every turn is asked by itself")
    return chat


def talk_at_terminal(chat: Chat, lines: Iterator[str], out: TextIO, say: Callable[[str], None]) -> None:
    """Answer each line, until they end or /exit. Replies go to `out`, each policy's under its name where there are several; what is
    not a reply to `say`. Ctrl-C ends a reply, and between two replies the conversation."""
    named = len(chat.talks) > 1
    shown = visible if out.isatty() else str
    for line in lines:
        text = line.strip()
        command = _COMMAND.fullmatch(text)
        if command is not None:
            if not _obey(chat, command[1], (command[2] or "").strip(), say):
                return
            continue
        if not text:
            continue
        for talk in chat.talks:
            if named:
                out.write(f"[{talk.label}]\n")
            try:
                for piece in chat.reply(talk, text):
                    out.write(shown(piece))
                    out.flush()
            except DataError as error:
                say("\n".join(error.lines()))
            except KeyboardInterrupt:
                say("(stopped)")
            out.write("\n")
            out.flush()
        chat.asked += 1


def _obey(chat: Chat, name: str, text: str, say: Callable[[str], None]) -> bool:
    """Carry out /name text; False to end."""
    if name in ("exit", "quit"):
        return False
    if name == "reset":
        chat.reset()
        say("the conversation starts anew")
    elif name == "system":
        try:
            chat.set_system(text)
        except ConfigError as error:
            say("\n".join(error.lines()))
            return True
        chat.reset()
        say("the conversation starts anew" + (", with this system message" if text else ", without a system message"))
    else:
        say(f"no such command: /{name}; {COMMANDS}")
    return True


def typed_lines(prompt: str = "> ") -> Iterator[str]:
    """Lines of stdin, with a prompt and editing where it is a terminal; Ctrl-C at the prompt and Ctrl-D end them."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8", errors="replace")
        yield from sys.stdin
        return
    import readline  # noqa: F401  (editing and history of input())

    while True:
        try:
            line = input(prompt)
        except (EOFError, KeyboardInterrupt):
            print()
            return
        yield line
