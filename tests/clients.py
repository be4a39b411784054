"""Client libraries against a running service, in an environment of their own (`make clients`).

tests/integration/service/test_clients.py starts the service, and holds the table in rlhf_ray/serve/README.md.

.venv-clients/bin/python tests/clients.py CLIENT URL FOLDER      CLIENT: one of CLIENTS; FOLDER: for files that it needs
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

CLIENTS = {
    "openai": "chat, streams, `n`, log-probabilities, tools, `parse` with a pydantic model, history by `model_dump()`, `echo`",
    "langchain_openai": "`invoke`, `stream`, `batch`, `bind_tools`, `with_structured_output` (two methods), its overflow error",
    "litellm": "`completion`, streams, `text_completion`, history by `model_dump()`, its `ContextWindowExceededError`",
    "instructor": "pydantic models in modes TOOLS and JSON_SCHEMA",
    "lm_eval": "`local-completions` with the service's own tokenizer, log-likelihoods of 20 documents, the same as transformers'",
    "schemathesis": "every operation of `/openapi.json`, all answers as the document says, none a server error",
}
ASK: list[Any] = [{"role": "user", "content": "The weather in Rome?"}]
LONG: list[Any] = [{"role": "user", "content": "x" * 9000}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}


def answer_model() -> Any:
    from pydantic import BaseModel, ConfigDict, Field

    class Answer(BaseModel):
        """Of a size that a model which writes at random comes to the end of."""

        model_config = ConfigDict(extra="forbid")
        warm: bool
        degrees: int = Field(ge=0, le=40)

    return Answer


def openai(url: str, folder: Path) -> None:
    import openai

    ai = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    asked: dict[str, Any] = {"model": "base", "messages": ASK, "seed": 1, "max_tokens": 12}
    assert next(m.id for m in ai.models.list()) == "base"
    whole = ai.chat.completions.create(**asked, n=2, logprobs=True, top_logprobs=2)
    assert len(whole.choices) == 2 and whole.choices[0].logprobs.content[0].top_logprobs
    pieces = list(ai.chat.completions.create(**asked, stream=True))
    said = "".join(p.choices[0].delta.content or "" for p in pieces)
    assert said == whole.choices[0].message.content
    call = (
        ai.chat.completions.create(**{**asked, "max_tokens": 200}, tools=[TOOL], tool_choice=NAMED).choices[0].message
    )
    assert json.loads(call.tool_calls[0].function.arguments)["city"] in ("Rome", "Oslo")
    told = {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": "Sunny."}
    assert ai.chat.completions.create(**{**asked, "messages": [*ASK, call.model_dump(), told]}, tools=[TOOL]).choices
    parsed = ai.chat.completions.parse(**{**asked, "max_tokens": 300}, response_format=answer_model())
    assert parsed.choices[0].message.parsed.warm in (True, False)
    assert ai.completions.create(model="base", prompt=["a", "b"], max_tokens=3, echo=True, logprobs=2).choices


def langchain_openai(url: str, folder: Path) -> None:
    from langchain_openai import ChatOpenAI
    from langchain_openai.chat_models.base import OpenAIContextOverflowError

    chat = ChatOpenAI(model="base", base_url=f"{url}/v1", api_key="none", max_tokens=300, seed=1, max_retries=0)
    short = chat.bind(max_tokens=12)
    assert short.invoke("Hello").response_metadata["finish_reason"] in ("stop", "length")
    assert sum(len(chunk.content) for chunk in short.stream("Hello")) > 0
    assert len(short.batch(["a", "b"])) == 2
    assert short.bind_tools([TOOL]).invoke("Hello").response_metadata["token_usage"]["total_tokens"] > 0
    for method in ("json_schema", "function_calling"):
        found = chat.with_structured_output(answer_model(), method=method).invoke("Hello")
        assert found.warm in (True, False), method
    try:
        chat.invoke(LONG)
    except OpenAIContextOverflowError:
        return
    raise AssertionError("a prompt that is too long is not told as one")


def litellm(url: str, folder: Path) -> None:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    import litellm

    asked: dict[str, Any] = {"model": "openai/base", "api_base": f"{url}/v1", "api_key": "none", "max_tokens": 12}
    first = litellm.completion(messages=ASK, presence_penalty=1, logprobs=True, top_logprobs=2, **asked)
    assert first.choices[0].finish_reason in ("stop", "length") and first.choices[0].logprobs is not None
    history = [*ASK, first.choices[0].message.model_dump(), *ASK]
    assert litellm.completion(messages=history, **asked).usage.prompt_tokens > 0
    assert len(list(litellm.completion(messages=history, stream=True, **asked))) > 1
    text = {**asked, "model": "text-completion-openai/base"}
    assert litellm.text_completion(prompt="Hello", **text).choices[0].finish_reason
    try:
        litellm.completion(messages=LONG, **asked)
    except litellm.ContextWindowExceededError:
        return
    raise AssertionError("a prompt that is too long is not told as one")


def instructor(url: str, folder: Path) -> None:
    import instructor
    import openai

    ai = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        client = instructor.from_openai(ai, mode=mode)
        found = client.chat.completions.create(
            model="base", response_model=answer_model(), messages=ASK, max_retries=0, max_tokens=300, seed=1
        )
        assert found.warm in (True, False), mode


TASK = """task: birds
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/birds.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["yes", "no"]
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def lm_eval(url: str, folder: Path) -> None:
    """The samples, with the log-likelihoods, are left in FOLDER/lm_eval.json."""
    os.environ |= {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none"}
    import lm_eval
    from lm_eval.tasks import TaskManager

    rows = [{"question": f"Is number {i} a bird?", "answer": i % 2} for i in range(20)]
    (folder / "birds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "birds.yaml").write_text(TASK.format(folder=folder))
    found = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={"model": "base", "base_url": f"{url}/v1/completions", "num_concurrent": 2, "max_retries": 1},
        tasks=["birds"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        batch_size=4,
        bootstrap_iters=0,
    )
    samples = [(s["doc"]["question"], [r[0] for r in s["resps"]]) for s in found["samples"]["birds"]]
    assert len(samples) == 20
    (folder / "lm_eval.json").write_text(json.dumps(samples))


def schemathesis(url: str, folder: Path) -> None:
    """All checks but one: that everything which fits the document is accepted. It cannot say which fields exclude each other."""
    statuses = "[400, 401, 403, 404, 413, 415, 429]"  # 413 is not among its own
    (folder / "schemathesis.toml").write_text(f"[checks]\nnegative_data_rejection.expected-statuses = {statuses}\n")
    run = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json", "--no-color"]
    run += ["--phases", "fuzzing", "--max-examples", os.environ.get("EXAMPLES", "8"), "--suppress-health-check", "all"]
    run += ["--exclude-checks", "positive_data_acceptance", "--seed", "1"]
    done = subprocess.run(run, cwd=folder, capture_output=True, text=True, timeout=500)
    told = "\n".join(line[:300] for line in done.stdout.splitlines() if line.strip())
    assert done.returncode == 0, told[-6000:] + done.stderr[-2000:]


if __name__ == "__main__":
    name, service, where = sys.argv[1:]
    globals()[name](service, Path(where))
    print(json.dumps({"client": name, "version": importlib.metadata.version(name.replace("_", "-"))}))
