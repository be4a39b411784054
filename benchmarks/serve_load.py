"""The service under load, against what one could take instead: same model, same requests, same load generator, in turn.

    python benchmarks/serve_load.py --output                                 ours, transformers serve, FastAPI + generate
    python benchmarks/serve_load.py --vllm-python .venv-vllm/bin/python      and vLLM's server, from an environment of its own

A random Llama of 6 M parameters that never ends a reply. `clients` ask again and again, 64 tokens a reply, greedy, streaming.
Beside the base: 1, 8, 32 and 128 adapters, all loaded, asked in turn (ours, and vLLM's). Overload: serve_overload.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from _common import data_folder, emit, parser, report, spread
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rlhf_ray.config import LoraConfig
from rlhf_ray.config.resolved import dump_yaml
from rlhf_ray.models.adapters import adapter_parameters, add_fresh, wrap

HERE = Path(__file__).parent
TOKENS = 64
COUNTS = (1, 8, 32, 128)
"""Adapters that are asked in turn; all servers hold the most."""
ADAPTERS = max(COUNTS)
LIMIT, WAITING = 32, 16
"""Replies that are written at a time, and that may wait."""
CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def make_model(folder: Path) -> Path:
    """Head dimension 32, which vLLM's CPU attention knows; the end token's logit is always 0, so greedy never takes it."""
    source = data_folder() / "models" / "stories260K"
    config = AutoConfig.from_pretrained(source)
    shape = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8, "num_attention_heads": 8}
    config.update({**shape, "head_dim": 32, "num_key_value_heads": 4, "tie_word_embeddings": False})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.lm_head.weight[config.eos_token_id] = 0
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


def make_adapters(model: Path, folder: Path) -> dict[str, str]:
    """Plain PEFT folders of rank 8 on all linear layers, which do say different things."""
    lora = LoraConfig(r=8, lora_alpha=16)
    peft = wrap(AutoModelForCausalLM.from_pretrained(model), lora, "ad000", seed=0)
    names = [f"ad{i:03d}" for i in range(ADAPTERS)]
    for i, name in enumerate(names):
        if i:
            add_fresh(peft, name, lora, seed=i, trainable=False)
        draw = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for key, parameter in adapter_parameters(peft, name).items():
                if "lora_B" in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.02)
    peft.save_pretrained(str(folder), selected_adapters=names)
    return {name: str(folder / name) for name in names}


class Server:
    """A server in a process of its own, reachable at `url`; ended with its whole process group."""

    def __init__(self, command: Sequence[str], port: int, ready: str, log: Path, **environment: str) -> None:
        self.url, self.log = f"http://127.0.0.1:{port}", log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
            )
        deadline = time.monotonic() + 240
        while not self._answers(ready):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                sys.exit(f"{' '.join(command)} does not serve:\n{log.read_text()[-3000:]}")
            time.sleep(0.5)

    def _answers(self, path: str) -> bool:
        try:
            with urllib.request.urlopen(self.url + path, timeout=5) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def memory_mib(self) -> float:
        """Resident memory of the process and all its children."""
        import psutil

        processes = [psutil.Process(self.process.pid)]
        processes += processes[0].children(recursive=True)
        total = 0
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        return total / 2**20


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(server: Server) -> Iterator[Server]:
    try:
        yield server
    finally:
        server.stop()


def load(server: Server, models: Sequence[str], *options: str) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "_load.py"), server.url, ",".join(models), "--tokens", str(TOKENS), *options]
    return dict(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))


def ours(scratch: Path, model: Path, adapters: dict[str, str], threads: int) -> Server:
    port = free_port()
    job = scratch / "serve.yaml"
    values = {
        "output_dir": str(scratch / f"serve-{port}"),
        "model_name_or_path": str(model),
        "adapters": adapters,
        "port": port,
        "limits": {"max_batch_rows": LIMIT, "max_waiting_rows": WAITING, "max_loaded_adapters": ADAPTERS},
        "replicas": {"num_threads": threads},
    }
    job.write_text(dump_yaml(values))
    return Server(
        [sys.executable, "-m", "rlhf_ray.cli", "serve", str(job)], port, "/v1/models", scratch / f"ours-{port}.log"
    )


def transformers_serve(scratch: Path, model: Path, threads: int) -> Server:
    port = free_port()
    program = Path(sys.executable).with_name("transformers")
    command = [str(program), "serve", str(model), "--port", str(port), "--host", "127.0.0.1", "--device", "cpu"]
    return Server(command, port, "/health", scratch / f"transformers-{port}.log", OMP_NUM_THREADS=str(threads))


def plain(scratch: Path, model: Path, threads: int) -> Server:
    port = free_port()
    command = [sys.executable, str(HERE / "_plain_service.py"), str(model), str(port), str(threads)]
    return Server(command, port, "/health", scratch / f"plain-{port}.log")


def vllm(scratch: Path, model: Path, adapters: dict[str, str], threads: int, python: str) -> Server:
    port = free_port()
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--served-model-name", "base", "--enforce-eager", "--dtype", "float32"]
    command += ["--max-num-seqs", str(LIMIT), "--enable-lora", "--max-loras", str(ADAPTERS), "--max-lora-rank", "8"]
    command += ["--lora-modules", *(f"{name}={path}" for name, path in adapters.items())]
    return Server(
        command,
        port,
        "/health",
        scratch / f"vllm-{port}.log",
        VLLM_CPU_KVCACHE_SPACE="1",
        OMP_NUM_THREADS=str(threads),
        VLLM_CPU_OMP_THREADS_BIND="nobind",
    )


def gather(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = [n for n, v in found[0].items() if isinstance(v, (int, float)) and n != "seconds"]
    return {name: spread([one[name] for one in found]) for name in names}


def times(ours: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Tokens a second of one over the other, repeat by repeat."""
    return spread([a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(ours, others)])


