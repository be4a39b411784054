"""Client libraries against a running service (tests/clients.py), and the table of them in rlhf_ray/serve/README.md."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.config.serve import ServeConfig
from tests.clients import CLIENTS
from tests.readme_tables import table_of
from tests.unit.serve.conftest import LiveService
from tests.unit.serve.test_tools import has_library

ROOT = Path(__file__).parents[3]
README = ROOT / "rlhf_ray" / "serve" / "README.md"
PYTHON = Path(os.environ.get("RLHF_RAY_CLIENTS", ROOT / ".venv-clients")) / "bin" / "python"
TEMPLATE = """{%- if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>
{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}
<tool_call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>{% endfor %}
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Path]) -> Iterator[LiveService]:
    folder = tmp_path_factory.mktemp("clients")
    base = folder / "base"
    shutil.copytree(tiny_llama(context=2048), base)
    (base / "chat_template.jinja").write_text(TEMPLATE)
    limits = {"max_tokens": 400, "default_max_tokens": 24}
    made = LiveService(ServeConfig(output_dir=str(folder / "serve"), model_name_or_path=str(base), limits=limits))
    yield made
    made.close()


def test_the_table_names_every_client_and_what_it_does() -> None:
    rows = [f"| {name.replace('_', '-')} | {what} |" for name, what in CLIENTS.items()]
    assert table_of(README.read_text(), "clients")[2:] == rows


@pytest.mark.integration
@pytest.mark.skipif(not PYTHON.exists(), reason=f"no client libraries at {PYTHON}; make clients")
@has_library
@pytest.mark.parametrize("name", CLIENTS)
def test_client(name: str, service: LiveService, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [str(PYTHON), str(ROOT / "tests" / "clients.py"), name, service.url, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-8000:]
    assert json.loads(done.stdout.splitlines()[-1])["client"] == name
    if name == "lm_eval":
        _log_likelihoods_are_transformers_own(Path(service.config.model_name_or_path), tmp_path / "lm_eval.json")


def _log_likelihoods_are_transformers_own(base: Path, told: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    for question, answers in json.loads(told.read_text()):
        for text, (found, is_greedy) in zip((" yes", " no"), answers):
            before, behind = (tokenizer(t, add_special_tokens=False).input_ids for t in (question, text))
            with torch.no_grad():
                table = model(torch.tensor([before + behind])).logits[0, len(before) - 1 : -1].log_softmax(-1)
            right = table.gather(1, torch.tensor(behind)[:, None]).sum().item()
            assert found == pytest.approx(right, abs=1e-3)
            assert is_greedy == (table.argmax(-1).tolist() == behind)
