"""What travels with a job: what it names and nothing else; paths that stay are absolute; secrets never go."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_ray.config.load import load, load_any
from rlhf_ray.config.pipeline import PipelineConfig
from rlhf_ray.config.sweep import SweepConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.submit.pack import JOB, LIMIT_BYTES, Need, Parcel, make, package_files

JOBS: dict[str, dict[str, Any]] = {
    "sft": {"data": {"train": "data/small.jsonl"}},
    "reward": {"data": {"train": "data/pairs.jsonl"}, "sft": "runs/sft"},
    "ppo": {
        "data": {"train": ["data/small.jsonl", "org/prompts"]},
        "ptx_coef": 0.1,
        "ptx_data": {"train": "data/pairs.jsonl"},
        "sft": "runs/sft",
        "rewards": [
            {"name": "rule", "function": "rewards/mine.py:score"},
            {"name": "learned", "run": "runs/reward"},
            {"name": "module", "function": "pkg.deep:score"},
            {"name": "many", "ensemble": ["runs/reward", "runs/ppo"]},
        ],
        "template": "templates/mine.json",
    },
    "evaluate": {
        "data": {"train": "data/small.jsonl"},
        "policies": [{"name": "base", "policy": "base"}, {"name": "ppo", "policy": "runs/ppo@20"}],
        "rewards": [{"name": "r", "model": "org/reward"}],
    },
    "sweep": {
        "ppo": {
            "data": {"train": "data/small.jsonl"},
            "rewards": [{"function": "rewards/mine.py:score"}],
            "sft": "runs/sft",
        },
        "space": {"kl_coef": [0.1, 0.2]},
    },
    "serve": {"registry": "registry", "adapters": {"draft": "runs/ppo@40"}, "api_keys": "keys.json"},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with everything that a person has in one: data, code, runs, secrets."""
    work = tmp_path / "work"
    files = {
        "data/small.jsonl": '{"instruction": "a"}\n' * 50,
        "data/pairs.jsonl": '{"a": 1}\n',
        "rewards/mine.py": "import helper\nfrom torch import nn\n\ndef score(prompts, completions, **c):\n    return []\n",
        "helper.py": "import helper_of_helper\n",
        "helper_of_helper.py": "X = 1\n",
        "unrelated.py": "Y = 2\n",
        "pkg/__init__.py": "",
        "pkg/deep.py": "def score(prompts, completions, **c):\n    return []\n",
        "templates/mine.json": '{"prompt_no_input": "{instruction}"}',
        ".env": "HF_TOKEN=hf_secret",
        ".git/config": "x",
        "runs/sft/manifest.json": "{}",
        "runs/reward/manifest.json": "{}",
        "runs/ppo/manifest.json": "{}",
        "keys.json": "[]",
        "models/base/config.json": "{}",
    }
    for name, content in files.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(content)
    monkeypatch.chdir(work)
    return work


def parcel(kind: str, *overrides: str, **options: Any) -> Parcel:
    job = {"output_dir": "runs/new", "model_name_or_path": "models/base", **JOBS[kind]}
    Path("job.yaml").write_text(yaml.safe_dump(job))
    command, config = load_any("job.yaml", overrides, kind, check_files=False)
    assert command == kind
    return make(command, config, **options)


def test_of_a_ppo_job_the_code_and_small_data_travel_and_the_rest_is_named_by_its_path(folder: Path) -> None:
    made = parcel("ppo")
    code = {"rewards/mine.py", "helper.py", "helper_of_helper.py", "pkg/__init__.py", "pkg/deep.py"}
    assert set(made.files) == code | {"data/small.jsonl", "data/pairs.jsonl", "templates/mine.json"}
    assert made.values["data"]["train"] == ["data/small.jsonl", "org/prompts"]
    assert made.values["rewards"][0]["function"] == "rewards/mine.py:score"
    assert made.values["sft"] == str(folder / "runs/sft") and made.output_dir == str(folder / "runs/new")
    assert made.values["resume"] == "auto"
    assert {(n.field, n.path) for n in made.needs} == {
        ("model_name_or_path", str(folder / "models/base")),
        ("sft", str(folder / "runs/sft")),
        ("rewards[1].run", str(folder / "runs/reward")),
        ("rewards[3].ensemble[0]", str(folder / "runs/reward")),
        ("rewards[3].ensemble[1]", str(folder / "runs/ppo")),
    }


