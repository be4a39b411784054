"""Shared by all tests: they run offline, on one thread, on tiny random models that are built here as Hugging Face folders."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import shutil
import signal
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of every process that a test starts; this one: `_one_thread`
os.environ.setdefault("RAY_worker_niceness", "0")  # as on a Ray that a job starts itself
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # the same: a process less for every group
# Of every Ray: its store is address space of each process that joined it, and one that has more of it than there is memory cannot
# fork.
os.environ.setdefault("RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES", str(10**9))

# Threads of OpenMP sleep while they wait: two jobs at a time, each with a thread for every core, mostly spin for each other else.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# In the background of a shell that has no job control, Ctrl-C is ignored, also by every command that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # so it is under nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Wall-clock limits fail on a busy machine, not on slow code; fixed examples make a failure repeatable.
settings.register_profile("shared machine", deadline=None, derandomize=True)
settings.load_profile("shared machine")

# A Ray that somebody else started on this machine, another worker of pytest-xdist say, is not joined. Short: sockets lie in it.
os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="rr-", dir=os.environ.get("RAY_TMPDIR") or "/tmp")
atexit.register(shutil.rmtree, os.environ["RAY_TMPDIR"], ignore_errors=True)

PROJECT = Path(__file__).resolve().parents[1]


def _memory_disk() -> str | None:
    """A disk in memory with room for the folders of all tests, about 1 GB: thousands of fsyncs take milliseconds each elsewhere.
    None where there is none, as in a container with 64 MB."""
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK) or shutil.disk_usage(shm).free < 8 * 2**30:
        return None
    return str(shm)


if "PYTEST_DEBUG_TEMPROOT" not in os.environ and (_root := _memory_disk()) is not None:
    os.environ["PYTEST_DEBUG_TEMPROOT"] = _root  # where pytest's tmp_path lies


def _beside(name: str) -> Any:
    """tests/NAME.py, which pytest's import mode does not put on the path."""
    spec = importlib.util.spec_from_file_location(name, PROJECT / "tests" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


fault_table = _beside("fault_table")
write_byte_tokenizer = _beside("byte_tokenizer").write_byte_tokenizer
write_encoder = _beside("encoders").write_encoder
TABLE = fault_table.FaultTable()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--bad-input-table", help="run the tests of the bad inputs alone, and write their table into this file"
    )
    parser.addoption("--fault-table", help="write the table of the faults that were tried into this file")


