"""Which models are tried before a job starts, found without importing any."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest

from rlhf_ray.config import SFTConfig
from rlhf_ray.console import NullConsole
from rlhf_ray.errors import ConfigError
from rlhf_ray.launch.launch import launch
from rlhf_ray.launch.model_families import check_model, may_keep_more


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "llama"}, False),
        ({"model_type": "gemma3_text"}, False),
        ({"model_type": "qwen3_5_text"}, True),
        ({"model_type": "some_wrapper", "text_config": {"model_type": "lfm2"}}, True),
        ({"model_type": "rwkv"}, True),
        ({"model_type": "falcon_mamba"}, True),
        ({"model_type": "minimax"}, True),
        ({"model_type": "deepseek_v32"}, True),
        ({"model_type": "minimax_m3_vl_text"}, True),
        ({"model_type": "roberta"}, True),
        ({"model_type": "cpmant"}, True),
        ({"model_type": "gpt_neox"}, False),
        ({"model_type": "trocr"}, True),
        ({"model_type": "qwen3_vl"}, False),
        ({"model_type": "a family of next year"}, True),
        ({}, False),
    ],
)
def test_by_the_config_alone(config: dict[str, object], expected: bool, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert may_keep_more(tmp_path / "config.json") is expected


@pytest.mark.parametrize("model_type", ["deepseek_v32", "axk2", "glm_moe_dsa"])
def test_layers_that_nothing_here_samples_are_refused_before_anything_is_loaded(
    model_type: str, tmp_path: Path
) -> None:
    """Layers that attend to what an index finds: SFT and a reward model were trained before PPO could not sample."""
    from transformers import AutoConfig

    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match=f"model type {model_type}: cannot be decoded here; .*; got indexed_attention"
    ):
        check_model(str(tmp_path))


@pytest.mark.parametrize(
    ("model_type", "is_decoder", "got"),
    [
        ("bert-generation", False, "is_decoder: false: an encoder, which sees the tokens that follow"),
        ("bert-generation", True, None),
        ("roberta", True, "its logits are not its output layer on its last hidden state"),
    ],
)
def test_an_encoder_is_no_language_model(model_type: str, is_decoder: bool, got: str | None, tmp_path: Path) -> None:
    """As a language model an encoder was trained by SFT although it sees the answer, and a reward model was trained on top."""
    from transformers import AutoConfig

    AutoConfig.for_model(model_type, is_decoder=is_decoder).save_pretrained(tmp_path)
    if got is None:
        check_model(str(tmp_path))
        return
    with pytest.raises(ConfigError, match=f"models of type {model_type} cannot be used here .*{got}"):
        check_model(str(tmp_path))


def test_positions_that_are_counted_from_the_cache_are_refused(tmp_path: Path) -> None:
    """TrOCR's text decoder: a row beside a longer one got that one's positions, and PPO stopped in its first step."""
    from transformers import AutoConfig

    AutoConfig.for_model("trocr").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"models of type trocr cannot be used here .*; got .*off by"):
        check_model(str(tmp_path))


def test_a_cache_that_is_not_decoded_with_here_is_refused(tmp_path: Path) -> None:
    """CPM-Ant makes masks and positions itself: SFT and a reward model were trained before PPO could not sample."""
    from transformers import AutoConfig

    AutoConfig.for_model("cpmant").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="models of type cpmant cannot be used here"):
        check_model(str(tmp_path))


def test_a_family_that_nobody_could_try_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A config that no tiny copy can be made of: nothing was said where layers with a state might be sampled wrong."""
    from transformers import AutoConfig

    from rlhf_ray.sampler import probe

    def unknown_rule(*_: object) -> None:
        raise ValueError("heads must divide a number that nobody knows")

    for name in ("lfm2", "llava"):
        AutoConfig.for_model(name).save_pretrained(tmp_path / name)
    monkeypatch.setattr(probe, "tiny_config", unknown_rule)
    line = check_model(str(tmp_path / "lfm2"))
    assert "models of type lfm2 may keep more than keys and values, and no tiny copy" in line and "\n" not in line
    assert check_model(str(tmp_path / "llava")) == ""  # its decoder is a Llama: attention needs no trial

    class Heard(NullConsole):
        warnings: ClassVar[list[str]] = []

        def warn(self, line: str) -> None:
            self.warnings.append(line)

    job = SFTConfig(
        output_dir=str(tmp_path / "run"),
        model_name_or_path=str(tmp_path / "lfm2"),
        data={"train": "d.jsonl"},  # type: ignore[arg-type]
        template="none",
        learner={"num_workers": 0},  # type: ignore[arg-type]
    )
    launch(lambda config, session: None, job, Heard())  # type: ignore[arg-type,return-value]
    assert Heard.warnings == [line]


def test_a_driver_imports_nothing_for_a_model_of_attention(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    code = (
        "import sys\nfrom rlhf_ray.launch.model_families import check_model\n"
        f"check_model({str(tmp_path)!r})\nprint(sorted({{'torch', 'transformers', 'peft'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