@pytest.mark.parametrize("kind", JOBS)
def test_what_is_sent_is_a_job_of_the_same_kind(folder: Path, kind: str, tmp_path: Path) -> None:
    """Loaded again from the archive; small data travels, however much this package grows (it took the room of the job's files)."""
    made = parcel(kind)
    assert made.write(tmp_path / "job.zip", with_package=False) < LIMIT_BYTES
    assert made.write(tmp_path / "job.zip", with_package=True) < 2 * LIMIT_BYTES
    with zipfile.ZipFile(tmp_path / "job.zip") as archive:
        names = set(archive.namelist())
        (tmp_path / "again.yaml").write_bytes(archive.read(JOB))
    assert set(package_files()) < names and "rlhf_ray/cli/app.py" in names
    assert not {n for n in names if ".env" in n or ".git" in n or n.startswith("runs/") or "__pycache__" in n}
    command, config = load_any(tmp_path / "again.yaml", (), kind, check_files=False)
    assert command == kind and os.path.isabs(config.output_dir)
    if kind != "serve":
        assert config.resume == "auto"  # type: ignore[union-attr]


def test_equal_jobs_give_equal_archives(folder: Path, tmp_path: Path) -> None:
    """So that a cluster that has one does not take it again."""
    for name in ("a", "b"):
        parcel("ppo").write(tmp_path / name, with_package=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_large_data_is_named_and_small_data_travels_with_it(folder: Path) -> None:
    import random

    draw = random.Random(0)
    with open("data/large.jsonl", "w") as file:
        file.writelines(json.dumps({"instruction": draw.randbytes(40).hex()}) + "\n" for _ in range(40_000))
    made = parcel("sft", "data.train=[data/large.jsonl, data/small.jsonl]")
    assert set(made.files) == {"data/small.jsonl"} and made.left == ["data/large.jsonl"]
    assert made.values["data"]["train"] == [str(folder / "data/large.jsonl"), "data/small.jsonl"]
    assert ("data.train[0]", "file", str(folder / "data/large.jsonl")) in {
        (n.field, n.kind, n.path) for n in made.needs
    }
    assert set(parcel("sft", "data.train=data/large.jsonl", limit_bytes=10_000_000).files) == {"data/large.jsonl"}


def test_storage_is_where_relative_paths_start_on_the_cluster(folder: Path) -> None:
    made = parcel("reward", storage="/shared/team")
    assert made.output_dir == "/shared/team/runs/new"
    assert made.values["sft"] == "/shared/team/runs/sft" and made.files.keys() == {"data/pairs.jsonl"}
    made = parcel("reward", "data.train=/nfs/pairs.jsonl", "sft=/nfs/sft", storage="/shared/team")
    assert made.values["sft"] == "/nfs/sft" and made.values["data"]["train"] == ["/nfs/pairs.jsonl"]
    judge = "{base_url: 'http://judge:8000/v1', model: m, cache_dir: cache/judge, annotators: [{prompt: pointwise}]}"
    made = parcel("ppo", f"rewards=[{{name: judge, llm: {judge}}}]", storage="/shared/team")
    assert made.values["rewards"][0]["llm"]["cache_dir"] == "/shared/team/cache/judge", "where runs find it again"


def test_files_from_elsewhere_and_hub_ids(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    made = parcel("sft", f"data.train={tmp_path}/rows.jsonl", "model_name_or_path=meta-llama/Llama-3.1-8B")
    (name,) = made.files
    assert name.startswith("rlhf_ray_files/") and made.values["data"]["train"] == [name]
    assert made.values["model_name_or_path"] == "meta-llama/Llama-3.1-8B" and made.needs == []


def test_what_a_pipeline_makes_itself_needs_not_be_there(folder: Path) -> None:
    job = {"output_dir": "runs/all", "model_name_or_path": "models/base", "stages": ["sft", "ppo"]}
    job |= {"sft": {"data": {"train": "data/small.jsonl"}}}
    job |= {
        "ppo": {"data": {"train": "data/small.jsonl"}, "sft": "runs/all/sft", "rewards": [{"function": "helper.py:f"}]}
    }
    Path("job.yaml").write_text(yaml.safe_dump(job))
    made = make("pipeline", load(PipelineConfig, "job.yaml", check_files=False))
    assert [n.field for n in made.needs] == ["model_name_or_path"]
    assert made.values["ppo"]["sft"] == str(folder / "runs/all/sft")


def test_a_sweep_of_dpo_takes_its_pairs_its_prompts_and_its_rule(folder: Path) -> None:
    job = {
        "output_dir": "runs/sweep",
        "model_name_or_path": "models/base",
        "dpo": {"data": {"train": "data/pairs.jsonl"}, "sft": "runs/sft"},
        "evaluate": {"data": {"train": "data/small.jsonl"}, "rewards": [{"function": "rewards/mine.py:score"}]},
        "space": {"beta": [0.1, 0.2]},
    }
    Path("job.yaml").write_text(yaml.safe_dump(job))
    command, config = load_any("job.yaml", check_files=False)
    assert command == "sweep" and isinstance(config, SweepConfig) and config.stage == "dpo"
    made = make("sweep", config)
    assert {"data/pairs.jsonl", "data/small.jsonl", "rewards/mine.py", "helper.py"} <= set(made.files)
    assert made.values["evaluate"]["rewards"][0]["function"] == "rewards/mine.py:score"
    assert made.values["dpo"]["sft"] == str(folder / "runs/sft")
    assert [need.field for need in made.needs] == ["model_name_or_path", "dpo.sft"]


def test_modules_that_are_not_here_must_be_on_the_nodes(folder: Path) -> None:
    made = parcel("ppo", "rewards=[{name: far, function: 'some_company.rewards:score'}]")
    assert ("rewards[0].function", "module", "some_company.rewards") in {(n.field, n.kind, n.path) for n in made.needs}


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("rewards/mine.py", "KEY = 'the-secret-value-1'", "holds the value of MY_API_KEY"),
        ("rewards/mine.py", "KEY = 'hf_" + "a" * 34 + "'", "holds a Hugging Face token"),
        ("helper.py", "K = 'sk-" + "b" * 30 + "'", "holds an OpenAI key"),
        ("data/small.jsonl", '{"instruction": "-----BEGIN RSA PRIVATE KEY-----"}\n', "holds a private key"),
    ],
)
def test_a_secret_stays_here(folder: Path, monkeypatch: pytest.MonkeyPatch, file: str, content: str, said: str) -> None:
    monkeypatch.setenv("MY_API_KEY", "the-secret-value-1")
    before = Path(file).read_text() if file.endswith(".py") else ""
    Path(file).write_text(before + content)
    with pytest.raises(ConfigError, match=said) as refused:
        parcel("ppo")
    assert "secret-value" not in str(refused.value) and "aaaa" not in str(refused.value)


