"""No key in a job: whatever field or override holds one, it is refused in one line that does not show it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_ray.config import EvaluateConfig, PPOConfig
from rlhf_ray.config.load import load
from rlhf_ray.errors import ConfigError
from rlhf_ray.submit.places import replaced

KEY = "sk-" + "a1B2" * 8
JOB = "output_dir: runs/ppo\nmodel_name_or_path: base\ndata: {train: prompts.jsonl}\n"


@pytest.mark.parametrize(
    ("text", "overrides", "where"),
    [
        (f"rewards: [{{url: 'http://h/x', api_key: {KEY}}}]", (), "job.yaml:4: holds an OpenAI key"),
        (f"rewards: [{{url: 'http://h/x?k={KEY}'}}]", (), "job.yaml:4: holds an OpenAI key"),
        (f"rewards: [{{url: 'http://h/x'}}]\nrun_name: {KEY}", (), "job.yaml:5: holds an OpenAI key"),
        ("rewards: [{url: 'http://h/x'}]", (f"run_name={KEY}",), "override run_name: holds an OpenAI key"),
        ("rewards: [{url: 'http://h/x', api_key: mine}]", (), "job.yaml:4: rewards[0]: api_key: no key in a job"),
        (
            "rewards: [{url: 'http://h/x', Authorization: mine}]",
            (),
            "job.yaml:4: rewards[0]: Authorization: no key in a job",
        ),
    ],
)
def test_a_key_in_a_job_is_refused_in_one_line(
    text: str, overrides: tuple[str, ...], where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text(JOB + text + "\n")
    with pytest.raises(ConfigError) as error:
        load(PPOConfig, "job.yaml", overrides, check_files=False)
    (line,) = error.value.lines()
    assert line.startswith(f"error: {where}") and "put the key into a file (headers_file)" in line
    assert KEY not in line and "mine" not in line


def test_a_file_of_headers_stays_on_its_node_and_prompts_travel() -> None:
    """What `submit` makes of the paths of a job: headers are looked for on the nodes, the judge's own prompt is sent along."""
    llm = {
        "base_url": "http://h/v1",
        "model": "m",
        "headers_file": "h1",
        "annotators": [{"prompt": "own.txt"}, {"prompt": "pairwise"}],
    }
    policies = [
        {"name": "a", "outputs": "o.json"},
        {"name": "b", "endpoint": {"base_url": "http://h", "model": "m", "headers_file": "h2"}},
    ]
    job = {"rewards": [{"url": "http://h", "headers_file": "h0"}, {"llm": llm}], "policies": policies}
    seen = {}

    def visit(loc: tuple[str | int, ...], kind: str, path: str) -> str:
        seen[path] = kind
        return f"/there/{path}"

    found = replaced("evaluate", job, visit)
    assert seen == {"h0": "keys", "h1": "keys", "h2": "keys", "own.txt": "text", "o.json": "data"}
    assert [a["prompt"] for a in found["rewards"][1]["llm"]["annotators"]] == ["/there/own.txt", "pairwise"]
    assert found["policies"][1]["endpoint"]["headers_file"] == "/there/h2"


def test_files_that_a_judge_or_a_policy_names_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base").mkdir()
    Path("job.yaml").write_text(
        JOB.replace("runs/ppo", "runs/evaluate")
        + "policies: [{name: a, outputs: none.json}]\n"
        + "rewards: [{llm: {base_url: 'http://h/v1', model: m, annotators: [{prompt: my/own.txt}]}}]\n"
    )
    with pytest.raises(ConfigError) as error:
        load(EvaluateConfig, "job.yaml")
    lines = error.value.lines()
    assert any("policies[0].outputs: no such file" in line for line in lines)
    assert any("rewards[0].llm.annotators[0].prompt: no such file" in line for line in lines) and len(lines) == 2
