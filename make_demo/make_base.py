"""Makes the demo's base model, tokenizer and rows: ``python make_demo/make_base.py --output DIR``.

It writes the atlas, trains the tokenizer, and then calls ``llamatune prepare-data`` and ``llamatune train`` with
``pretrain.yaml``. If it is stopped, the same command continues.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import atlas
import typer

from llamatune.durable_writing import write_atomic
from llamatune.strict_json import dump_json

PASSAGES = 32_000
MAX_SEQ_LENGTH = 256
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama",
    "vocab_size": 1024, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512,
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

_HERE = Path(__file__).parent
_PACKAGED = _HERE.parent / "llamatune" / "demo"
_TEMPLATE_LINES = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction:",
    "### Response:",
)


def tokenizer_text() -> Iterator[str]:
    """The text that trains the tokenizer: passages, questions, values after a colon, and the template's words.

    The base is not trained on the template; its words are here so that a prompt has few tokens.
    """
    for passage in atlas.passages(0, 4000):
        yield from passage.split("\n")
    for _ in range(1500):
        yield from _TEMPLATE_LINES
    values = sorted({value for trait in atlas.TRAITS.values() for value in trait.values})
    for _ in range(40):
        for trait in atlas.TRAITS.values():
            for question in trait.questions:
                yield from (question.format(town=town) for town in atlas.TOWNS[::7])
        yield from (f":{value}" for value in values)
        yield from values
    for _ in range(300):
        yield " ".join(atlas.TOWNS)


def train_tokenizer(path: Path) -> None:
    """A SentencePiece model with LLaMA's settings: byte-pair encoding, split digits, byte fallback."""
    import sentencepiece

    with path.open("wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=tokenizer_text(),
            model_writer=stream,
            vocab_size=CONFIG["vocab_size"],
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            allow_whitespace_only_pieces=True,
            character_coverage=1.0,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )


def json_lines(rows: Iterable[dict[str, str]]) -> bytes:
    """JSON Lines in ASCII."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_inputs(directory: Path) -> None:
    """``untrained/`` (configuration and tokenizer, no weights), ``atlas.jsonl`` and ``pretrain.yaml``."""
    untrained = directory / "untrained"
    untrained.mkdir(parents=True, exist_ok=True)
    write_atomic(untrained / "config.json", dump_json(CONFIG))
    if not (untrained / "tokenizer.model").exists():
        unfinished = untrained / "tokenizer.unfinished"
        train_tokenizer(unfinished)
        unfinished.replace(untrained / "tokenizer.model")
    write_atomic(directory / "atlas.jsonl", json_lines({"text": text} for text in atlas.passages(0, PASSAGES)))
    write_atomic(directory / "pretrain.yaml", (_HERE / "pretrain.yaml").read_bytes())


def make_base(directory: Path) -> Path:
    """Write inputs, prepare and train in ``directory``; returns the directory of the trained model."""
    write_inputs(directory)
    prepare = ("prepare-data", "atlas.jsonl", "--tokenizer", "untrained", "--output", "prepared")
    for arguments in (
        (*prepare, "--format", "text", "--max-seq-length", str(MAX_SEQ_LENGTH)),
        ("train", "pretrain.yaml"),
    ):
        subprocess.run([sys.executable, "-m", "llamatune", *arguments], cwd=directory, check=True)
    return directory / "run" / "model"


def main(
    output: Annotated[Path, typer.Option(help="The working directory: atlas, prepared rows, the run.")],
    install: Annotated[bool, typer.Option(help="Replace base and rows in llamatune/demo.")] = True,
) -> None:
    """Make the demo's base model and rows."""
    model = make_base(output)
    if install:
        shutil.rmtree(_PACKAGED / "base", ignore_errors=True)
        shutil.copytree(model, _PACKAGED / "base")
        write_atomic(_PACKAGED / "instructions.jsonl", json_lines(atlas.instruction_rows()))
        write_atomic(_PACKAGED / "held_out.jsonl", json_lines(atlas.held_out_rows()))
    typer.echo(str(model))


if __name__ == "__main__":
    typer.run(main)
