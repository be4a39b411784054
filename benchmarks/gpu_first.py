"""The first ten minutes on a GPU: what the CPU tests cannot know, before anything else is tried there.

    python benchmarks/gpu_first.py --output            # one GPU of 80 GB or more; benchmarks/results/gpu_first.json
    python benchmarks/gpu_first.py --tiny              # a rehearsal with a tiny model, also without a GPU
    python benchmarks/gpu_first.py --readme REPORT     # README's "Has been run on" after a run; by nothing else

Each step is a process of its own, with a limit: one that fails or hangs is noted, and the next one runs. The report is written
after every step. Neither Ray nor the datasets library is needed. Steps:

    tiny       a PPO run of a tiny model, in float32 and in bfloat16
    model      a random Llama of Llama-3.1-8B's shape in bfloat16: made, saved, loaded, hashed twice (then from the cache)
    decode     128 tokens each: 64 rows with cuDNN's attention on and off, 256 rows, transformers' generate
    ppo        two PPO steps of 64 replies: seconds and peak of each phase, first ratio, sampler against learner, memory left
    plan       what `plan` says of that job, beside the peaks
    attention  forward and backward under left padding, each kernel against float32: values that are not finite, largest difference
    kept       the PPO steps without recomputed activations
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from _common import RESULTS, report

from rlhf_ray.runtime.devices import own_device, prepare
from rlhf_ray.storage.files import atomic_write_json

LIMITS = {"tiny": 60, "model": 120, "decode": 150, "ppo": 200, "plan": 90, "attention": 40, "kept": 150}
"""Seconds of each step, in their order."""
TOTAL_S = 570.0
"""Steps that would begin later are left out."""
LLAMA_8B = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
LLAMA_8B |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 4096}
TINY = {"vocab_size": 896, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 1024}
PASS = {"ratio_deviation": 1e-4, "probe_difference": 0.05, "peak_of_plan": 0.10}
REWARD = "def score(prompts, completions, **_):\n    return [sum(c.isascii() for c in t) / max(len(t), 1) for t in completions]\n"


class Place:
    """Where a step runs, and how large things are. folder: shared by the steps."""

    def __init__(self, folder: Path, tiny: bool) -> None:
        self.folder, self.tiny, self.device = folder, tiny, own_device()
        self.on_gpu = self.device.type == "cuda"
        self.shape = TINY if tiny else LLAMA_8B
        self.base = folder / "base"
        self.prompt, self.reply, self.rows, self.many = (24, 8, 8, 16) if tiny else (128, 128, 64, 256)

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def peak(self) -> int | None:
        """Bytes at most allocated since the last call; None on the CPU."""
        if not self.on_gpu:
            return None
        found = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return found

    @contextmanager
    def timed(self, found: dict[str, Any], name: str) -> Iterator[None]:
        self.synchronize()
        started = time.perf_counter()
        yield
        self.synchronize()
        found[name] = round(time.perf_counter() - started, 3)


def make_base(folder: Path, shape: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    """A random Llama, and the tokenizer of the bundled task, which knows far fewer tokens than the model has room for."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from rlhf_ray.data.tinyworld.base import train_tokenizer
    from rlhf_ray.data.tinyworld.text import pretraining_text

    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = LlamaForCausalLM(LlamaConfig(**shape, **ends))
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder)
    train_tokenizer(pretraining_text(500, 0)).save_pretrained(folder)


def load(place: Place) -> Any:
    """The base with a LoRA adapter `policy`, as PPO has it."""
    from rlhf_ray.config import LoraConfig
    from rlhf_ray.models.adapters import wrap
    from rlhf_ray.models.backbone import load_backbone

    how = {
        "revision": None,
        "dtype": "auto",
        "attn_implementation": "auto",
        "load_in_8bit": False,
        "load_in_4bit": False,
    }
    backbone = load_backbone(path=str(place.base), cpu_offload=False, device=place.device, **how)  # type: ignore[arg-type]
    return backbone, wrap(backbone.model, LoraConfig(r=16), "policy", seed=1)


