"""Fixtures: small tokenizers of several kinds, trained when a test first needs them."""

from __future__ import annotations

import base64
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library

from llamatune.tokenizers.byte_level import bytes_of
from llamatune.tokenizers.gguf_pre_tokenizers import PRE_TOKENIZERS
from llamatune.tokenizers.loading import load_tokenizer
from llamatune.tokenizers.sentencepiece import SentencePieceTokenizer

WORDS = """
below is an instruction that describes a task write response appropriately completes the request question answer llama
river stone seven walks over green hills and counts three apples in its basket while rain falls
""".split()  # noqa: SIM905


def _text(lines: int) -> list[str]:
    chance = random.Random(7)
    made = []
    for _ in range(lines):
        words = [chance.choice(WORDS) for _ in range(chance.randint(3, 12))]
        words[0] = words[0].capitalize()
        made.append(" ".join(words) + chance.choice([".", "?", ":", f" {chance.randint(0, 999)}"]))
    return made


def _train(directory: Path, name: str, **options: Any) -> Path:
    settings: dict[str, Any] = {
        "vocab_size": 512,
        "byte_fallback": True,
        "character_coverage": 0.999,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "hard_vocab_limit": False,
        "minloglevel": 2,
        "num_threads": 1,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_text(600)), model_prefix=str(directory / name), **{**settings, **options}
    )
    return directory / f"{name}.model"


@pytest.fixture(scope="session")
def tokenizer_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """LLaMA's kind of tokenizer (``bpe``) and others that SentencePiece can make."""
    directory = tmp_path_factory.mktemp("tokenizers")
    return {
        "bpe": _train(directory, "bpe", model_type="bpe"),
        "unigram": _train(directory, "unigram", model_type="unigram"),
        "normalising": _train(
            directory,
            "normalising",
            model_type="unigram",
            normalization_rule_name="nmt_nfkc",
            remove_extra_whitespaces=True,
        ),
        "suffix": _train(directory, "suffix", model_type="bpe", treat_whitespace_as_suffix=True),
        "no_eos": _train(directory, "no_eos", model_type="bpe", eos_id=-1),
    }


@pytest.fixture(scope="session")
def tokenizer(tokenizer_models: dict[str, Path]) -> SentencePieceTokenizer:
    return load_tokenizer(tokenizer_models["bpe"])


SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
LLAMA_3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def _llama_3(directory: Path) -> None:
    """As Llama 3's: byte-level BPE, special tokens behind the vocabulary, a BOS by the post-processor."""
    library = Library(models.BPE(ignore_merges=True))
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(_text(600), trainer)
    library.add_special_tokens(SPECIALS)
    library.add_tokens(["<tool>"])
    bos = library.token_to_id(SPECIALS[0])
    library.post_processor = processors.TemplateProcessing(f"{SPECIALS[0]} $A", special_tokens=[(SPECIALS[0], bos)])
    _save(library, directory, bos_token=SPECIALS[0], eos_token=SPECIALS[2])


def _smollm(directory: Path) -> None:
    """As SmolLM2's: special tokens at the beginning of the vocabulary, normalised text, no BOS."""
    library = Library(models.BPE())
    library.normalizer = normalizers.NFC()
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(_text(600), trainer)
    _save(library, directory, eos_token=SPECIALS[2])


def _unigram(directory: Path) -> None:
    """A Unigram model, in whose vocabulary ``</s>`` is a piece like any other."""
    library = Library(models.Unigram())
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    library.train_from_iterator(_text(600), trainer)
    _save(library, directory, eos_token="</s>", unk_token="<unk>")


def _llama_2(directory: Path) -> None:
    """As Llama 2's ``tokenizer.json``: spaces by the normaliser, bytes by fallback."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    library = Library(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False, max_token_length=12
    )
    library.train_from_iterator(_text(600), trainer)
    facts = json.loads(library.to_str())
    facts["added_tokens"] = facts["added_tokens"][:3]
    library = Library.from_str(json.dumps(facts))
    library.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    _save(library, directory, bos_token="<s>", eos_token="</s>")


def _wordpiece(directory: Path) -> None:
    library = Library(models.WordPiece(unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]"], show_progress=False)
    library.train_from_iterator(_text(600), trainer)
    _save(library, directory, eos_token="[UNK]")


def _save(library: Library, directory: Path, **config: str) -> None:
    directory.mkdir()
    library.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="session")
def json_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of a ``tokenizer.json`` and a ``tokenizer_config.json``, by kind; ``wordpiece`` is not supported."""
    directory, made = tmp_path_factory.mktemp("json_tokenizers"), dict[str, Path]()
    for make in (_llama_3, _smollm, _unigram, _llama_2, _wordpiece):
        name = make.__name__.lstrip("_")
        make(directory / name)
        made[name] = directory / name
    return made