def test_a_file_of_secrets_is_not_data(folder: Path) -> None:
    Path("id_rsa").write_text("x")
    with pytest.raises(ConfigError, match="is a file of secrets by its name"):
        parcel("ppo", "template=./id_rsa")


def test_a_uri_is_no_path(folder: Path) -> None:
    """It was sent as a path below the working folder, which no node can read."""
    told = "^model_name_or_path: is a URI; expected a path, or an id of the Hub; got s3://bucket/x.jsonl; fix"
    with pytest.raises(ConfigError, match=told):
        parcel("ppo", "model_name_or_path=s3://bucket/x.jsonl")


def test_data_on_an_object_store_stays_there(folder: Path) -> None:
    found = parcel("ppo", "data.train=s3://bucket/x.jsonl")
    assert found.values["data"]["train"] == ["s3://bucket/x.jsonl"]
    assert Need("data.train[0]", "uri", "s3://bucket/x.jsonl") in found.needs


def test_missing_files_are_told_together(folder: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        parcel("ppo", "template=templates/none.json", "rewards=[{name: a, function: 'gone.py:f'}]")
    assert [p.where for p in refused.value.problems] == ["template", "rewards[0].function"]


def test_too_much_code_is_refused_with_its_size(folder: Path) -> None:
    Path("helper.py").write_bytes(b"X = '" + os.urandom(1_200_000).hex().encode() + b"'\n")
    with pytest.raises(
        ConfigError, match=r"the job's files that have to travel take [\d,]+ bytes, packed; expected at most 1,000,000"
    ):
        parcel("ppo")
