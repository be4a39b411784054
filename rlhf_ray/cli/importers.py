"""The commands that take over artefacts of others: import loralib, weight-diff, peft, gguf."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from rlhf_ray.cli.output import stdout_kept
from rlhf_ray.runtime.imports import importing

Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]
importers = typer.Typer(help="Take over GGUF files, and artefacts of two older systems.", rich_markup_mode=None)


@importers.command("loralib")
def import_loralib(
    checkpoint: Annotated[str, typer.Argument(help="checkpoint-N folder, or its pytorch_model.bin")],
    base: Annotated[str, typer.Option(help="what the policy belongs on: the recovered SFT model")],
    lora_alpha: Annotated[float, typer.Option(help="not in the file; 64 for the published checkpoints")],
    output_dir: Annotated[str, typer.Option(help="output folder for adapter/ (policy) and value/ (value model)")],
    value_base: Annotated[str | None, typer.Option(help="base of the value model; default: --base")] = None,
    debug: Debug = False,
) -> None:
    """A LoRA PPO checkpoint of AlpacaFarm-LoRA."""
    with importing():
        from rlhf_ray.models.importers import import_loralib as run_import

    print(run_import(checkpoint, base, lora_alpha, output_dir, value_base))


@importers.command("weight-diff")
def import_weight_diff(
    diff: Annotated[str, typer.Argument(help="folder of the published differences")],
    raw: Annotated[str, typer.Option(help="folder of the raw LLaMA in transformers' format")],
    output_dir: Annotated[str, typer.Option(help="output folder for the recovered model")],
    debug: Debug = False,
) -> None:
    """A model that AlpacaFarm published as differences from LLaMA; checked by its published sum."""
    with importing():
        from rlhf_ray.models.importers import import_weight_diff as run_import

    with stdout_kept():
        written = run_import(diff, raw, output_dir)
    print(written)


@importers.command("peft")
def import_peft(
    adapter: Annotated[str, typer.Argument(help="folder with adapter_config.json and adapter_model.bin")],
    output_dir: Annotated[str, typer.Option(help="output folder for the same adapter as safetensors")],
    debug: Debug = False,
) -> None:
    """A PEFT adapter whose weights are pickled."""
    with importing():
        from rlhf_ray.models.importers import import_peft as run_import

    print(run_import(adapter, output_dir))


@importers.command("gguf")
def import_gguf(
    file: Annotated[str, typer.Argument(help="a .gguf file of llama.cpp")],
    output_dir: Annotated[str, typer.Option("--output-dir", "--output", help="output folder for the checkpoint")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: the file's, bfloat16 if quantised")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="folder with the model's tokenizer.json, instead of the file's tokenizer")
    ] = None,
    debug: Debug = False,
) -> None:
    """A model of llama.cpp: quantised weights are dequantised; checked by a greedy reply."""
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"--dtype: expected float32, bfloat16 or float16; got {dtype}")
    with importing():
        from rlhf_ray.models.importers import import_gguf as run_import

    with stdout_kept():
        written = run_import(file, output_dir, dtype, tokenizer, log=lambda line: print(line, file=sys.stderr))
    print(written)


def add_import_commands(app: typer.Typer) -> None:
    app.add_typer(importers, name="import")