def main() -> None:
    options = parser(__doc__, repeats=3, threads=2)
    options.add_argument("--clients", type=int, default=32)
    options.add_argument("--requests", type=int, default=256, help="per server and repeat; slow servers get a quarter")
    options.add_argument(
        "--vllm-python",
        help="Python of an environment with vLLM's CPU build, and what its server needs (model-hosting-container-standards)",
    )
    arguments = options.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        model = make_model(scratch / "model")
        adapters = make_adapters(model, scratch / "adapters")
        names = list(adapters)
        ours_and_vllm = [("base", ["base"], 1), *((f"adapters {n}", names[:n], 1) for n in COUNTS)]
        servers: dict[str, tuple[Callable[[], Server], list[tuple[str, list[str], int]]]] = {
            "rlhf_ray": (
                lambda: ours(scratch, model, adapters, arguments.threads),
                ours_and_vllm,
            ),
            "transformers serve": (
                lambda: transformers_serve(scratch, model, arguments.threads),
                [("base", [str(model)], 4)],
            ),
            "FastAPI + generate": (lambda: plain(scratch, model, arguments.threads), [("base", ["base"], 4)]),
        }
        if arguments.vllm_python:
            servers["vLLM"] = (
                lambda: vllm(scratch, model, adapters, arguments.threads, arguments.vllm_python),
                ours_and_vllm,
            )
        for _ in range(arguments.repeats):
            for name, (start, cases) in servers.items():
                with running(start()) as server:
                    for what, models, part in cases:
                        warm = str(min(len(models), arguments.clients))
                        load(server, models, "--clients", warm, "--requests", str(len(models)))
                        size = ["--clients", str(arguments.clients), "--requests", str(arguments.requests // part)]
                        told = load(server, models, *size)
                        found.setdefault(f"{name}, {what}", []).append(told)
                        print(f"{name}, {what}: {told['tokens_per_second']:.0f} tokens/s", file=sys.stderr, flush=True)
    measured: dict[str, Any] = {name: gather(several) for name, several in found.items()}
    measured["share of one adapter at 32"] = times(found["rlhf_ray, adapters 32"], found["rlhf_ray, adapters 1"])
    for count in COUNTS if arguments.vllm_python else ():
        sides = [found[f"{server}, adapters {count}"] for server in ("rlhf_ray", "vLLM")]
        measured[f"times vLLM, adapters {count}"] = times(*sides)
    for name in ("transformers serve", "FastAPI + generate", "vLLM"):
        if f"{name}, base" in found:
            measured[f"times {name}"] = times(found["rlhf_ray, base"], found[f"{name}, base"])
    settings = {
        "model": "random Llama of 6 M parameters, head dimension 32, float32, CPU",
        "clients": arguments.clients,
        "requests": arguments.requests,
        "new_tokens": TOKENS,
        "rows": LIMIT,
        "replicas": 1,
    }
    emit(report("serve_load", settings, measured, arguments.repeats, arguments.threads), arguments.output)


if __name__ == "__main__":
    main()
