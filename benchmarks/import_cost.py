"""What it costs to import the parts of the product: modules and seconds, each in a fresh interpreter.

    python benchmarks/import_cost.py --output
    python benchmarks/import_cost.py --modules rlhf_ray.stages.ppo    # of an older version, by its names

Baseline, in the same run: `import torch, transformers, peft`, which every stage that loads a model needs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from _common import emit, parser, report, spread

BASELINE = "torch, transformers, peft"
TARGETS = (
    "rlhf_ray.cli",
    "rlhf_ray.ppo.loop",
    "rlhf_ray.supervised.sft",
    "rlhf_ray.serve.app",
    "rlhf_ray.serve.replica",
)
HEAVY = (
    "torch",
    "transformers",
    "transformers.trainer",
    "peft",
    "deepspeed",
    "ray",
    "datasets",
    "pandas",
    "bitsandbytes",
)
CODE = """
import json, sys, time
started = time.perf_counter()
import {target}
seconds = time.perf_counter() - started
heavy = [name for name in {heavy!r} if name in sys.modules]
print(json.dumps({{"modules": len(sys.modules), "seconds": seconds, "heavy": heavy}}))
"""


def measure(target: str) -> dict[str, object]:
    """One import in an interpreter of its own."""
    code = CODE.format(target=target, heavy=HEAVY)
    return json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def main() -> None:
    options = parser(__doc__, repeats=5, threads=1)
    options.add_argument("--modules", nargs="*", default=list(TARGETS), help="what to import")
    arguments = options.parse_args()
    found: dict[str, list[dict[str, object]]] = {target: [] for target in (BASELINE, *arguments.modules)}
    for target in found:
        measure(target)  # byte code and the file cache
    for _ in range(arguments.repeats):
        for target, runs in found.items():
            runs.append(measure(target))
    measured = {
        target: {
            "modules": runs[0]["modules"],
            "heavy": runs[0]["heavy"],
            "seconds": spread([float(str(run["seconds"])) for run in runs]),
        }
        for target, runs in found.items()
    }
    emit(report("import_cost", {"modules": arguments.modules}, measured, arguments.repeats, 1), arguments.output)


if __name__ == "__main__":
    main()
