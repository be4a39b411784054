"""Tiny encoders, which score a prompt and a reply as a pair of texts."""

from __future__ import annotations

import string
from pathlib import Path

KINDS = ("bert", "deberta-v2", "roberta", "distilbert", "modernbert")
POSITIONS = 64


def write_encoder(folder: Path, *, kind: str, labels: int) -> Path:
    """A random classifier of `labels` labels with a tokenizer of characters. Returns `folder`."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from tokenizers.processors import BertProcessing, RobertaProcessing
    from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

    signs = string.ascii_letters + string.digits + string.punctuation
    special = ("<s>", "<pad>", "</s>", "<unk>") if kind == "roberta" else ("[CLS]", "[PAD]", "[SEP]", "[UNK]")
    words = {w: i for i, w in enumerate((*special, *signs, *(f"##{s}" for s in signs)))}
    tokenizer = Tokenizer(WordPiece(words, unk_token=special[3]))
    tokenizer.pre_tokenizer = BertPreTokenizer()
    processing = RobertaProcessing if kind == "roberta" else BertProcessing
    tokenizer.post_processor = processing((special[2], 2), (special[0], 0))
    names = dict(zip(("cls_token", "pad_token", "sep_token", "unk_token"), special))
    if kind == "bert":
        names["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=POSITIONS, **names).save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    if kind == "distilbert":
        sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
    more = {"type_vocab_size": 2} if kind == "bert" else {"type_vocab_size": 1} if kind == "roberta" else {}
    positions = POSITIONS + 2 if kind == "roberta" else POSITIONS
    ids = {"pad_token_id": 1, "cls_token_id": 0, "sep_token_id": 2, "bos_token_id": 0, "eos_token_id": 2}
    config = AutoConfig.for_model(
        kind, vocab_size=len(words), max_position_embeddings=positions, num_labels=labels, **ids, **sizes, **more
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = AutoModelForSequenceClassification.from_config(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder
