"""Every product and input that a verb reads, made once and tiny: what the fuzzer damages.

All lies below one directory, and is named relative to it: a copy of the directory works as well as the original.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import importlib
import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import yaml
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from llamatune.benchmarking import cell_runs
from llamatune.benchmarking.cell_process import CellTask, answer
from llamatune.cli import main
from llamatune.tokenizers.byte_level import bytes_of
from llamatune.tokenizers.gguf_pre_tokenizers import LLAMA_3

_WORDS = """
a red llama walks over green hills and counts nine blue apples while cold rain falls on seven old stones
""".split()  # noqa: SIM905
_CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def _sentence(chance: random.Random, words: int) -> str:
    return " ".join(chance.choice(_WORDS) for _ in range(words))


def run(*words: str) -> None:
    """A command line that must succeed, in this process and in the current directory."""
    try:
        main(list(words))
    except SystemExit as end:
        if end.code:
            raise AssertionError(f"{' '.join(words)}: exit {end.code}") from None


def build_materials() -> None:
    """Make everything in the current directory, which is empty."""
    torch.manual_seed(1)
    _models()
    _rows()
    _products()
    _runs()
    _answers()


def _model(directory: Path, vocabulary: int, model_type: str = "llama", **more: Any) -> None:
    """A random model in Hugging Face's format, without a manifest, as one from elsewhere."""
    from llamatune.checkpoints.huggingface_weights import write_huggingface
    from llamatune.events import ignore_event
    from llamatune.formats.manifest import Staging
    from llamatune.shapes.llama_config import LlamaConfig

    shape = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=vocabulary, max_position_embeddings=128,
    )  # fmt: skip
    directory.mkdir()
    generator = torch.Generator().manual_seed(2)
    weights = {name: torch.randn(size, generator=generator) * 0.15 for name, size in shape.parameter_shapes()}
    write_huggingface(
        Staging(directory), shape, weights.__getitem__, lambda name: torch.float32, directory, ignore_event
    )
    config = json.loads((directory / "config.json").read_text()) | {"bos_token_id": 1, "eos_token_id": 2} | more
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    stated = {"bos_token_id": config["bos_token_id"], "eos_token_id": [config["eos_token_id"]], "temperature": 0.6}
    (directory / "generation_config.json").write_text(json.dumps(stated))


def _models() -> None:
    chance = random.Random(3)
    sentences = [_sentence(chance, 8) for _ in range(300)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_prefix="pieces", vocab_size=90, model_type="bpe",
        character_coverage=1.0, hard_vocab_limit=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    _model(Path("hf"), 132)
    shutil.copy("pieces.model", "hf/tokenizer.model")
    run("convert", "--model", "hf", "--output", "sharded", "--shards", "2")
    run("convert", "--model", "hf", "--output", "meta", "--format", "meta", "--shards", "2")
    run("convert", "--model", "hf", "--output", "model.gguf")
    for converted in ("sharded", "meta"):
        (Path(converted) / "llamatune.json").unlink()  # now they are from elsewhere
    _archive("hf", "bin", "model.safetensors", "pytorch_model.bin")
    _json_tokenizer(sentences)


def _archive(source: str, directory: str, name: str, archive: str) -> None:
    """A copy of ``source`` with its tensors in torch's own format."""
    from safetensors.torch import load_file

    shutil.copytree(source, directory)
    torch.save(load_file(f"{directory}/{name}"), f"{directory}/{archive}")
    Path(directory, name).unlink()


def _json_tokenizer(sentences: list[str]) -> None:
    """A model with every file of a ``tokenizer.json`` and its chat template, and one with a tiktoken file."""
    library = Library(models.BPE(ignore_merges=True))
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3), "isolated"),  # llama.cpp has a name for it
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=[], initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(sentences, trainer)
    vocabulary = sorted(json.loads(library.to_str())["model"]["vocab"].items(), key=lambda item: item[1])
    library.add_special_tokens(_CHATML)
    library.add_tokens(["<think>"])
    eos = library.token_to_id("<|im_end|>")
    hub = Path("hub")
    _model(hub, 340, eos_token_id=eos, bos_token_id=library.token_to_id("<|endoftext|>"))
    library.save(str(hub / "tokenizer.json"))
    named = {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    added = {str(library.token_to_id(text)): {"content": text, "special": True} for text in _CHATML}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **named, "added_tokens_decoder": added,
              "model_max_length": 128, "add_bos_token": False}  # fmt: skip
    (hub / "tokenizer_config.json").write_text(json.dumps(config))
    (hub / "special_tokens_map.json").write_text(json.dumps({**named, "additional_special_tokens": _CHATML}))
    (hub / "added_tokens.json").write_text(json.dumps({"<think>": library.token_to_id("<think>")}))
    (hub / "chat_template.jinja").write_text(_CHAT_TEMPLATE)
    _model(Path("wide"), 640)
    run("convert", "--model", "wide", "--output", "tiktoken", "--format", "meta")
    shutil.rmtree("wide")
    (Path("tiktoken") / "llamatune.json").unlink()
    encoded = importlib.import_module("base64").b64encode
    ranks = b"".join(encoded(bytes_of(text)) + b" %d\n" % rank for text, rank in vocabulary)
    (Path("tiktoken") / "tokenizer.model").write_bytes(ranks)


