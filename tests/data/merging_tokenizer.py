"""A byte-level tokenizer whose tokens span what templates and rows meet in: blanks, line breaks, signs, characters."""

from __future__ import annotations

import json
import random
from pathlib import Path

from label_rows import random_text
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library
from trained_tokenizers import LLAMA_3_PATTERN

SPECIALS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"]


def train_merging_tokenizer(directory: Path) -> Path:
    """Llama 3's pattern and BOS, with the special tokens of ChatML beside its own."""
    chance = random.Random(9)
    library = Library(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA_3_PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator([random_text(chance) for _ in range(2000)], trainer)
    library.add_special_tokens(SPECIALS)
    library.add_tokens(["<think>", "<tool>"])
    bos = SPECIALS[0], library.token_to_id(SPECIALS[0])
    library.post_processor = processors.TemplateProcessing(f"{SPECIALS[0]} $A", special_tokens=[bos])
    directory.mkdir()
    library.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIALS[0], "eos_token": "<|eot_id|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory
