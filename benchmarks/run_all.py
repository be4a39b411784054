"""Every benchmark, one after the other, each into benchmarks/results/<name>.json. What fails is told at the end; the rest is kept.

    python benchmarks/run_all.py --trl-python .venv-trl/bin/python

About an hour on two cores. Leave the machine alone meanwhile. kl_study.py and baselines.py are not among them: they grow
by sittings of their own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument(
        "--trl-python", help="interpreter of an environment with trl==1.12.0; without it TRL is left out"
    )
    trl = options.parse_args().trl_python
    commands = [["sampler_vs_generate.py"], ["stories_sentiment.py"], ["stories_chain.py"], ["plan_memory.py"]]
    commands += [
        ["update_real_lengths.py"],
        ["staleness.py"],
        ["placements.py"],
        ["sweep_overhead.py"],
        ["submit_overhead.py"],
        ["start_time.py"],
        ["reward_overlap.py"],
        ["control_plane.py"],
        ["sweep_share_base.py"],
    ]
    commands += [
        ["mixed_adapters.py"],
        ["mixed_adapters.py", "--model", "stories260k"],
        ["long_reply.py"],
        ["serve_load.py"],
        ["serve_overload.py"],
        ["serve_many_adapters.py"],
        ["serve_many_adapters.py", "--model", "6m"],
        ["serve_replicas.py"],
    ]
    if trl:
        commands.insert(0, ["ppo_step_vs_trl.py", "--trl-python", trl])
        real = ["ppo_step_real_lengths.py", "--trl-python", trl]
        newest = Path(trl).absolute().parents[1] / "newest"  # as `make bench` puts it there
        commands[1:1] = [
            real,
            [*real, "--size", "135m", "--prompts", "16", "--epochs", "1", "--repeats", "1", "--sides", "ours,trl"],
            ["trainers_vs_trl.py", "--trl-python", trl, *(["--trl-path", str(newest)] if newest.is_dir() else [])],
        ]
    failed = []
    for name, *more in commands:
        print(f"== {name}", file=sys.stderr, flush=True)
        done = subprocess.run([sys.executable, str(HERE / name), *more, "--output"], stdout=subprocess.DEVNULL)
        if done.returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
