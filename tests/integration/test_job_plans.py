"""The plan of every job file of `jobs/`: processes and GPUs that its header names, for sweeps and the service too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from rlhf_ray.config.load import dump_yaml, load_any
from rlhf_ray.config.yaml_reader import Loc
from rlhf_ray.plan.job_plan import plan
from rlhf_ray.plan.memory import gpus
from rlhf_ray.serve.planning import plan_service
from rlhf_ray.submit.places import Kind, replaced
from rlhf_ray.sweep.planning import plan_sweep

pytestmark = pytest.mark.integration
JOBS = sorted((Path(__file__).parents[2] / "jobs").glob("*.yaml"))
QUICK = {"sweep_kl", "serve"}
"""The kinds of jobs that nothing else plans; the others are left to `make test-long`."""
CASES = [pytest.param(job, marks=() if job.stem in QUICK else pytest.mark.long, id=job.stem) for job in JOBS]


def stage_of(job: Path) -> str:
    """The command of the launch line in the header."""
    line = next(line for line in job.read_text().splitlines() if line.startswith("#   rlhf-ray ") and job.name in line)
    return line.split()[2]


GPUS = {
    **{"alpaca_8b_24gb": 1, "ppo_2xa100_colocate": 2, "ppo_2xa100_split": 2, "ppo_zero3_2x40gb": 2, "serve": 1},
    **{"sweep_kl": 1, "sweep_kl_2xa100": 1},
}
"""GPUs of each job, of one trial for a sweep; the others run on the CPU."""


@pytest.mark.parametrize("job", CASES)
def test_its_plan_has_the_processes_and_gpus_that_its_header_names(
    job: Path, tiny_llama: Callable[..., Path], tiny_run: Callable[..., Path], tmp_path: Path
) -> None:
    """On a tiny model in place of the job's own, so that the memory means nothing and everything else does."""
    base = tiny_llama(context=2048)
    runs = {name: tiny_run(tmp_path / name, base, name) for name in ("sft", "reward")}
    (tmp_path / "registry").mkdir()

    def here(loc: Loc, kind: Kind, text: str) -> str:
        if kind == "model":
            return str(base)
        if kind == "folder":
            return str(
                runs["sft"] if loc[-1] == "sft" else tmp_path / "registry" if loc[-1] == "registry" else runs["reward"]
            )
        return text

    stage = stage_of(job)
    values = replaced(stage, yaml.safe_load(job.read_text()), here)
    for section in (values, values.get("ppo") or {}):  # an adapter's own r is not the job's to say
        section.pop("load_in_4bit", None)
    (tmp_path / "job.yaml").write_text(dump_yaml(values))
    name, config = load_any(tmp_path / "job.yaml", (), stage, check_files=False)
    assert name == stage
    make = {"sweep": plan_sweep, "serve": plan_service}.get(stage, plan)
    device = "cuda" if job.stem in GPUS else "cpu"
    found = make(config, device)  # type: ignore[operator, arg-type]
    assert found.stages and all(process.total > 0 for s in found.stages for process in s.processes)
    if job.stem in GPUS:
        assert max(len(gpus(s.processes)) for s in found.stages) == GPUS[job.stem]
    assert found.to_json()["stages"][0]["processes"]