# ---- the steps ------------------------------------------------------------------------------------------------------------


def step_tiny(place: Place) -> dict[str, Any]:
    found: dict[str, Any] = {}
    make_base(place.folder / "tiny", TINY, torch.float32, torch.device("cpu"))
    for dtype in ("float32", "bfloat16"):
        found[dtype] = run_ppo(place, place.folder / "tiny", f"tiny_{dtype}", dtype=dtype, rows=16, response_length=8)
    return found


def step_model(place: Place) -> dict[str, Any]:
    from rlhf_ray.models import sources

    found: dict[str, Any] = {}
    dtype = torch.bfloat16 if place.on_gpu else torch.float32
    with place.timed(found, "make_and_save_s"):
        make_base(place.base, place.shape, dtype, place.device)
    gc.collect()
    prepare(place.device)
    if place.on_gpu:
        torch.cuda.empty_cache()
    with place.timed(found, "hash_s"):
        found["sha256"] = sources.weights_sha256(place.base)
    with place.timed(found, "hash_again_s"):
        sources._weights_seen.clear()
        sources.weights_sha256(place.base)
    with place.timed(found, "load_s"):
        backbone, _ = load(place)
    return found | {"dtype": str(backbone.dtype), "attention": backbone.attn_implementation, "peak_bytes": place.peak()}


def step_decode(place: Place) -> dict[str, Any]:
    from rlhf_ray.sampler.engine import DecodeRequest, Sampler

    backbone, model = load(place)
    prompts = torch.randint(3, 800, (place.many, place.prompt), generator=torch.Generator().manual_seed(0))

    def requests(rows: int, tokens: int) -> list[Any]:
        adapter = {"adapter": "policy"}
        return [DecodeRequest(tuple(p.tolist()), i, tokens, (), **adapter) for i, p in enumerate(prompts[:rows])]  # type: ignore[arg-type]

    def ours(rows: int, cudnn: bool) -> dict[str, Any]:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        sampler, case = Sampler(model, backbone.pad_id, rows), dict[str, Any]()
        sampler.run(requests(rows, 4))
        place.peak()
        with place.timed(case, "seconds"):
            done = sampler.run(requests(rows, place.reply))
        torch.backends.cuda.enable_cudnn_sdp(False)
        numbers = [x for row in done for x in row.logprobs]
        return case | {"not_finite": sum(not math.isfinite(x) for x in numbers), "tokens": len(numbers)}

    def theirs(rows: int) -> dict[str, Any]:
        ids, case = prompts[:rows].to(place.device), dict[str, Any]()
        limits = {"min_new_tokens": place.reply, "max_new_tokens": place.reply, "do_sample": True, "pad_token_id": 0}
        mask = torch.ones_like(ids)
        with torch.no_grad(), place.timed(case, "seconds"):
            out = model.generate(input_ids=ids, attention_mask=mask, **limits)
        return case | {"tokens": int(out[:, place.prompt :].numel())}

    cases: dict[str, Callable[[], dict[str, Any]]] = {
        "cudnn_off": lambda: ours(place.rows, False),
        "cudnn_on": lambda: ours(place.rows, True),
        "many_rows": lambda: ours(place.many, False),
        "generate": lambda: theirs(place.rows),
    }
    return each_case(place, cases)


def each_case(place: Place, cases: Mapping[str, Callable[[], dict[str, Any]]]) -> dict[str, Any]:
    """Every case, also where one fails."""
    found: dict[str, Any] = {}
    for name, case in cases.items():
        try:
            figures = case()
            if "tokens" in figures:
                figures["tokens_per_s"] = round(figures["tokens"] / figures["seconds"], 1)
            found[name] = figures | {"peak_bytes": place.peak()}
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
    return found


