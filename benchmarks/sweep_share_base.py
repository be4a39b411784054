"""Trials on one base (sweep.share_base) against as many processes, and against one trial after the other.

    python benchmarks/sweep_share_base.py --output
    python benchmarks/sweep_share_base.py --model runs/smollm2/base --replies 8 --steps 2 --trials 1 4 8 \\
        --shared-threads 2 --without "with Ray" "in turn" --output

Each case runs the same trials: stories260K (or SmolLM2-135M, a folder that `rlhf-ray import gguf` made), the VADER reward, learning
rates and seeds that differ.

    shared        one `rlhf-ray sweep` with share_base and learner.num_workers 0: one process for all trials, without Ray
    with Ray      the same with num_workers 1: a Ray, and one process for all trials
    processes     one `rlhf-ray ppo` command a trial, `--at-once` of them at a time, without Ray
    in turn       one `rlhf-ray sweep` without share_base, one trial at a time in one process that Tune uses again

Seconds are wall time; CPU seconds those of every process of the case, which other work on the machine disturbs less. Memory is
the highest sum at one time over all processes of the case, looked at every second: proportional (PSS: a page that
several processes map counts once) and resident (RSS). Where fewer processes run at once than there are trials, the memory of all at
once is that of one process times their number, and the report says so. Equality: how the replies that samples.jsonl keeps of every
step, and the held-out scores, compare between the shared case and the processes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _common import data_folder, emit, parser, report, spread
from stories_sentiment import job

from rlhf_ray.config import SweepConfig
from rlhf_ray.config.resolved import dump_yaml
from rlhf_ray.metrics import read_metrics
from rlhf_ray.storage.run import load_run
from rlhf_ray.sweep.trials import Trial, job_of, planned

SHARED = ("shared", "with Ray")
SMALL, LARGE = "stories260K, 260,032 parameters, float32, CPU", "SmolLM2-135M-Instruct, float32, CPU"
TICKS = os.sysconf("SC_CLK_TCK")
LOOK_S = 1.0
"""Adding up the pages of a large process takes the kernel a while, which the case must not notice."""


@dataclass
class Usage:
    """Of all that comes from this process. cpu: seconds by process.  pss, rss: bytes, the highest sum at one time.  processes: the
    most at one time."""

    cpu: dict[int, float] = field(default_factory=dict)
    pss: int = 0
    rss: int = 0
    processes: int = 0

    def look(self) -> None:
        pss = rss = count = 0
        for pid in descendants(os.getpid()):
            try:
                stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
            except OSError:  # it has ended
                continue
            self.cpu[pid] = (int(stat[11]) + int(stat[12])) / TICKS
            kib = {line.split(":")[0]: int(line.split()[1]) for line in rollup}
            pss, rss, count = pss + kib.get("Pss", 0) * 1024, rss + kib.get("Rss", 0) * 1024, count + 1
        self.pss, self.rss, self.processes = max(self.pss, pss), max(self.rss, rss), max(self.processes, count)


def descendants(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(path.name))
    found = list(children.get(root, []))
    for pid in found:
        found += children.get(pid, [])
    return found


def measured(work: Callable[[], None]) -> dict[str, float]:
    """Run `work`, which starts commands, and look at all of them meanwhile."""
    usage, done = Usage(), threading.Event()

    def watch() -> None:
        while not done.wait(LOOK_S):
            usage.look()

    thread, started = threading.Thread(target=watch), time.perf_counter()
    thread.start()
    try:
        work()
    finally:
        done.set()
        thread.join()
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": sum(usage.cpu.values()),
        "pss_mib": usage.pss / 2**20,
        "rss_mib": usage.rss / 2**20,
        "processes": float(usage.processes),
    }


def command(stage: str, path: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "rlhf_ray.cli", stage, str(path)], stderr=subprocess.DEVNULL)


def sweep_config(
    data: Path, folder: Path, trials: int, arguments: argparse.Namespace, share: bool, workers: int = 1
) -> SweepConfig:
    fields = job(folder, data, 0, arguments.steps, 1).model_dump(mode="json", exclude_unset=True)
    fields |= {
        "rollout_batch_size": arguments.replies,
        "num_mini_batches": 2,
        "data": {**fields["data"], "eval_max_rows": arguments.replies},
    }
    if arguments.model is not None:
        fields["model_name_or_path"] = str(arguments.model.resolve())
        del fields["stop_token_ids"]  # those of the stories
    for name in ("output_dir", "seed", "learner", "learning_rate"):
        del fields[name]
    shared = {name: fields.pop(name) for name in ("model_name_or_path", "template", "report_to", "defaults_version")}
    rates = [1e-3, 5e-4, 2e-4, 1e-4][: min(trials, 4)]
    return SweepConfig(
        output_dir=str(folder),
        **shared,
        learner={"num_threads": arguments.shared_threads if share else 1, "num_workers": workers},
        ppo=fields,
        space={"learning_rate": rates},
        seeds=tuple(range(max(trials // 4, 1))),
        share_base=share,
        trials_per_base=trials,
        max_concurrent_trials=trials if share else 1,
    )


def as_sweep(config: SweepConfig, folder: Path) -> dict[str, float]:
    path = folder / "sweep.yaml"
    path.write_text(dump_yaml(config.model_dump(mode="json", exclude_unset=True)))

    def work() -> None:
        if command("sweep", path).wait():
            sys.exit("the sweep failed")

    return measured(work)


def as_commands(config: SweepConfig, folder: Path, at_once: int) -> dict[str, float]:
    """The same trials as commands of their own, into the folders in which a sweep would put them."""
    waiting = []
    for trial in planned(config):
        values = job_of(config.confirming(True), trial).model_dump(mode="json", exclude_unset=True)
        path = folder / f"{trial.id}.yaml"
        path.write_text(dump_yaml({**values, "learner": {"num_workers": 0, "num_threads": 1}}))
        waiting.append(path)

    def work() -> None:
        running: list[subprocess.Popen[bytes]] = []
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(command("ppo", waiting.pop(0)))
            time.sleep(0.1)
            if any(process.poll() for process in running):
                sys.exit("a trial failed")
            running = [process for process in running if process.poll() is None]

    return measured(work)


def equality(one: SweepConfig, other: SweepConfig) -> dict[str, float]:
    """Of the trials of two sweeps: share of equal replies and characters kept of the first step and of all, and scores."""
    same = total = same_first = first = characters = length = 0
    gaps = []
    for a, b in zip(planned(one), planned(other), strict=True):
        for x, y in zip(rows_of(a), rows_of(b), strict=True):
            equal = x["reply"] == y["reply"]
            total, same = total + 1, same + equal
            if x["step"] == 1:
                first, same_first = first + 1, same_first + equal
            length += max(len(x["reply"]), len(y["reply"]))
            characters += sum(p == q for p, q in zip(x["reply"], y["reply"]))
        gaps.append(abs(score(a) - score(b)))
    return {
        "replies": total,
        "equal_replies": same / total,
        "equal_replies_of_the_first_step": same_first / first,
        "equal_characters": characters / length,
        "largest_difference_of_scores": max(gaps),
    }


def rows_of(trial: Trial) -> Sequence[dict[str, Any]]:
    return read_metrics(trial.folder / "samples.jsonl")


def score(trial: Trial) -> float:
    return float(load_run(trial.folder).metrics["eval/reward"])


Runs = dict[str, list[dict[str, float]]]
"""Case -> its repeats."""


def run_cases(data: Path, trials: int, arguments: argparse.Namespace, runs: Runs) -> None:
    """Each case once, into `runs`."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        configs = {
            name: sweep_config(data, folder / name, trials, arguments, name in SHARED, int(name != "shared"))
            for name in (*SHARED, "processes", "in turn")
        }
        for name in SHARED:
            if name not in arguments.without:
                runs.setdefault(name, []).append(as_sweep(configs[name], folder))
        if trials <= arguments.most_processes:
            at_once = min(trials, arguments.at_once)
            runs.setdefault("processes", []).append(as_commands(configs["processes"], folder, at_once))
            if "in turn" not in arguments.without:
                runs.setdefault("in turn", []).append(as_sweep(configs["in turn"], folder))
            runs.setdefault("equality", []).append(equality(configs["shared"], configs["processes"]))
    for name, found in runs.items():
        print(f"{trials} trials, {name}: {found[-1]}", file=sys.stderr, flush=True)


