"""SFT from job to run folder, on tiny models, in this process and under Ray."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rlhf_ray.config import SamplingConfig, SFTConfig
from rlhf_ray.config.resolved import dump_yaml
from rlhf_ray.errors import ConfigError, DataError, Interrupted, InvariantError
from rlhf_ray.metrics import read_metrics
from rlhf_ray.models.adapters import read_adapter
from rlhf_ray.stages.generate import generate
from rlhf_ray.stages.resume import resume
from rlhf_ray.stages.start import sft
from rlhf_ray.storage.run import load_run
from rlhf_ray.supervised import stage
from tests.runs import lasting_rows, weights

pytestmark = pytest.mark.integration
Write = Callable[[str, Iterable[dict[str, Any]]], str]

LOGITS = """
import json, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, ids = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
with torch.no_grad():
    print(json.dumps(model(torch.tensor([ids])).logits[0, -1].tolist()))
"""


def qa(count: int) -> list[dict[str, str]]:
    return [
        {"instruction": f"Say {i % 10} {i}.", "input": "", "output": f"{'abcdefghij'[i % 10]}" * 3}
        for i in range(count)
    ]


@pytest.fixture
def make_config(supervised_job: Callable[..., SFTConfig]) -> Callable[..., SFTConfig]:
    """A short job on 80 rows; any field may be set."""

    def make(rows: int = 80, **values: Any) -> SFTConfig:
        return supervised_job(SFTConfig, "sft", qa(rows), **{"lora": {"r": 4, "lora_alpha": 8}, **values})

    return make


def test_a_chat_model_learns_to_end_its_turn_and_is_stopped_there(
    make_config: Callable[..., SFTConfig], chat_llama: Callable[..., Path], write_jsonl: Write
) -> None:
    """ChatML on a base whose eos (</s>, 2) is not what ends a turn (<|im_end|>, 261): trained, recorded, stopped on."""
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "ok"}]
    job = make_config(
        model=str(chat_llama()),
        data={"train": write_jsonl("chat.jsonl", [{"messages": talk}] * 64), "held_out_fraction": 0.0},
        template="chat",
        max_steps=60,
    )
    run = sft(job)
    assert run.folder.manifest()["stop_token_ids"] == [261, 2]
    greedy = SamplingConfig(do_sample=False)
    (said,) = generate(policies=[str(run.run_dir)], instruction="Hi", max_new_tokens=8, sampling=greedy, num_threads=1)
    assert (said["completion"], said["length"], said["finished"]) == ("ok", 3, True)


def test_a_run_leaves_a_complete_folder_that_plain_peft_loads(
    make_config: Callable[..., SFTConfig], console: Any, run_without_us: Callable[..., Any]
) -> None:
    """Seeds F25 (empty adapters), F31 (short runs that save nothing), F39 (artefacts that lack their own description)."""
    config = make_config()
    run = sft(config, console)
    folder = Path(config.output_dir)
    assert (run.stage, run.status, run.steps) == ("sft", "done", 4)
    assert load_run(folder) == run
    for name in ("config.yaml", "manifest.json", "summary.json", "metrics.jsonl", "report.html"):
        assert (folder / name).stat().st_size > 0, name
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == ["LATEST", "step_000002", "step_000004"]
    last = weights(folder, "checkpoints/step_000004/adapter")
    assert all(torch.equal(last[n], t) for n, t in weights(run).items())

    manifest = json.loads((folder / "manifest.json").read_text())
    assert (
        manifest["base"]["weights_sha256"] and manifest["tokenizer_sha256"] and manifest["template"]["name"] == "none"
    )
    assert manifest["data"][0]["rows"] == 80 and manifest["parents"] == [] and manifest["threads"] == 1
    assert manifest["sft"] == {"add_eos_token": True, "train_on_inputs": False, "train_on_turns": "all"}

    ids = [1, 87, 70, 100, 2]
    theirs = torch.tensor(run_without_us(LOGITS, config.model_name_or_path, str(run.adapter_dir), json.dumps(ids)))
    ours = logits_with(config.model_name_or_path, run.adapter_dir, ids)
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
    assert (ours - logits_with(config.model_name_or_path, None, ids)).abs().max() > 0.1


def logits_with(base: str, adapter: Path | None, ids: list[int]) -> torch.Tensor:
    """Next-token logits from the weights themselves: W + (alpha / r) B A in every adapted layer."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        files = read_adapter(adapter)
        scale = files.config["lora_alpha"] / files.config["r"]
        for key, a in files.tensors.items():
            if key.endswith("lora_A.weight"):
                layer = model.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
                layer.weight.data += scale * files.tensors[key.replace("lora_A", "lora_B")] @ a
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1]