def ppo_fields(place: Place, base: Path, name: str, **changes: Any) -> dict[str, Any]:
    rows = changes.pop("rows", place.rows)
    (place.folder / "reward.py").write_text(REWARD)
    lines = [{"instruction": " ".join(["the bird sings"] * (place.prompt // 8)) + f" {i}"} for i in range(4 * rows)]
    (place.folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "output_dir": str(place.folder / name),
        "model_name_or_path": str(base),
        "template": "none",
        "data": {"train": str(place.folder / "prompts.jsonl"), "eval_max_rows": 4},
        "rewards": [{"name": "rule", "function": f"{place.folder}/reward.py:score"}],
        "learner": {"num_workers": 0},
        "lora": {"r": 16},
        "rollout_batch_size": rows,
        "rollout_chunk_size": rows,
        "num_mini_batches": 2,
        "num_ppo_epochs": 1,
        "per_device_train_batch_size": 4,
        "max_length": place.prompt + place.reply,
        "response_length": place.reply,
        "max_steps": 2,
        "eval_on_start": False,
        "eval_steps": 1000,
        "report_to": [],
        **changes,
    }


def run_ppo(place: Place, base: Path, name: str, **changes: Any) -> dict[str, Any]:
    """Two PPO steps: the metrics of each, the peak of each phase, what is left in memory afterwards."""
    from rlhf_ray.config import PPOConfig
    from rlhf_ray.console import LocalConsole
    from rlhf_ray.metrics import read_metrics
    from rlhf_ray.roles.generator import Generator
    from rlhf_ray.roles.learner import Learner
    from rlhf_ray.roles.scorer import Scorer
    from rlhf_ray.stages.start import ppo

    peaks: dict[str, int] = {}

    def note(phase: str) -> None:
        if (bytes_ := place.peak()) is not None:
            peaks[phase] = max(peaks.get(phase, 0), bytes_)

    def watched(phase: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            note("load")
            try:
                return method(*args, **kwargs)
            finally:
                note(phase)

        return call

    phases = {"sampling": (Generator, "generate"), "scoring": (Scorer, "score_at")}
    phases |= {"evaluation": (Learner, "evaluate"), "update": (Learner, "update")}
    before = {phase: getattr(role, method) for phase, (role, method) in phases.items()}
    for phase, (role, method) in phases.items():
        setattr(role, method, watched(phase, before[phase]))
    try:
        ppo(PPOConfig(**ppo_fields(place, base, name, **changes)), LocalConsole(quiet=True))
    finally:
        for phase, (role, method) in phases.items():
            setattr(role, method, before[phase])
    rows = [row for row in read_metrics(place.folder / name / "metrics.jsonl") if row["step"] > 0]
    wanted = re.compile(r"time/|ratio/first|sampler/|loss/|grad_norm/|memory/|update/|tokens/generated")
    steps = [{k: v for k, v in row.items() if wanted.match(k)} for row in rows]
    found: dict[str, Any] = {"steps": steps, "peak_bytes": peaks}
    if place.on_gpu:
        found["left_bytes"] = torch.cuda.memory_allocated()
        gc.collect()
        found["left_after_gc_bytes"] = torch.cuda.memory_allocated()
    return found


def step_ppo(place: Place) -> dict[str, Any]:
    return run_ppo(place, place.base, "ppo", gradient_checkpointing=True)


def step_kept(place: Place) -> dict[str, Any]:
    return run_ppo(place, place.base, "kept", gradient_checkpointing=False)


def step_plan(place: Place) -> dict[str, Any]:
    """Bytes of each phase by `plan`, without the context of CUDA and the allocator's reserve, which no tensor has."""
    from rlhf_ray.config import PPOConfig
    from rlhf_ray.plan.estimate import Estimator

    config = PPOConfig(**ppo_fields(place, place.base, "planned", gradient_checkpointing=True))
    (process,) = Estimator("cuda" if place.on_gpu else "cpu").processes(config)
    return {phase: sum(b for part, b in parts.items() if part != "other") for phase, parts in process.phases.items()}


def step_attention(place: Place) -> dict[str, Any]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    rows, heads, width, size = (2, 4, 32, 32) if place.tiny else (8, 32, 512, 128)
    dtype = torch.bfloat16 if place.on_gpu else torch.float32
    noise = torch.Generator().manual_seed(0)
    whole = [torch.randn(rows, heads, width, size, generator=noise).to(place.device, dtype) for _ in range(3)]
    padding = torch.arange(rows, device=place.device) * (width // (2 * rows))
    columns = torch.arange(width, device=place.device)
    causal = columns[:, None] >= columns
    mask = causal & (columns >= padding[:, None])[:, None, None, :]
    mask |= torch.eye(width, dtype=torch.bool, device=place.device)  # as transformers: a row of padding sees itself
    real = (columns >= padding[:, None])[:, None, :, None]

    def run(backend: Any, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        with sdpa_kernel(backend):
            out = torch.nn.functional.scaled_dot_product_attention(*leaves, attn_mask=mask)
        (out * real).float().square().sum().backward()
        return [out * real, *(t.grad for t in leaves)]  # type: ignore[list-item]

    expected = run(SDPBackend.MATH, [t.float() for t in whole])

    def case(backend: Any) -> dict[str, Any]:
        found, figures = run(backend, whole), dict[str, Any]()
        figures["not_finite"] = sum(int((~t.isfinite()).sum()) for t in found)
        figures["largest_difference"] = [float((a.float() - b).abs().max()) for a, b in zip(found, expected)]
        with place.timed(figures, "seconds"):
            for _ in range(5):
                run(backend, whole)
        return figures

    names = {"cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}
    return each_case(place, {name: (lambda b=backend: case(b)) for name, backend in names.items()})  # type: ignore[misc]


STEPS: dict[str, Callable[[Place], dict[str, Any]]] = {name: globals()[f"step_{name}"] for name in LIMITS}


# ---- the whole ------------------------------------------------------------------------------------------------------------


def verdict(steps: Mapping[str, Any]) -> dict[str, Any]:
    """What must hold, as far as it was measured: limits of PASS."""
    ppo, plan = steps.get("ppo", {}).get("found"), steps.get("plan", {}).get("found")
    if not ppo or not ppo["steps"]:
        return {"passed": False, "why": "no PPO step was done"}
    numbers = [v for step in ppo["steps"] for v in step.values() if isinstance(v, (int, float))]
    deviation = max(step["ratio/first_minibatch_max_deviation"] for step in ppo["steps"])
    probes = [step[n] for step in ppo["steps"] for n in step if n.startswith("sampler/") and n.endswith("difference")]
    ratios = {p: b / plan[p] for p, b in ppo["peak_bytes"].items() if p in plan and p != "load"} if plan else {}
    held = {
        "finite": all(math.isfinite(v) for v in numbers),
        "ratio_deviation": deviation <= PASS["ratio_deviation"],
        "probe_difference": max(probes, default=0.0) < PASS["probe_difference"],
        "peak_of_plan": all(abs(r - 1.0) <= PASS["peak_of_plan"] for r in ratios.values()),
    }
    figures = {"ratio_deviation": deviation, "probe_difference": max(probes, default=None), "peak_of_plan": ratios}
    return {"passed": all(held.values()) and all(s["ok"] for s in steps.values()), "held": held, "figures": figures}


def run_steps(tiny: bool, names: list[str], path: Path, folder: Path) -> dict[str, Any]:
    """Each step in its own process; `path` is written after each."""
    began, steps = time.monotonic(), dict[str, Any]()
    for name in names:
        left = TOTAL_S - (time.monotonic() - began)
        if left < 5:
            steps[name] = {"ok": False, "seconds": 0.0, "error": f"not begun: {TOTAL_S:g} s are over"}
        else:
            steps[name] = one_step(name, tiny, folder, min(LIMITS[name], left))
        told = steps[name].get("error", "ok").strip().splitlines()[-1]
        print(f"{name}: {steps[name]['seconds']:.1f} s, {told}", file=sys.stderr, flush=True)
        whole = report(
            "gpu_first", {"tiny": tiny, "shape": TINY if tiny else LLAMA_8B}, steps, 1, torch.get_num_threads()
        )
        whole["verdict"] = verdict(steps)
        atomic_write_json(path, whole)
    return whole


def one_step(name: str, tiny: bool, folder: Path, limit: float) -> dict[str, Any]:
    command = [sys.executable, __file__, "--step", name, "--folder", str(folder), *(["--tiny"] if tiny else [])]
    started = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        error = done.stderr[-3000:] if done.returncode else ""
    except subprocess.TimeoutExpired:
        error = f"not done within {limit:.0f} s"
    result = folder / f"{name}.json"
    found = json.loads(result.read_text()) if result.is_file() and not error else None
    outcome = {"ok": not error, "seconds": round(time.monotonic() - started, 1), "found": found}
    return outcome | ({"error": error} if error else {})


def readme_line(found: Mapping[str, Any]) -> str:
    """README's line about this run. ValueError for a run that was not on a GPU, with the real model, or did not pass."""
    gpus = found["machine"]["gpus"]
    if not gpus or found["settings"]["tiny"] or not found["verdict"]["passed"]:
        raise ValueError("README tells of runs on a GPU with the 8B model that passed; this is none")
    step = found["measured"]["ppo"]["found"]["steps"][-1]
    return (
        f"- **One {gpus[0]}:** [two PPO steps](benchmarks/results/gpu_first.json) of a random Llama of Llama-3.1-8B's shape in"
        f" bfloat16, {step['time/step']:.0f} s each; decoding"
        f" {found['measured']['decode']['found']['cudnn_off']['tokens_per_s']:.0f} tokens/s with 64 rows."
    )


def write_readme(found: Mapping[str, Any], readme: Path) -> None:
    """Put the line before the first `Not yet` of "Has been run on", in place of the one of an earlier run."""
    line, text = readme_line(found), readme.read_text(encoding="utf-8")
    kept = [x for x in text.splitlines() if "benchmarks/results/gpu_first.json" not in x]
    place = next(i for i, x in enumerate(kept) if x.startswith("- **Not yet:** any real GPU"))
    kept[place:place] = [line]
    readme.write_text("\n".join(kept) + "\n", encoding="utf-8")


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--tiny", action="store_true", help="a model of two layers, to rehearse")
    options.add_argument("--steps", nargs="+", choices=list(LIMITS), default=list(LIMITS), help="only these")
    options.add_argument(
        "--output", nargs="?", const="", help="the report; without a name benchmarks/results/gpu_first.json"
    )
    options.add_argument("--folder", help="for the model and the runs; default: one that is deleted at the end")
    options.add_argument("--readme", help="write README's line about the run of this report, and do nothing else")
    options.add_argument("--step", choices=list(LIMITS), help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.readme:
        write_readme(json.loads(Path(given.readme).read_text()), Path(__file__).parents[1] / "README.md")
        return 0
    if given.step:
        try:
            found = STEPS[given.step](Place(Path(given.folder), given.tiny))
        except BaseException:
            traceback.print_exc()
            return 1
        atomic_write_json(Path(given.folder) / f"{given.step}.json", found)
        return 0
    with tempfile.TemporaryDirectory(prefix="gpu-first-") as scratch:
        folder = Path(given.folder or scratch).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        path = RESULTS / "gpu_first.json" if given.output == "" else Path(given.output or folder / "gpu_first.json")
        whole = run_steps(given.tiny, given.steps, path, folder)
    print(json.dumps(whole, indent=2))
    return 0 if whole["verdict"]["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