class _BadInputs:
    """Keeps the tests of bad inputs, counts them, prints and writes the table."""

    def __init__(self, path: str) -> None:
        self.path, self.module = Path(path), _beside("bad_inputs")
        self.table = self.module.BadInputTable()

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        wanted = [item for item in items if self.module.rows_of(item.nodeid)]
        config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
        items[:] = wanted

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and not report.skipped:
            self.table.note(report.nodeid, report.passed)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        lines = self.table.lines()
        terminalreporter.section("bad inputs tried and answered")
        for line in lines:
            terminalreporter.write_line(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("\n".join(lines) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    if config.pluginmanager.hasplugin("xdist"):
        config.pluginmanager.register(_AllFaults())
    if (path := config.getoption("--bad-input-table")) is not None:
        config.pluginmanager.register(_BadInputs(path))


class _AllFaults:
    """The workers of pytest-xdist hand their tries over when they end."""

    def pytest_testnodedown(self, node: Any) -> None:
        TABLE.add(node.workeroutput.get("faults", {}))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["faults"] = TABLE.export()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if TABLE.rows:
        terminalreporter.section("faults tried and survived")
        for line in TABLE.lines():
            terminalreporter.write_line(line)
        if (path := config.getoption("--fault-table")) is not None:
            Path(path).write_text("\n".join(TABLE.lines()) + "\n")


@pytest.fixture
def note() -> Callable[..., None]:
    """note(number, held, figure, seconds): one try of a fault. Fails the test if it did not hold."""

    def note(number: int, held: bool, figure: str = "", seconds: float | None = None) -> None:
        TABLE.note(number, held, figure, seconds)
        assert held, f"fault {number} ({fault_table.FAULTS[number]}): {figure} {seconds or ''}"

    return note


@pytest.fixture(scope="session")
def ray_of() -> Iterator[Callable[..., Any]]:
    """ray_of(num_cpus=, num_gpus=) -> `ray`, connected to a Ray of that size, which the next test that asks for the same size finds
    as it is: a start and a stop cost 6.6 s. A test that does not ask has none (`_no_ray`)."""
    size: dict[str, Any] = {}

    def connected(**wanted: Any) -> Any:
        import ray

        wanted["path"] = os.environ.get("PYTHONPATH")  # of its workers
        if not ray.is_initialized() or wanted != size:
            ray.shutdown()
            size.clear()
            size.update(wanted)
            resources = {k: v for k, v in wanted.items() if k != "path"}
            ray.init(**resources, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        return ray

    yield connected
    _stop_ray()


@pytest.fixture(autouse=True)
def _no_ray(request: pytest.FixtureRequest) -> None:
    if "ray_of" not in request.fixturenames:
        _stop_ray()


def _stop_ray() -> None:
    if (ray := sys.modules.get("ray")) is not None and ray.is_initialized():
        ray.shutdown()


@pytest.fixture(scope="module", autouse=True)
def _processes_without_bitsandbytes(request: pytest.FixtureRequest) -> Iterator[None]:
    """peft imports it wherever it is installed, in every process of every Ray: 1.3 s of 7. This process sees it, and so do the
    processes of modules with the marker `bitsandbytes` and of the unit tests."""
    with pytest.MonkeyPatch.context() as patch:
        if "integration" in request.keywords and "bitsandbytes" not in request.keywords:
            patch.setenv("PYTHONPATH", str(PROJECT / "tests" / "without_bitsandbytes"), prepend=os.pathsep)
        yield


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The shared real models and data; the test is skipped, saying so, where they are not there."""
    folder = Path(os.environ.get("RLHF_RAY_DATA") or PROJECT.parent / "shared" / "data")
    if not (folder / "models").is_dir():
        pytest.skip(f"no shared data at {folder}; set RLHF_RAY_DATA")
    return folder


@pytest.fixture(autouse=True)
def _modules_are_no_garbage() -> None:
    """Every stage ends with a garbage collection, which need not walk again through all that torch, transformers and PEFT defined:
    0.3 s each time, an eighth of a short run."""
    if not gc.get_freeze_count() and "peft" in sys.modules:
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """A job that runs in this process leaves it with as many threads as it had, and sums of two threads have other bits."""
    import torch

    torch.set_num_threads(1)


def _write_model(folder: Path, config: Any, seed: int, dtype: str, std: float) -> Path:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "norm" not in name:
                torch.nn.init.normal_(parameter, std=std)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def _cached(tmp_path_factory: pytest.TempPathFactory, name: str, build: Callable[..., Path]) -> Callable[..., Path]:
    made: dict[str, Path] = {}

    def make(**options: Any) -> Path:
        key = json.dumps(options, sort_keys=True, default=str)
        if key not in made:
            made[key] = build(tmp_path_factory.mktemp(name), **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny_llama(**options) -> folder of a random Llama (head dimension 32, 2 heads sharing 1 key/value head, 2 layers, vocabulary
    260) with a byte-level tokenizer. Equal options give the same folder: copy it before changing it.

    Options: seed, layers, hidden, tie, dtype, std (of the weights), context, pad ("</s>" and None make the pad traps), bos,
    and anything else that LlamaConfig takes.
    """

    def build(
        folder: Path,
        *,
        seed: int = 0,
        layers: int = 2,
        hidden: int = 64,
        tie: bool = False,
        dtype: str = "float32",
        std: float = 0.2,
        context: int = 256,
        pad: str | None = "<pad>",
        bos: bool = True,
        **config: Any,
    ) -> Path:
        from transformers import LlamaConfig

        values: dict[str, Any] = {
            "vocab_size": 260,
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // 32,
            "num_key_value_heads": max(hidden // 64, 1),
            "head_dim": 32,
            "max_position_embeddings": context,
            "tie_word_embeddings": tie,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": None,
        }
        write_byte_tokenizer(folder, pad=pad, bos=bos)
        return _write_model(folder, LlamaConfig(**{**values, **config}), seed, dtype, std)

    return _cached(tmp_path_factory, "tiny_llama", build)


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def chat_llama(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Path]) -> Callable[..., Path]:
    """chat_llama(chat_template=CHATML, tokens=("<|im_start|>", "<|im_end|>"), **options of tiny_llama) -> folder of a tiny Llama
    whose tokenizer has a chat template and special tokens, from id 260 on; its eos stays </s>, 2, as in many base models."""

    def build(
        folder: Path, *, chat_template: str = CHATML, tokens: Any = ("<|im_start|>", "<|im_end|>"), **options: Any
    ) -> Path:
        from transformers import AutoTokenizer

        shutil.copytree(tiny_llama(vocab_size=260 + len(tokens), **options), folder, dirs_exist_ok=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
        tokenizer.chat_template = chat_template
        tokenizer.save_pretrained(folder)
        return folder

    return _cached(tmp_path_factory, "chat_llama", build)


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny_gpt2(**options) -> folder of a random GPT-2: other module names, and Conv1D layers, whose weights are transposed."""

    def build(folder: Path, *, seed: int = 0, layers: int = 2, dtype: str = "float32", **config: Any) -> Path:
        from transformers import GPT2Config

        values: dict[str, Any] = {
            "vocab_size": 260,
            "n_embd": 64,
            "n_layer": layers,
            "n_head": 2,
            "n_positions": 128,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        write_byte_tokenizer(folder)
        return _write_model(folder, GPT2Config(**{**values, **config}), seed, dtype, 0.2)

    return _cached(tmp_path_factory, "tiny_gpt2", build)


HYBRID: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "conv_bias": True, "block_auto_adjust_ff_dim": False},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba"],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 96,
    },
}


@pytest.fixture(scope="session")
def tiny_hybrid(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny_hybrid(model_type=one of HYBRIDS, **options) -> folder of a random model whose layers keep states: a gated delta net,
    short convolutions or Mamba 2, around one layer of attention. Other families with the fields they need."""

    def build(folder: Path, *, model_type: str, seed: int = 0, **config: Any) -> Path:
        from transformers import AutoConfig

        write_byte_tokenizer(folder)
        values = {**HYBRID, **HYBRIDS.get(model_type, {}), **config}
        return _write_model(folder, AutoConfig.for_model(model_type, **values), seed, "float32", 0.1)

    return _cached(tmp_path_factory, "tiny_hybrid", build)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """encoder(kind, labels=1) -> folder of a random classifier of tests/encoders.py."""
    make = _cached(tmp_path_factory, "encoder", write_encoder)
    return lambda kind, labels=1: make(kind=kind, labels=labels)


@pytest.fixture(scope="session")
def saved_by_peft() -> Callable[..., Any]:
    """saved_by_peft(base, folder, **options of peft.LoraConfig) -> PEFT's own model on `base`, with an adapter that does something,
    which is saved in `folder`."""

    def save(base: Path, folder: Path, std: float = 0.05, **options: Any) -> Any:
        import peft
        import torch
        from transformers import AutoModelForCausalLM

        options = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options}
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**options)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name or "modules_to_save" in name:
                    draw = torch.Generator().manual_seed(len(name))
                    parameter += std * torch.randn(parameter.shape, generator=draw)
        model.save_pretrained(folder)
        return model

    return save


@pytest.fixture(scope="session")
def tiny_run() -> Callable[..., Path]:
    """tiny_run(folder, base, stage="sft", seed=0, ...) -> a finished run as training leaves it, with a random adapter on `base`,
    which says something else for every seed; stage "reward" has a random head. Options: template and the date that it says, r,
    scale of B, targets, add_eos_token of a reward run."""

    def make(
        folder: Path,
        base: Path,
        stage: str = "sft",
        seed: int = 0,
        template: str = "alpaca_short",
        r: int = 4,
        scale: float = 0.3,
        targets: Any = "all-linear",
        add_eos_token: bool = True,
        template_date: str | None = None,
    ) -> Path:
        import torch

        from rlhf_ray.config import LoraConfig
        from rlhf_ray.data.templates import load_template
        from rlhf_ray.models.adapters import adapter_config, adapter_tensors, save_adapter, wrap
        from rlhf_ray.models.backbone import load_backbone
        from rlhf_ray.storage.run import Run
        from rlhf_ray.storage.run_folder import create_run

        how: dict[str, Any] = {"dtype": "float32", "attn_implementation": "auto", "load_in_8bit": False}
        how |= {"load_in_4bit": False, "cpu_offload": False, "device": "cpu"}
        backbone = load_backbone(path=str(base), revision=None, **how)
        model = wrap(backbone.model, LoraConfig(r=r, lora_alpha=2.0 * r, target_modules=targets), "ad", seed=seed)
        draw = torch.Generator().manual_seed(seed)
        tensors = {
            key: torch.randn(t.shape, generator=draw) * scale if "lora_B" in key else t
            for key, t in adapter_tensors(model, "ad").items()
        }
        is_reward = stage == "reward"
        head = torch.randn(1, backbone.hidden_size, generator=draw) if is_reward else None
        run = create_run(folder, stage, {"seed": seed, "template": template}, "never")
        kind: Any = "SEQ_CLS" if is_reward else "CAUSAL_LM"
        save_adapter(run.adapter_dir, tensors, adapter_config(model, "ad"), kind, head, str(base))
        run.update_manifest(
            base=backbone.identity.manifest(),
            tokenizer_sha256=backbone.identity.tokenizer_sha256,
            template=load_template(template, backbone.tokenizer, template_date).manifest(),
            stop_token_ids=list(backbone.eos_ids),
            parents=[],
            **({"reward": {"add_eos_token": add_eos_token}} if is_reward else {}),
        )
        Run(stage, "done", str(run.path), 10, 1.0, seed, {}).save()
        run.seal()
        return run.path

    return make