def test_it_learns_what_the_data_say(make_config: Callable[..., SFTConfig], console: Any) -> None:
    run = sft(make_config(max_steps=40, eval_steps=20, learning_rate=2e-2), console)
    assert run.metrics["loss_start"] > 4 and run.metrics["loss"] < 1.0
    assert run.metrics["eval/loss"] < run.metrics["eval/loss_start"] / 3
    rows = read_metrics(Path(run.run_dir) / "metrics.jsonl")
    assert [r["step"] for r in rows if "eval/loss" in r] == [0, 20, 40]
    assert rows[-1]["step"] == 40 and "loss" in rows[-1]


def test_the_last_line_of_progress_tells_the_last_step(make_config: Callable[..., SFTConfig], console: Any) -> None:
    run = sft(make_config(max_steps=4, logging_steps=3), console)
    told = [event for event in console.events if event["kind"] == "progress"]
    assert [event["step"] for event in told] == [1, 2, 3, 4]
    rows = {row["step"]: row for row in read_metrics(Path(run.run_dir) / "metrics.jsonl") if "loss" in row}
    for step in (3, 4):
        assert told[step - 1]["shown"]["loss"] == pytest.approx(rows[step]["loss"])


def test_the_header_says_what_will_happen(make_config: Callable[..., SFTConfig], console: Any) -> None:
    sft(make_config(per_device_train_batch_size=4), console)
    for part in (
        "80 rows: ",
        "trainable  8,192 of ",
        "16 rows a step = 4 per device x 4 accumulated x 1 worker",
        "steps      4 (",
        "peak lr    0.01 (adamw_torch)",
        "lora.r=4",
    ):
        assert part in console.text, part
    assert console.warnings == [
        "only 4 optimizer steps: expect little; lower train_batch_size, or raise num_train_epochs"
    ]


def test_a_chat_template_left_to_the_default_is_warned_of(
    make_config: Callable[..., SFTConfig], chat_llama: Callable[..., Path], console: Any
) -> None:
    job = make_config(model=str(chat_llama()), max_steps=1, max_length=200)
    sft(SFTConfig(**job.model_dump(exclude_unset=True, exclude={"template"})), console)
    assert any("the model has a chat template, the default is alpaca" in text for text in console.warnings)


def test_a_warm_up_longer_than_the_run_is_warned_about(make_config: Callable[..., SFTConfig], console: Any) -> None:
    """Seeds F28: the learning rate peaks at 7 of 101 parts."""
    sft(make_config(max_steps=7, warmup_steps=100, learning_rate=3e-4), console)
    assert any("peaks at 2.08e-05, not at 0.0003" in line for line in console.warnings)


def test_no_row_is_left_out(make_config: Callable[..., SFTConfig], console: Any) -> None:
    """Seeds F28: hidden caps. 1,237 rows in, 1,237 rows used, each once."""
    config = make_config(
        rows=1237,
        max_steps=-1,
        train_batch_size=64,
        per_device_train_batch_size=32,
        eval_steps=100,
        data={"held_out_fraction": 0.0},
    )
    run = sft(config, console)
    assert run.steps == 20  # ceil(1237 / 64)
    assert run.metrics["tokens/train"] == 1237 * 4  # three letters and eos each
    assert "no held-out rows" in "\n".join(console.warnings) and "eval/loss" not in run.metrics


def test_loss_on_prompts_and_without_eos(make_config: Callable[..., SFTConfig], console: Any, tmp_path: Path) -> None:
    prompt = len("Say 0 0.")
    for name, values, tokens in (
        ("inputs", {"train_on_inputs": True}, prompt + 4),
        ("plain", {"add_eos_token": False}, 3),
    ):
        config = make_config(
            rows=16, max_steps=1, output_dir=str(tmp_path / name), data={"held_out_fraction": 0.0, "max_rows": 10},
            train_batch_size=10, per_device_train_batch_size=10, **values,
        )  # fmt: skip
        assert sft(config, console).metrics["tokens/train"] == 10 * tokens


def test_prompts_as_long_as_the_limit_are_dropped_and_counted(
    make_config: Callable[..., SFTConfig], console: Any, write_jsonl: Write
) -> None:
    """Seeds F30: rows whose labels are all masked made the loss NaN."""
    rows = [*qa(40), *({"instruction": f"{i} " + "x" * 80, "input": "", "output": "y"} for i in range(8))]
    config = make_config(data={"train": write_jsonl("long.jsonl", rows), "too_long": "truncate"})
    run = sft(config, console)
    counts = re.findall(r"(\d+) dropped: reply empty after truncation", console.text)
    assert sum(map(int, counts)) == 8
    assert run.metrics["loss"] < 10


