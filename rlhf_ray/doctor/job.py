"""A job, or a model alone: does the job fit, and are template, pad and end tokens what they should be?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rlhf_ray.config import JobFields
from rlhf_ray.config.pipeline import stages_of
from rlhf_ray.config.serve import ServeConfig
from rlhf_ray.doctor.checks import CheckResult, Status
from rlhf_ray.errors import ResourceError, RlhfRayError
from rlhf_ray.launch.resources import Node

ABOUT = "job"
SAMPLE = "Name a bird."


def tokens(model: str, revision: str | None, template: str | None) -> Iterator[CheckResult]:
    """Tokenizer, pad, end tokens, and a prompt as the template makes it."""
    from rlhf_ray.data.encode import own_end_of_turn
    from rlhf_ray.data.templates import ChatTemplate
    from rlhf_ray.launch.model_families import check_model
    from rlhf_ray.models.sources import check_files, resolve_source
    from rlhf_ray.models.tokenizer import choose_pad, eos_ids, tokenizer_of

    try:
        untried = check_model(model, revision)
        source = resolve_source(model, revision)
        check_files(source)
        tokenizer = tokenizer_of(source)
        ends = eos_ids(tokenizer, _generation_config(source.folder), None)
        if template == "chat" and tokenizer.chat_template is not None:
            own_end = own_end_of_turn(tokenizer, ChatTemplate(tokenizer))
            ends = tuple(dict.fromkeys(i for i in (own_end, *ends) if i is not None))
        pad = choose_pad(tokenizer, ends)
    except RlhfRayError as error:
        yield from _told("model", error)
        return
    yield CheckResult(ABOUT, "model", "warn" if untried else "ok", untried or model)
    named = ", ".join(f"{i} {tokenizer.convert_ids_to_tokens(i)!r}" for i in ends)
    own = tokenizer.eos_token_id
    status: Status = "ok" if own in ends else "warn"
    yield CheckResult(ABOUT, "end tokens", status, named, "its tokenizer has none; the generation config names these")
    plain = "ordinary token" in pad.why
    fix = "harmless, since it is always masked; a tokenizer with its own pad token is cleaner"
    yield CheckResult(ABOUT, "pad token", "warn" if plain else "ok", f"{pad.id} {pad.token!r}: {pad.why}", fix)
    if template is not None:
        yield from _template(template, tokenizer, ends)


def _generation_config(folder: Any) -> Any:
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(str(folder))
    except OSError:
        return None


def _template(name: str, tokenizer: Any, ends: Sequence[int]) -> Iterator[CheckResult]:
    from rlhf_ray.data.encode import encode_prompts
    from rlhf_ray.data.prompts import Prompt
    from rlhf_ray.data.templates import load_template

    try:
        template = load_template(name, tokenizer)
        (ids,) = encode_prompts(tokenizer, template, [Prompt(SAMPLE)])
    except RlhfRayError as error:
        yield from _told("template", error)
        return
    first = ids[:1] == [tokenizer.bos_token_id]  # some models list their start token among the end tokens
    inside = [i for i in ids[int(first) :] if i in ends]
    bos = [i for i in ids if tokenizer.bos_token_id is not None and i == tokenizer.bos_token_id]
    shown = repr(tokenizer.decode(ids[-12:]))
    if inside and name != "chat":
        told = f"{name}: a prompt holds end token {inside[0]}, where replies would seem to end"
        yield CheckResult(ABOUT, "template", "fail", told, "take a tokenizer that appends no end token")
    elif len(bos) > 1:
        yield CheckResult(
            ABOUT, "template", "fail", f"{name}: a prompt begins with {len(bos)} start tokens", "template: none"
        )
    else:
        yield CheckResult(ABOUT, "template", "ok", f"{name}: a prompt of {len(ids)} tokens that ends in {shown}")


def placement(config: JobFields | ServeConfig, machines: Sequence[Node] | None) -> Iterator[CheckResult]:
    """Whether the job's processes fit: on these nodes, or (None) on this machine."""
    if isinstance(config, ServeConfig) or not hasattr(config, "learner"):
        return
    from rlhf_ray.launch.launch import placement_of
    from rlhf_ray.launch.preflight import check
    from rlhf_ray.launch.resources import role_requests

    try:
        if machines is None:
            found = placement_of(config)
        else:
            total: dict[str, float] = {}
            for node in machines:
                for kind, amount in node.resources.items():
                    total[kind] = total.get(kind, 0.0) + amount
            found = check(role_requests(config, total, own_ray=False), machines)
    except ResourceError as error:
        yield from _told("placement", error)
        return
    where = "; ".join(f"{role} on {', '.join(dict.fromkeys(nodes))}" for role, nodes in found.items())
    yield CheckResult(ABOUT, "placement", "ok", where or "runs in this process, without Ray")


def quantised(config: JobFields | ServeConfig, kernel: CheckResult) -> Iterator[CheckResult]:
    """A job that needs bitsandbytes needs it to work. kernel: what was found of it."""
    if (config.load_in_4bit or config.load_in_8bit) and (kernel.status != "ok" or "not installed" in kernel.said):
        yield CheckResult(
            ABOUT, "quantised base", "fail", f"bitsandbytes: {kernel.said}", "pip install 'rlhf_ray[quant]'"
        )


def templates_of(config: JobFields | ServeConfig) -> list[str]:
    """Templates that the job's prompts have."""
    if isinstance(config, ServeConfig):
        return [config.template] if config.template is not None else []
    return list(dict.fromkeys(stage.template for stage in stages_of(config)))


def _told(name: str, error: RlhfRayError) -> Iterator[CheckResult]:
    for problem in error.problems:
        said = f"{problem.where}: {problem.what}" + (f" (got {problem.got})" if problem.got else "")
        yield CheckResult(ABOUT, name, "fail", said, problem.fix)
