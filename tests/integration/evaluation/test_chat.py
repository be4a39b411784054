"""`chat`: several turns with several policies, streamed; through a pipe and at a terminal."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_ray.chat import Chat, load_chat, talk_at_terminal
from rlhf_ray.config import SamplingConfig
from rlhf_ray.console import NullConsole, visible
from rlhf_ray.errors import ConfigError
from rlhf_ray.stages.generate import generate

pytestmark = pytest.mark.integration
QUIET = NullConsole()
GREEDY = SamplingConfig(do_sample=False)


def load(policies: list[str], system: str = "", model: str | None = None, **fields: Any) -> Chat:
    return load_chat(
        policies, model=model, fields={"response_length": 10, **fields}, system=system, num_threads=1, console=QUIET
    )


def told(chat: Chat, *lines: str) -> tuple[str, list[str]]:
    """(what stdout would get, what is said beside it)."""
    out, said = StringIO(), list[str]()
    talk_at_terminal(chat, iter(lines), out, said.append)
    return out.getvalue(), said


@pytest.fixture
def talker(chat_llama: Callable[..., Path]) -> Chat:
    return load(["base"], model=str(chat_llama(context=256)), template="chat", sampling=GREEDY)


def greedy(folder: str, messages: list[dict[str, str]], count: int = 10) -> str:
    """The reply to a whole conversation, by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ends = [2, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    done = model.generate(ids, do_sample=False, max_new_tokens=count, eos_token_id=ends, pad_token_id=0)
    return str(tokenizer.decode(done[0, ids.shape[1] :], skip_special_tokens=True))


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_a_reply_answers_the_whole_conversation(talker: Chat) -> None:
    folder = talker.models.backbone.identity.path
    first = "".join(talker.reply(talker.talks[0], "Hi"))
    assert first == greedy(folder, [turn("user", "Hi")])
    second = "".join(talker.reply(talker.talks[0], "Go on"))
    talk = [turn("user", "Hi"), turn("assistant", first.strip()), turn("user", "Go on")]
    assert second == greedy(folder, talk) != greedy(folder, [turn("user", "Go on")])


def test_system_and_reset(talker: Chat) -> None:
    folder = talker.models.backbone.identity.path
    out, said = told(talker, "Hi", "/system Be brief.", "Hi", "/reset", "Hi", "/system", "Hi", "/frown", "/exit", "Hi")
    plain = greedy(folder, [turn("user", "Hi")])
    brief = greedy(folder, [turn("system", "Be brief."), turn("user", "Hi")])
    assert plain != brief and out == f"{plain}\n{brief}\n{brief}\n{plain}\n"
    assert [line.split(";")[0] for line in said] == [
        "the conversation starts anew, with this system message",
        "the conversation starts anew",
        "the conversation starts anew, without a system message",
        "no such command: /frown",
    ]


def test_the_first_reply_is_that_of_generate(chain: Any) -> None:
    """Sampled; base and template from the run's manifest; several policies share the random numbers, each under its name."""
    text = "Name the oak."
    rows = generate(
        policies=[chain.ppo, "base"], instruction=text, max_new_tokens=10, num_threads=1, seed=5, console=QUIET
    )
    chat = load([chain.ppo, "base"], seed=5)
    out, _ = told(chat, text)
    assert out == "".join(f"[{row['policy']}]\n{row['completion']}\n" for row in rows)
    assert chat.models.rewards == [] and set(chat.models.policies) == {"policy_0", "policy_1"}, "nothing more is loaded"


def test_an_instruction_template_takes_every_turn_by_itself(chain: Any) -> None:
    chat = load([chain.sft], sampling=GREEDY)
    out, _ = told(chat, "Name the oak.", "Draw the wren.", "Name the oak.")
    replies = out.splitlines()
    assert replies[0] == replies[2] and chat.talks[0].turns == []
    with pytest.raises(ConfigError, match="template 'alpaca_short' has no system message"):
        load([chain.sft], system="Be brief.")


def test_pieces_come_one_by_one_and_a_stop_keeps_what_was_said(talker: Chat) -> None:
    whole = "".join(talker.reply(talker.talks[0], "Hi"))
    talker.reset()
    stream = talker.reply(talker.talks[0], "Hi")
    begun = [next(stream), next(stream)]
    assert not talker.talks[0].turns and talker.talks[0].sampler.busy
    stream.close()  # as Ctrl-C does
    assert "".join(begun) == whole[: len("".join(begun))] and not talker.talks[0].sampler.busy
    assert talker.talks[0].turns[1].content == "".join(begun).strip()


def test_a_conversation_that_is_full_says_so_and_goes_on_after_a_reset(chat_llama: Callable[..., Path]) -> None:
    folder = str(chat_llama(context=128))
    chat = load(["base"], model=folder, template="chat", sampling=GREEDY)
    out, said = told(chat, "Hi", "x" * 200, "/reset", "Hi")
    assert len(said) == 2 and "the conversation is full" in said[0] and said[0].count("\n") == 0
    reply = greedy(folder, [turn("user", "Hi")])
    assert out == f"{reply}\n\n{reply}\n"


def command(folder: Path, *options: str) -> list[str]:
    words = ["chat", "--policy", "base", "--model", str(folder), "--template", "chat", "--greedy"]
    return [sys.executable, "-m", "rlhf_ray.cli", *words, "--max-new-tokens", "10", *options]


def test_a_pipe_gets_replies_and_nothing_else(chat_llama: Callable[..., Path]) -> None:
    folder = chat_llama(context=256)
    done = subprocess.run(
        command(folder), input=b"Hi\n\n/reset\nHi \xff\n/exit\nHi\n", capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr.decode()
    wanted = [greedy(str(folder), [turn("user", text)]) for text in ("Hi", "Hi \ufffd")]
    assert done.stdout.decode() == "".join(reply + "\n" for reply in wanted)
    assert b"the conversation starts anew" in done.stderr and b"template   chat" in done.stderr


class Terminal:
    """A command on a pseudo-terminal."""

    def __init__(self, words: list[str]) -> None:
        ours, theirs = pty.openpty()
        self.child = subprocess.Popen(
            words,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env={**os.environ, "TERM": "dumb"},
        )
        os.close(theirs)
        self.end, self.seen = ours, ""

    def wait_for(self, text: str, after: int = 0) -> int:
        """Read until `text` was seen behind position `after`; where it ends."""
        until = time.monotonic() + 300
        while text not in self.seen[after:]:
            assert time.monotonic() < until and self.child.poll() is None, self.seen
            if select.select([self.end], [], [], 1)[0]:
                self.seen += os.read(self.end, 65536).decode(errors="replace")
        return self.seen.index(text, after) + len(text)

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())


@pytest.fixture
def terminal(chat_llama: Callable[..., Path]) -> Iterator[Terminal]:
    term = Terminal(command(chat_llama(context=256)))
    yield term
    if term.child.poll() is None:
        os.killpg(term.child.pid, signal.SIGKILL)
    term.child.wait()
    os.close(term.end)


def test_at_a_terminal_there_is_a_prompt(terminal: Terminal, chat_llama: Callable[..., Path]) -> None:
    at = terminal.wait_for("\n> ")
    terminal.type("Hi\r")
    begins = terminal.wait_for("Hi\r\n", at)
    at = terminal.wait_for("\n> ", begins)
    reply = visible(greedy(str(chat_llama(context=256)), [turn("user", "Hi")]))  # no control character reaches it
    assert terminal.seen[begins:at] == (reply + "\n> ").replace("\n", "\r\n")
    terminal.type("/reset\r")
    at = terminal.wait_for("\n> ", terminal.wait_for("the conversation starts anew", at))
    terminal.type("\x04")  # Ctrl-D
    assert terminal.child.wait(60) == 0