def test_fewer_rows_than_a_batch_is_a_data_error_that_leaves_no_run(
    make_config: Callable[..., SFTConfig], console: Any
) -> None:
    config = make_config(rows=12)
    with pytest.raises(DataError, match=r"rows < global batch 16") as caught:
        sft(config, console)
    assert caught.value.exit_code == 4
    assert not Path(config.output_dir).exists()


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        (100, r"step \d+: 3 updates in a row had a gradient that is not finite"),
        (1, r"step \d+: eval/loss is not finite"),
    ],
)
def test_a_training_that_runs_away_ends_with_the_step_and_the_way_on(
    steps: int, says: str, make_config: Callable[..., SFTConfig], console: Any
) -> None:
    """Fault 20. By its updates, or by an evaluation that comes first."""
    with pytest.raises(Interrupted, match=rf"{says}.*; rlhf-ray resume \S+$"):
        sft(make_config(learning_rate=1e30, warmup_steps=0, eval_steps=steps, max_steps=9), console)


@pytest.mark.parametrize("what", ["outputs", "weights"])
def test_an_adapter_that_reads_back_otherwise_is_refused(
    what: str, make_config: Callable[..., SFTConfig], console: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seeds F25: the check has to see a file that is not what was trained (another scale, a weight that differs a little)."""

    def changed(folder: Path) -> Any:
        files = read_adapter(folder)
        if what == "outputs":
            return replace(files, config={**files.config, "lora_alpha": 16.0})
        name = next(iter(files.tensors))
        return replace(files, tensors={**files.tensors, name: files.tensors[name] * (1 + 1e-6)})

    monkeypatch.setattr(stage, "read_adapter", changed)
    config = make_config()
    with pytest.raises(InvariantError, match=f"the adapter read back (gives|has) other {what}"):
        sft(config, console)
    assert load_run(config.output_dir).status == "running"


class TestResume:
    def test_a_finished_run_is_returned_at_once(self, make_config: Callable[..., SFTConfig], console: Any) -> None:
        first = sft(make_config(), console)
        files = [p for p in Path(first.run_dir).rglob("*") if p.is_file() and p.name not in (".lock", ".owner")]
        before = {p: p.stat().st_mtime_ns for p in files}
        again = sft(make_config(resume="auto", logging_steps=3), console)
        assert again == first and "nothing to do" in console.text
        assert before == {p: p.stat().st_mtime_ns for p in before}

    def test_resume_never_names_the_command(self, make_config: Callable[..., SFTConfig], console: Any) -> None:
        config = make_config()
        sft(config, console)
        with pytest.raises(ConfigError, match=f"rlhf-ray resume {config.output_dir}"):
            sft(config, console)

    def test_a_finished_run_of_another_configuration_is_not_taken_for_this_one(
        self, make_config: Callable[..., SFTConfig], console: Any
    ) -> None:
        sft(make_config(), console)
        with pytest.raises(ConfigError, match=r"learning_rate: .* expected 0.01; got 0.02"):
            sft(make_config(resume="auto", learning_rate=2e-2), console)

    def test_a_stopped_run_goes_on_to_what_it_would_have_been(
        self, make_config: Callable[..., SFTConfig], console: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """At length, for both stages and under kill -9: tests/chaos/test_sft_and_reward.py."""
        often = {"logging_steps": 2, "save_steps": 100, "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}}
        whole = sft(make_config(output_dir=str(tmp_path / "whole"), **often), console)
        with monkeypatch.context() as patch:
            patch.setenv("RLHF_RAY_FAULT", "learner:update:step=3:term")
            with pytest.raises(Interrupted, match=r"SIGTERM; step 3 is saved; fix: rlhf-ray resume"):
                sft(make_config(**often), console)
        with pytest.raises(ConfigError, match=r"learning_rate: .* holds a run with another value; expected 0.01"):
            sft(make_config(resume="auto", learning_rate=3e-2, **often), console)
        path = tmp_path / "sft" / "config.yaml"
        written = path.read_text()
        path.write_text(dump_yaml({**yaml.safe_load(written), "learning_rate": 3e-2}))
        with pytest.raises(ConfigError, match=r"learning_rate: .*step_000003 was written under another value"):
            sft(make_config(resume="auto", learning_rate=3e-2, **often), console)
        path.write_text(written)
        shutil.copytree(tmp_path / "sft", tmp_path / "two")
        run = sft(make_config(resume="auto", **often), console)
        assert "sft: resuming from step 3 " in console.text and "exact" not in console.text
        resume(tmp_path / "two", console, overrides=["learner.num_threads=2"])
        assert console.text.count("resumes, not bit-exact: threads 1 -> 2") == 1
        assert all(torch.equal(t, weights(whole)[n]) for n, t in weights(run).items())
        one, two = (lasting_rows(r) for r in (whole, run))
        assert one == two and [row["step"] for row in two if "loss" in row] == [1, 2, 4]

    def test_a_stopped_run_may_be_given_another_length(
        self, make_config: Callable[..., SFTConfig], console: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Stopped in step 3 of 4, resumed for 6: the run that 6 steps would have been (issue 16, inputs 12)."""
        fixed: dict[str, Any] = {"lr_scheduler_type": "constant", "warmup_steps": 1, "save_steps": 100}
        whole = sft(make_config(output_dir=str(tmp_path / "whole"), max_steps=6, **fixed), console)
        with monkeypatch.context() as patch:
            patch.setenv("RLHF_RAY_FAULT", "learner:update:step=3:term")
            with pytest.raises(Interrupted):
                sft(make_config(**fixed), console)
        with pytest.raises(
            ConfigError, match="max_steps: the run has made 3 steps already; expected at least 3; got 2"
        ):
            resume(tmp_path / "sft", console, overrides=["max_steps=2"])
        run = resume(tmp_path / "sft", console, overrides=["max_steps=6"])
        assert "continuing with max_steps 6 (was 4)" in console.text and run.steps == 6
        assert all(torch.equal(t, weights(whole)[n]) for n, t in weights(run).items())

    def test_training_goes_on_from_a_finished_run_in_another_one(
        self, make_config: Callable[..., SFTConfig], console: Any, tmp_path: Path
    ) -> None:
        """A finished run does not change; the refusal names the way, which starts where the first run ended."""
        first = sft(make_config(), console)
        with pytest.raises(
            ConfigError, match=rf"num_train_epochs: .* rlhf-ray sft JOB sft={first.run_dir} output_dir="
        ):
            resume(first.run_dir, console, overrides=["num_train_epochs=2"])
        further = make_config(output_dir=str(tmp_path / "further")).model_dump(exclude={"lora", "sft"})
        run = sft(SFTConfig(**further, sft=first.run_dir), console)
        (parent,) = run.folder.manifest()["parents"]
        assert (parent["role"], parent["sha256"]) == ("sft", read_adapter(first.adapter_dir).sha256)
        logs = [read_metrics(Path(one.run_dir) / "metrics.jsonl") for one in (first, run)]
        losses = [[row["eval/loss"] for row in log if "eval/loss" in row] for log in logs]
        assert losses[1][-1] < losses[0][-1] < losses[0][0]
        assert "adapter    a copy of" in console.text
        with pytest.raises(ValueError, match="lora: the adapter named by sft has its own r"):
            make_config(output_dir="x", sft=first.run_dir)


def test_the_best_step_is_kept_and_its_checkpoint_survives(
    make_config: Callable[..., SFTConfig], console: Any, tmp_path: Path
) -> None:
    """A learning rate that soon does harm: the last step is not the best one. Which rate that is depends on the processor's
    rounding: losses leap about."""
    for rate in (0.2, 0.5, 0.35, 1.0):
        config = make_config(
            output_dir=str(tmp_path / f"at_{rate}"), max_steps=12, eval_steps=1, save_steps=1, learning_rate=rate,
            save_total_limit=2, load_best_model_at_end=True, lr_scheduler_type="constant",
        )  # fmt: skip
        run = sft(config, console)
        rows = {
            r["step"]: r["eval/loss"] for r in read_metrics(Path(run.run_dir) / "metrics.jsonl") if "eval/loss" in r
        }
        best = min((s for s in rows if s), key=lambda s: rows[s])
        assert run.metrics["best/step"] == best
        if best < 11:
            break
    assert best < 11
    assert run.metrics["eval/loss"] == pytest.approx(rows[best], rel=1e-5)
    saved = weights(run, f"checkpoints/step_{best:06d}/adapter")
    assert all(torch.equal(saved[n], t) for n, t in weights(run).items())
    assert {c.step for c in run.folder.checkpoints()} == {best, 11, 12}


@pytest.mark.parametrize("values", [{"gradient_checkpointing": True}, {"group_by_length": True}, {"dtype": "bfloat16"}])
def test_variants_train(values: dict[str, Any], make_config: Callable[..., SFTConfig], console: Any) -> None:
    run = sft(make_config(max_steps=20, eval_steps=20, **values), console)
    assert run.metrics["loss"] < run.metrics["loss_start"] / 2
    assert all(t.dtype is torch.float32 for t in weights(run).values())


def test_gradient_checkpointing_changes_no_number(
    make_config: Callable[..., SFTConfig], console: Any, tmp_path: Path
) -> None:
    runs = [
        sft(make_config(output_dir=str(tmp_path / str(on)), gradient_checkpointing=on), console) for on in (False, True)
    ]
    assert all(torch.equal(t, weights(runs[1])[n]) for n, t in weights(runs[0]).items())


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_base_trains(
    bits: int, make_config: Callable[..., SFTConfig], tiny_llama: Callable[..., Path], console: Any
) -> None:
    """On CPUs with avx512_bf16 an evaluation used to cut the gradients of every later step of a 4-bit base, in silence."""
    pytest.importorskip("bitsandbytes")
    run = sft(make_config(max_steps=20, eval_steps=2, save_steps=20, **{f"load_in_{bits}bit": True}), console)
    assert run.metrics["loss"] < run.metrics["loss_start"] / 2
    assert json.loads((Path(run.run_dir) / "manifest.json").read_text())["base"]["precision"] == f"{bits}bit"


@pytest.mark.slow
def test_two_ray_workers_train_what_one_process_trains(
    make_config: Callable[..., SFTConfig], console: Any, tmp_path: Path, four_cpus: Any
) -> None:
    """The same rows in every step, one global normaliser: only rounding may differ. Rows do not fill the last step."""
    common = {"per_device_train_batch_size": 4, "rows": 53, "max_steps": -1, "num_train_epochs": 2, "lora": {"r": 4}}
    alone = sft(make_config(output_dir=str(tmp_path / "alone"), **common), console)
    group = make_config(output_dir=str(tmp_path / "group"), learner={"num_workers": 2, "num_threads": 1}, **common)
    run = sft(group, console)
    assert "16 rows a step = 4 per device x 2 accumulated x 2 workers" in console.text
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(weights(run)[name], tensor, atol=2e-5, rtol=1e-3)
    for name in ("eval/loss", "loss", "grad_norm"):
        assert run.metrics[name] == pytest.approx(alone.metrics[name], rel=1e-4), name
    assert run.metrics["tokens/train"] == alone.metrics["tokens/train"]
    manifest = json.loads((Path(run.run_dir) / "manifest.json").read_text())
    assert manifest["world_size"] == 2 and manifest["status"] == "done"


@pytest.mark.slow
def test_a_model_that_sees_trains_on_two_workers(
    make_config: Callable[..., SFTConfig], tiny_llama: Callable[..., Path], tmp_path: Path, four_cpus: Any
) -> None:
    """Gemma 3's wrapper: DDP waits for gradients of an adapter on its vision tower, which no text reaches."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**small, "vocab_size": 300, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 64}
    seen = {**small, "image_size": 28, "patch_size": 14}
    shape: Any = {"text_config": text, "vision_config": seen, "mm_tokens_per_image": 4}
    base = tmp_path / "gemma3"
    shutil.copytree(tiny_llama(), base, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForImageTextToText.from_config(AutoConfig.for_model("gemma3", **shape)).save_pretrained(base)
    common = {"model": str(base), "per_device_train_batch_size": 4, "max_steps": 2, "eval_steps": 2}
    alone = sft(make_config(output_dir=str(tmp_path / "alone"), **common))
    run = sft(make_config(output_dir=str(tmp_path / "group"), learner={"num_workers": 2, "num_threads": 1}, **common))
    trained = weights(run)
    assert all(".language_model." in name for name in trained)
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(trained[name], tensor, atol=1e-4, rtol=1e-3)


@pytest.mark.data
@pytest.mark.slow
def test_sft_on_real_rows(data_dir: Path, make_config: Callable[..., SFTConfig], console: Any) -> None:
    """Alpaca rows on stories260K: it never ended a text with </s> before."""
    config = make_config(
        model=str(data_dir / "models/stories260K"),
        data={"train": str(data_dir / "sft_alpaca_2000.jsonl.gz"), "eval_max_rows": 32},
        template="alpaca_short",
        max_length=256,
        max_steps=15,
        eval_steps=15,
        per_device_train_batch_size=8,
        lora={"r": 16},
    )
    run = sft(config, console)
    assert "2,000 rows: " in console.text and "its pad is its end token" in console.text
    assert run.metrics["eval/loss"] < run.metrics["eval/loss_start"] - 0.5