def figures(trials: int, at_once: int, runs: Runs) -> dict[str, Any]:
    """What was measured, and the shared case as times each other one."""
    found: dict[str, Any] = {
        name: {key: spread([run[key] for run in repeats]) for key in repeats[0]} for name, repeats in runs.items()
    }
    for name in ("processes", "in turn"):
        for key in ("seconds", "cpu_seconds") if name in runs else ():
            found[f"{key} to {name}"] = spread([a[key] / b[key] for a, b in zip(runs["shared"], runs[name])])
    if "processes" in runs:
        found["processes"]["at_once"] = at_once
        for key in ("pss_mib", "rss_mib"):
            whole = [run[key] * trials / at_once for run in runs["processes"]]
            found["processes"][f"{key}_of_all_at_once"] = spread(whole)
            found[f"{key} to processes"] = spread([run[key] / all_ for run, all_ in zip(runs["shared"], whole)])
    return found


def main() -> None:
    options = parser(__doc__, repeats=1, threads=1)
    options.add_argument("--steps", type=int, default=6, help="PPO steps (default 6)")
    options.add_argument("--replies", type=int, default=32, help="of a step (default 32)")
    options.add_argument("--model", type=Path, help="folder of SmolLM2-135M-Instruct; without it stories260K")
    options.add_argument("--shared-threads", type=int, default=1, help="of trials on one base; processes have one each")
    options.add_argument("--trials", type=int, nargs="+", default=[1, 4, 8, 16], help="how many (default 1 4 8 16)")
    options.add_argument("--at-once", type=int, default=8, help="of the processes of one trial each (default 8)")
    options.add_argument("--most-processes", type=int, default=8, help="more trials: the shared case alone (default 8)")
    options.add_argument("--without", choices=("in turn", "with Ray"), nargs="*", default=[], help="leave cases out")
    arguments = options.parse_args()
    data, found = data_folder(), {}
    for trials in arguments.trials:
        runs: Runs = {}
        for _ in range(arguments.repeats):
            run_cases(data, trials, arguments, runs)
        found[f"{trials} trials"] = figures(trials, min(trials, arguments.at_once), runs)
    settings = {
        "model": SMALL if arguments.model is None else LARGE,
        "steps": arguments.steps,
        "replies": arguments.replies,
        "threads_of_shared": arguments.shared_threads,
    }
    name = "sweep_share_base" + ("" if arguments.model is None else "_135m")
    emit(report(name, settings, found, arguments.repeats, arguments.threads), arguments.output)


if __name__ == "__main__":
    main()