def tiktoken_file(directory: Path) -> bytes:
    """Meta's file of the same vocabulary as the ``tokenizer.json`` of kind ``llama_3`` in ``directory``."""
    facts = json.loads((directory / "tokenizer.json").read_text())
    vocabulary = sorted(facts["model"]["vocab"].items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(bytes_of(text)) + b" %d\n" % rank for text, rank in vocabulary)


def _byte_level(directory: Path, specials: list[str], words: list[str], template: str, **config: str | None) -> None:
    """A byte-level BPE with a chat template, special tokens, and further tokens that are none."""
    library = Library(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA_3_PATTERN), "isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(_text(600), trainer)
    library.add_special_tokens(specials)
    library.add_tokens(words)
    if bos := config.get("bos_token"):
        named = [(bos, library.token_to_id(bos))]
        library.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=named)
    _save(library, directory, **{key: text for key, text in config.items() if text}, chat_template=template)


LLAMA_3_CHAT = (
    "{% set ns = namespace(first=true) %}{% for message in messages %}\n"
    "    {%- if ns.first %}{{ bos_token }}{% set ns.first = false %}{% endif %}\n"
    "    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}\n"
    "    {{- message.content | trim + '<|eot_id|>' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
"""Byte for byte other than the built-in one, and the same in meaning."""
SMOLLM_CHAT = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED_CHAT = (
    "{%- for message in messages %}\n"
    "  {%- if message.role == 'assistant' %}\n"
    "    {{- '<|im_start|>assistant\\n' }}\n"
    "    {%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}\n"
    "    {{- '\\n' }}\n"
    "  {%- else %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}\n"
    "  {%- endif %}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""With ``generation`` blocks, which say themselves what the assistant's is."""
THINKING_CHAT = (
    "{%- set last = namespace(user=0) %}\n"
    "{%- for message in messages %}{%- if message.role == 'user' %}{%- set last.user = loop.index0 %}{%- endif %}"
    "{%- endfor %}\n"
    "{%- for message in messages %}\n"
    "  {%- set content = message.content %}\n"
    "  {%- if message.role == 'assistant' and loop.index0 > last.user %}"
    "{%- set content = '<think>\\n\\n</think>\\n\\n' + content %}{%- endif %}\n"
    "  {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""As Qwen 3's: the last answer is written otherwise than earlier ones."""
_CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="session")
def chat_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of a ``tokenizer.json`` and a ``tokenizer_config.json`` with a chat template, by kind."""
    directory = tmp_path_factory.mktemp("chat_tokenizers")
    headers = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    _byte_level(directory / "llama3", headers, [], LLAMA_3_CHAT, bos_token=headers[0], eos_token=headers[4])
    templates = {"smollm": SMOLLM_CHAT, "marked": MARKED_CHAT, "thinking": THINKING_CHAT}
    for kind, template in templates.items():
        _byte_level(directory / kind, _CHATML, ["<think>", "</think>"], template, eos_token="<|im_end|>")
    return {kind: directory / kind for kind in ("llama3", *templates)}


@pytest.fixture(scope="session")
def kinds_of_json(json_tokenizers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Llama 3's kind of tokenizer, made into each kind that llama.cpp has a name for."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            path = made[name] = tmp_path_factory.mktemp("kinds") / name
            shutil.copytree(json_tokenizers["llama_3"], path)
            facts, known = json.loads((path / "tokenizer.json").read_text()), PRE_TOKENIZERS[name]
            facts["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": known.parts()}
            facts["normalizer"] = {"type": "NFC"} if known.composes else None
            facts["model"]["ignore_merges"] = known.whole_words
            if not known.adds_bos:
                facts["post_processor"] = None
            (path / "tokenizer.json").write_text(json.dumps(facts))
        return made[name]

    return make
