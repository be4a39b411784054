"""The base model of the demo: a small Llama and its tokenizer, trained from scratch on the world's own text in about a minute.

It is no language model: it knows this world's words and sentences, and answers instructions badly. Head dimension 32 with
grouped-query attention, all sizes multiples of 64, so that every decode engine can run it.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_ray.data.tinyworld.text import pretraining_text
from rlhf_ray.errors import ArtifactError

VOCABULARY = 896
HIDDEN, LAYERS, HEADS, KEY_VALUE_HEADS, MLP, CONTEXT = 128, 3, 4, 2, 256, 256
STEPS, BATCH, LEARNING_RATE, WARMUP, FINAL_SHARE = 800, 32, 5e-3, 30, 0.05
INITIALIZER_RANGE = 0.08
"""transformers' 0.02 is meant for wide models; at this width, attention then takes twice as long to learn to look things up."""
TOKENIZER_TEXTS = 6000
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
DONE = "tinyworld.json"

Progress = Callable[[int, int, dict[str, float]], None]


def build_base(
    folder: Path | str,
    seed: int,
    steps: int = STEPS,
    device: torch.device | str = "cpu",
    num_threads: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Make the base in `folder`: a standard Hugging Face folder. Returns it; a complete one that is there already is kept.

    Equal seed, steps and threads give equal weights. `num_threads`: CPU threads, None leaves torch's number as it is.
    progress: called as progress(step, steps, {"loss": ...}), every 20 steps and at the end.
    ArtifactError if the folder holds anything else, a base whose files have changed, or one that was made in another way."""
    from rlhf_ray.storage.files import atomic_replace_folder, atomic_write_json, describe_files, temporary_beside

    folder = Path(folder)
    recipe = _recipe(seed, steps)
    if folder.exists() and any(folder.iterdir()):
        _check_made(folder, recipe)
        return folder
    threads = torch.get_num_threads()
    temporary = temporary_beside(folder)
    temporary.mkdir(parents=True)
    try:
        torch.set_num_threads(num_threads or threads)
        tokenizer, model = _train(seed, steps, torch.device(device), progress)
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        atomic_write_json(temporary / DONE, {"recipe": recipe, "files": describe_files(temporary)})
        atomic_replace_folder(temporary, folder)
    finally:
        torch.set_num_threads(threads)
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _recipe(seed: int, steps: int) -> dict[str, Any]:
    """What the base is made from; a change of the world's text shows in the digest."""
    text = hashlib.sha256("\n".join(pretraining_text(200, seed)).encode("utf-8")).hexdigest()
    sizes = {"vocabulary": VOCABULARY, "layers": LAYERS, "hidden": HIDDEN, "mlp": MLP}
    return {"seed": seed, "steps": steps, "batch": BATCH, "learning_rate": LEARNING_RATE, **sizes, "text_sha256": text}


def _check_made(folder: Path, recipe: dict[str, Any]) -> None:
    from rlhf_ray.storage.checkpoints import verify_files
    from rlhf_ray.storage.files import read_json

    fix = "choose another folder, or delete it"
    if not (folder / DONE).is_file():
        raise ArtifactError.at(
            str(folder), "holds something that is not a base of the tiny world", f"{DONE} in it", fix=fix
        )
    made = read_json(folder / DONE)
    if made.get("recipe") != recipe:
        raise ArtifactError.at(str(folder), "was made in another way", str(recipe), str(made.get("recipe")), fix)
    verify_files(folder, made)


def _train(seed: int, steps: int, device: torch.device, progress: Progress | None) -> tuple[Any, Any]:
    """The tokenizer and the trained model, on the CPU."""
    texts = pretraining_text(steps * BATCH, seed)
    tokenizer = train_tokenizer(pretraining_text(TOKENIZER_TEXTS, seed))
    model = new_model(seed).to(device)
    encoded = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    ids = [[tokenizer.bos_token_id, *text.ids, tokenizer.eos_token_id] for text in encoded]
    _pretrain(model, ids, seed, steps, progress)
    return tokenizer, model.to("cpu")


def train_tokenizer(texts: Sequence[str]) -> Any:
    """A byte-level BPE tokenizer: it encodes any text without loss, and the world's own words in one or two tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    pad, bos, eos, unk = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )


def new_model(seed: int) -> nn.Module:
    """The Llama before training; equal seeds give equal weights, whatever torch's generator was doing."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        head_dim=HIDDEN // HEADS,
        max_position_embeddings=CONTEXT,
        initializer_range=INITIALIZER_RANGE,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _pretrain(model: nn.Module, ids: list[list[int]], seed: int, steps: int, progress: Progress | None) -> None:
    """AdamW, linear warm-up, cosine decay; loss over every token of a text and its end."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    device = next(model.parameters()).device
    smooth = 0.0
    model.train()
    for step, (tokens, labels) in enumerate(_batches(ids, seed), start=1):
        decay = FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(step / WARMUP, 1.0) * decay
        logits = model(input_ids=tokens.to(device), use_cache=False).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten().to(device), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        smooth = float(loss.detach()) if step == 1 else 0.95 * smooth + 0.05 * float(loss.detach())
        if progress is not None and (step % 20 == 0 or step == steps):
            progress(step, steps, {"loss": smooth})
    model.eval()


def _batches(ids: list[list[int]], seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Right-padded (tokens, labels) of similar length, in shuffled order."""
    rng = Random(seed)
    group = 32 * BATCH
    for start in range(0, len(ids), group):
        rows = sorted(ids[start : start + group], key=len)
        parts = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
        rng.shuffle(parts)
        for part in parts:
            width = min(max(map(len, part)), CONTEXT)
            tokens = torch.zeros(len(part), width, dtype=torch.int64)
            labels = torch.full((len(part), width), -100, dtype=torch.int64)
            for i, row in enumerate(part):
                kept = torch.tensor(row[:width])
                tokens[i, : len(kept)], labels[i, : len(kept)] = kept, kept
            yield tokens, labels
