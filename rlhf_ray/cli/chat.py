"""The command chat, and the options that it shares with generate."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from rlhf_ray.cli.output import stdout_kept
from rlhf_ray.cli.registry import policy_path
from rlhf_ray.runtime.imports import importing

Policies = Annotated[list[str], typer.Option(help="base, RUN, RUN@STEP, registry:NAME or a folder; may be repeated")]
Model = Annotated[str | None, typer.Option(help="base model; default: the one the first run was trained on")]
TemplateName = Annotated[str | None, typer.Option(help="prompt template; default: the runs' own")]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="longest reply in tokens")]
Temperature = Annotated[float | None, typer.Option(help="divides the logits")]
TopP = Annotated[float | None, typer.Option(help="keep the smallest set of tokens with this probability")]
TopK = Annotated[int | None, typer.Option(help="keep this many tokens; 0 keeps all")]
Greedy = Annotated[bool, typer.Option("--greedy", help="take the most likely token, do not sample")]
Seed = Annotated[int, typer.Option(min=0, help="root of the randomness")]
In8Bit = Annotated[bool, typer.Option("--load-in-8bit", help="quantise the base to 8 bits")]
In4Bit = Annotated[bool, typer.Option("--load-in-4bit", help="quantise the base to 4 bits")]


def sampling_of(temperature: float | None, top_p: float | None, top_k: int | None, greedy: bool, where: str) -> Any:
    """The SamplingConfig of a command line. Raises ConfigError."""
    from rlhf_ray.config import SamplingConfig
    from rlhf_ray.config.load import load_dict

    asked = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "do_sample": False if greedy else None}
    return load_dict(SamplingConfig, {k: v for k, v in asked.items() if v is not None}, where)


def named_policies(policy: list[str]) -> list[str]:
    """Their paths; what does not exist is refused here, before anything heavy is imported."""
    from rlhf_ray.models.specs import policy_source

    policies = [policy_path(each) for each in policy]
    for each in policies:
        policy_source(each)
    return policies


def chat(
    policy: Policies,
    system: Annotated[str, typer.Option(help="system message before every conversation")] = "",
    model: Model = None,
    template: TemplateName = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    greedy: Greedy = False,
    seed: Seed = 0,
    load_in_8bit: In8Bit = False,
    load_in_4bit: In4Bit = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Talk to policies, several side by side. Replies stream; /reset, /system TEXT, /exit; stdin may be a file or a pipe."""
    sampling = sampling_of(temperature, top_p, top_k, greedy, "chat")
    policies = named_policies(policy)
    with importing():
        from rlhf_ray.chat import load_chat, talk_at_terminal, typed_lines

    fields = {
        "template": template,
        "response_length": max_new_tokens,
        "sampling": sampling,
        "seed": seed,
        "load_in_8bit": load_in_8bit,
        "load_in_4bit": load_in_4bit,
    }
    with stdout_kept():
        loaded = load_chat(policies, model=model, fields=fields, system=system)
    talk_at_terminal(loaded, typed_lines(), sys.stdout, lambda line: print(line, file=sys.stderr))


def add_chat_command(app: typer.Typer) -> None:
    app.command()(chat)