def _choices() -> dict[str, bytes]:
    """Multiple-choice rows of each shape."""
    four = ["a red llama", "nine blue apples", "cold rain", "old stones"]
    asked = {
        "mmlu": {"question": "what walks?", "subject": "old_hills", "choices": four, "answer": 1},
        "hellaswag": {"activity_label": "Walking", "ctx_a": "a llama", "ctx_b": "walks", "endings": four, "label": "2"},
        "arc": {"question": "what falls?", "choices": {"text": four, "label": list("ABCD")}, "answerKey": "C"},
    }
    return {f"{name}.jsonl": 2 * (json.dumps(row) + "\n").encode() for name, row in asked.items()}


def _rows() -> None:
    folder, chance = Path("rows"), random.Random(8)
    folder.mkdir()
    alpaca = [
        {"instruction": f"{_sentence(chance, 4)}.", "input": _sentence(chance, number % 3),
         "output": f'"{number}", é {_sentence(chance, 5)}\nand {number + 1}.'}
        for number in range(9)
    ]  # fmt: skip
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in alpaca).encode()
    questions = [
        {"question": _sentence(chance, 5) + "?", "answer": f"{_sentence(chance, 3)} <<2+{n}={n + 2}>>\n#### {n + 2}"}
        for n in range(4)
    ]
    chats = [
        {"messages": [{"role": "system", "content": "You count."}, {"role": "user", "content": _sentence(chance, 4)},
                      {"role": "assistant", "content": _sentence(chance, 3)}]}
        for _ in range(5)
    ]  # fmt: skip
    out = io.StringIO()
    writer = csv.DictWriter(out, list(alpaca[0]))
    writer.writeheader()
    writer.writerows(alpaca)
    files = {
        "alpaca.jsonl": lines, "alpaca.json": json.dumps(alpaca).encode(), "alpaca.csv": out.getvalue().encode(),
        "alpaca.jsonl.gz": gzip.compress(lines, mtime=0), "alpaca.jsonl.zst": _zstd(lines),
        **_choices(),
        "gsm8k.jsonl": "".join(json.dumps(row) + "\n" for row in questions).encode(),
        "chat.jsonl": "".join(json.dumps(row) + "\n" for row in chats).encode(),
        "text.txt": "\n\n".join(_sentence(chance, 12) for _ in range(5)).encode(),
        "prompts.txt": "\n".join(_sentence(chance, 3) for _ in range(3)).encode(),
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_bytes(content)
    _columnar(folder, alpaca)
    template = {"prompt": "Do: {instruction}\n{input}\nDone:", "prompt_without_input": "Do: {instruction}\nDone:"}
    Path("template.yaml").write_text(yaml.safe_dump(template))
    Path("chat.jinja").write_text(_CHAT_TEMPLATE)


def _zstd(content: bytes) -> bytes:
    try:
        packed = importlib.import_module("compression.zstd")
    except ImportError:
        packed = importlib.import_module("backports.zstd")
    return bytes(packed.compress(content))


def _columnar(folder: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    made = pyarrow.Table.from_pylist(rows)
    parquet.write_table(made, folder / "alpaca.parquet")
    saved = folder / "saved"
    saved.mkdir()
    for path, opened in ((folder / "alpaca.arrow", pyarrow.ipc.new_file), (saved / "a.arrow", pyarrow.ipc.new_stream)):
        with opened(str(path), made.schema) as writer:
            writer.write_table(made, max_chunksize=4)
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a.arrow"}], "_split": None}))
    (saved / "dataset_info.json").write_text("{}")


def _products() -> None:
    prepare = ("prepare-data", "--max-seq-length", "48", "--seed", "3")
    run(*prepare, "rows/alpaca.jsonl", "--tokenizer", "hf", "--validation-fraction", "0.3", "--output", "prepared",
        "--template", "completion", "--map", "prompt=instruction,completion=output")  # fmt: skip
    run(*prepare, "rows/chat.jsonl", "--tokenizer", "hub", "--template", "model", "--output", "chats")


def _spec(output: str, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "model": {"path": "hf", "dtype": "float32"},
        "lora": {"r": 2, "alpha": 4, "dropout": 0.1},
        "data": {"train": "prepared"},
        "training": {
            "output_dir": output, "micro_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2,
            "learning_rate": 0.01, "precision": "fp32", "device": "cpu", "save_every_steps": 1,
        },
        "evaluation": {"every_steps": 1},
    }  # fmt: skip
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            values[section][key] = value
        else:
            del values[section]
    return values


def _runs() -> None:
    specs = {
        "run": _spec("run", training__log_layer_grad_norms=True, evaluation__prompts=1),
        "full": _spec("full", lora=None, training__precision="fp16", evaluation__every_steps=2),
        "nf4": _spec("nf4", model__dtype="nf4", model__quantized_cache="cache"),
    }
    for name, values in specs.items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump(values))
        run("train", f"{name}.yaml")
    run("train", "run.yaml", "training.output_dir=second", "training.seed=9")
    Path("second/adapter").rename("other")  # which no model holds yet
    shutil.rmtree("second")
    shutil.copytree("run", "begun")  # stopped after its last checkpoint: the next start writes the end
    (Path("begun") / "summary.json").unlink()
    shutil.rmtree("begun/adapter")
    shutil.copytree("run/adapter", "peft")
    (Path("peft") / "llamatune.json").unlink()  # now it is from elsewhere
    _archive("peft", "peftbin", "adapter_model.safetensors", "adapter_model.bin")
    run("convert-adapter", "--adapter", "run/adapter", "--output", "mlx", "--format", "mlx", "--model", "hf")
    (Path("mlx") / "llamatune.json").unlink()
    run("merge-lora", "--model", "hf", "--adapter", "run/adapter", "--output", "merged")
    cell_runs.run_cell = _measured_here
    benchmark = ("benchmark", "run.yaml", "--grid", "training.micro_batch_size=1,2", "--steps", "2")
    run(*benchmark, "--output", "bench")


def _measured_here(task: CellTask, directory: Path, should_stop: object) -> dict[str, Any]:
    """A cell without a process of its own, which would import torch anew."""
    return answer(json.loads(json.dumps(task.request())))


def _answers() -> None:
    greedy = ("--temperature", "0", "--max-new-tokens", "2")
    tuned = ("--model", "hf", "--adapter", "run/adapter")
    run("generate", *tuned, *greedy, "--prompt-file", "rows/prompts.txt", "--output", "completions.jsonl", "--compare")
    gsm8k = ("evaluate", *tuned, "--task", "gsm8k", "--data", "rows/gsm8k.jsonl", "--max-new-tokens", "2")
    run(*gsm8k, "--output", "answers.jsonl")
    loss = ("evaluate", *tuned, "--data", "prepared", "--compare")
    for name, words in {"gsm8k.json": gsm8k, "loss.json": loss}.items():
        with Path(name).open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
            run(*words, "--json")
