"""``generate --from-data``: seeded rows from inside and outside the training set, asked as they were prepared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamatune.command_options.generation import parse_rows
from llamatune.command_options.preparation import PrepareOptions
from llamatune.data.prepare import prepare_data
from llamatune.data.row_formats import FORMATS, prompt_row_of
from llamatune.data.template_choice import stored_template
from llamatune.errors import DataError, SpecError, Stopped
from llamatune.formats.prepared import SplitFile, read_prepared_manifest, split_path
from llamatune.inference import engine
from llamatune.inference.prepared_prompts import PreparedPrompt, PreparedRows, draw_prompts
from llamatune.inference.prompt_encoding import PromptEncoder
from llamatune.spec import build_spec
from llamatune.tokenizers.loading import load_tokenizer
from llamatune.training.train import train

Command = Callable[..., Any]


def drawn(directory: Path, counts: Any = None, seed: int = 0, tokenizer: Path | None = None) -> list[PreparedPrompt]:
    assert tokenizer is not None
    manifest = read_prepared_manifest(directory)
    return draw_prompts(PreparedRows(directory, counts), manifest, seed, load_tokenizer(tokenizer))


# End to end, on real weights and rows.


@pytest.fixture(scope="module")
def stories(shared_fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with 60 Alpaca rows (``rows.json``), prepared (``data``), and an adapter trained on them a little."""
    place = tmp_path_factory.mktemp("stories")
    base = shared_fixtures / "stories260K-hf"
    rows = json.loads((shared_fixtures / "data" / "alpaca_data_200.json").read_text())[:60]
    (place / "rows.json").write_text(json.dumps(rows))
    how = {"validation_fraction": 0.2, "max_seq_length": 256, "overlong": "drop"}
    prepare_data(PrepareOptions([place / "rows.json"], base, place / "data", **how))
    spec = {
        "model": {"path": str(base)},
        "lora": {"r": 8, "alpha": 16, "target_modules": "all-linear", "dropout": 0},
        "data": {"train": str(place / "data")},
        "training": {
            "output_dir": str(place / "run"), "max_steps": 6, "micro_batch_size": 4, "learning_rate": 1e-2,
            "gradient_accumulation_steps": 1, "precision": "fp32", "device": "cpu",
        },
    }  # fmt: skip
    train(build_spec(spec, "test"))
    return place


@pytest.fixture
def words(stories: Path, shared_fixtures: Path) -> list[object]:
    base, adapter = shared_fixtures / "stories260K-hf", stories / "run" / "adapter"
    return ["generate", "--model", base, "--adapter", adapter, "--temperature", 0, "--max-new-tokens", 16]


def test_rows_of_both_splits_are_asked_of_base_and_tuned_model(
    command: Command, stories: Path, words: list[object], tmp_path: Path
) -> None:
    """What each says is what it says to the same row of the file, alone."""
    output, page = tmp_path / "out.jsonl", tmp_path / "out.md"
    given = [*words, "--compare", "--from-data", stories / "data", "--rows", "validation:3,train:5", "--output", output]
    done = command(*given, "--markdown", page, "--json")
    assert done.code == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    assert [json.loads(line) for line in output.read_bytes().splitlines()] == results
    assert [result["split"] for result in results] == ["train"] * 5 + ["validation"] * 3
    rows = json.loads((stories / "rows.json").read_text())
    for split in ("train", "validation"):
        own = {result["row"] for result in results if result["split"] == split}
        assert own <= set(SplitFile(split_path(stories / "data", split)).column("source_rows"))
    asked = [rows[result["row"] - 1] for result in results]
    assert [result["reference"] for result in results] == [row["output"] for row in asked]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    alone = ["--prompt-file", tmp_path / "asked.jsonl", "--json"]
    tuned = json.loads(command(*words, *alone).stdout)["results"]
    bare = words[:3] + words[5:]
    base = json.loads(command(*bare, *alone, "--template", "alpaca").stdout)["results"]
    for result, of_tuned, of_base in zip(results, tuned, base, strict=True):
        assert result["prompt"] == of_tuned["prompt"] == of_base["prompt"]
        assert result["completion_ids"] == of_tuned["completion_ids"]
        assert result["completion"] == of_tuned["completion"]
        assert result["base_completion"] == of_base["completion"]
    assert any(result["completion"] != result["base_completion"] for result in results)

    text = page.read_text(encoding="utf-8")
    numbers = [f"### Row {result['row']}" for result in results]
    headings = ["# Answers", "## Inside the training set", *numbers[:5], "## Outside the training set", *numbers[5:]]
    assert [line for line in text.splitlines() if line in headings] == headings
    assert text.count("| reference | base | tuned |") == 8

    content = output.read_bytes()  # killed, and continued
    output.write_bytes(content[: content.index(b"\n") + 40])
    refused = command(*given, "--markdown", page)
    assert (refused.code, page.read_text(encoding="utf-8")) == (5, text), "a page that exists is left alone"
    page.unlink()
    again = command(*given, "--markdown", page)
    assert (again.code, output.read_bytes(), page.read_text(encoding="utf-8")) == (0, content, text)
    assert "holds 1 of 8 answers already" in again.stderr


def test_human_output_has_the_headings_and_the_references(command: Command, stories: Path, words: list[object]) -> None:
    given = [*words, "--from-data", stories / "data", "--rows", "train:2,validation:1"]
    done = command(*given)
    parts = done.stdout.partition("Outside the training set")
    assert done.stdout.startswith("Inside the training set\n")
    assert (parts[0].count("\n> "), parts[2].count("\n> ")) == (2, 1)
    assert (parts[0].count("\nreference: "), parts[2].count("\nreference: ")) == (2, 1)
    assert (parts[0].count("\n=====\n"), parts[2].count("=====")) == (1, 0)
    compared = command(*given, "--compare").stdout
    assert compared.index("Inside the training set") < compared.index("reference") < compared.index("Outside the")
    assert "tuned" in compared


def test_a_signal_keeps_what_is_answered(
    command: Command, stories: Path, words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(self: Any) -> Any:
        raise Stopped("stopped while generating")

    monkeypatch.setattr(engine.Engine, "step", stopped)
    given = [*words, "--from-data", stories / "data", "--rows", "train:9"]
    assert command(*given, "--output", tmp_path / "out.jsonl", "--markdown", tmp_path / "out.md").code == 75
    assert not (tmp_path / "out.md").exists()
    assert command(*given).code == 130


# Which rows.


@pytest.fixture(scope="module")
def data(prepared: Callable[..., Path]) -> Path:
    return prepared(validation_fraction=0.3, seed=4)


def test_what_is_drawn_is_a_function_of_seed_split_and_row_alone(data: Path, tiny_tokenizer: Path) -> None:
    def rows(counts: Any, seed: int = 0) -> list[tuple[str, int]]:
        return [(prompt.split, prompt.row) for prompt in drawn(data, counts, seed, tiny_tokenizer)]

    assert rows({"train": 3, "validation": 2}) == rows({"validation": 2, "train": 3})
    assert rows({"train": 7})[:3] == rows({"train": 3}) == rows({"train": 3, "validation": 2})[:3]
    assert rows({"train": 5}, 1) != rows({"train": 5}, 2)
    assert [split for split, _ in rows(None)] == ["train"] * 4 + ["validation"] * 4
    count = len(SplitFile(split_path(data, "train")))
    everything = [row for _, row in rows({"train": count})]
    assert sorted(everything) == sorted(SplitFile(split_path(data, "train")).column("source_rows"))
    assert everything != sorted(everything)


def test_copies_of_a_row_are_drawn_once(tiny_rows: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    options = PrepareOptions([f"{tiny_rows}:2"], tiny_tokenizer, tmp_path / "data", max_seq_length=48, skip_bad_rows=99)  # type: ignore[list-item]
    prepare_data(options)
    numbers = SplitFile(split_path(tmp_path / "data", "train")).column("source_rows")
    unique = len(set(numbers))
    assert len(numbers) == 2 * unique
    found = drawn(tmp_path / "data", {"train": unique}, 0, tiny_tokenizer)
    assert len({prompt.row for prompt in found}) == unique
    with pytest.raises(SpecError, match=f"it has {unique} train rows with a prompt, and --rows asks for {unique + 1}"):
        drawn(tmp_path / "data", {"train": unique + 1}, 0, tiny_tokenizer)


def test_rows_that_are_not_there_are_told_in_plain_words(
    command: Command, prepared: Callable[..., Path], small_base: Path, tmp_path: Path
) -> None:
    base, data = small_base, prepared()
    words = ("generate", "--model", base, "--max-new-tokens", 2, "--device", "cpu", "--from-data")

    def refused(code: int, told: str, *more: object) -> None:
        done = command(*words, *more)
        assert (done.code, done.stdout) == (code, "")
        assert done.stderr.splitlines()[-1].startswith(f"error: {told}"), done.stderr
        assert "Traceback" not in done.stderr

    refused(2, "it has no validation rows with a prompt, and --rows asks for 4", data, "--rows", "validation:4")
    refused(2, "it has 23 train rows with a prompt, and --rows asks for 24", data, "--rows", "train:24")
    refused(3, "no such directory", tmp_path / "absent")
    refused(3, "not a prepared directory", base)
    refused(2, "--from-data and --template exclude each other", data, "--template", "none")
    refused(2, "--from-data and --prompt exclude each other", data, "--prompt", "a")
    refused(2, "it needs --prompt-file: --format", data, "--format", "text")
    with_prompts = prepared(train_on_prompt=True)
    refused(3, "its rows have no prompt apart from what is trained", with_prompts)
    (tmp_path / "texts.jsonl").write_text('{"text": "a red llama walks"}\n' * 3)
    texts = prepared(tmp_path / "texts.jsonl")
    refused(3, "its rows have no prompt apart from what is trained", texts)
    lonely = command("generate", "--model", base, "--rows", "train:1", "--prompt", "a")
    assert (lonely.code, lonely.stderr) == (2, "error: it needs --from-data: --rows\n")
    for text in ("", "train", "train:0", "train:-1", "train:1,train:2", "test:3", "train:1;validation:2", "train:1,"):
        with pytest.raises(SpecError, match="give each split once"):
            parse_rows(text, "--rows")


def test_rows_of_another_tokenizer_are_refused_as_by_train(
    command: Command, prepared: Callable[..., Path], small_base: Path, tokenizer_models: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a red", "completion": "llama"}\n' * 2)
    data = prepared(tmp_path / "rows.jsonl", tokenizer_models["bpe"])
    refused = command("generate", "--model", small_base, "--max-new-tokens", 2, "--from-data", data)
    assert refused.code == 4
    assert "the data was prepared with another tokenizer than the model's" in refused.stderr
    assert "--force-base" in refused.stderr


def test_a_token_that_the_tokenizer_has_not_is_told_with_its_row(
    prepared: Callable[..., Path], tiny_tokenizer: Path, tmp_path: Path
) -> None:
    shutil.copytree(prepared(), tmp_path / "data")
    file = split_path(tmp_path / "data", "train")
    content, split = bytearray(file.read_bytes()), SplitFile(file)
    ids = split.column("input_ids").tobytes()
    begin = content.index(ids)
    content[begin : begin + len(ids)] = (400).to_bytes(4, "little") * (len(ids) // 4)
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"row \d+ holds a token that the tokenizer has not"):
        drawn(tmp_path / "data", None, 0, tiny_tokenizer)


# What is asked: the ids, the text and the answer of each row are those of the row in its template.


def _chats(tools: bool = False) -> list[dict[str, Any]]:
    said = ["a red llama", "walks over", "green hills and", "counts nine", "blue apples", "while rain falls"]
    rows = []
    for turns in (1, 2, 3):
        texts = [said[(turns + place) % 6] for place in range(2 * turns)]
        roles = ("user", "assistant")
        messages = [{"role": roles[place % 2], "content": text} for place, text in enumerate(texts)]
        rows.append({"messages": [{"role": "system", "content": "be brief"}, *messages] if turns == 2 else messages})
    return rows


@pytest.mark.parametrize("kind", ["llama3", "llama2-chat", "chatml"])
def test_of_a_chat_the_last_answer_is_asked_for(
    chat_tokenizers: dict[str, Path], tokenizer_models: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    path, template = (chat_tokenizers["llama3"], "model") if kind == "llama3" else (tmp_path / "tokenizer", kind)
    if kind != "llama3":
        path.mkdir()
        shutil.copy(tokenizer_models["bpe"], path / "tokenizer.model")
        (path / "added_tokens.json").write_text('{"<|im_start|>": 512, "<|im_end|>": 513}')
    rows = _chats()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare_data(PrepareOptions([tmp_path / "rows.jsonl"], path, tmp_path / "data", template=template))
    tokenizer, manifest = load_tokenizer(path), read_prepared_manifest(tmp_path / "data")
    assert manifest.template is not None
    encoder = PromptEncoder(tokenizer, stored_template(manifest.template))
    found = drawn(tmp_path / "data", {"train": 3}, 0, path)
    assert sorted(prompt.row for prompt in found) == [1, 2, 3]
    for prompt in found:
        messages = rows[prompt.row - 1]["messages"]
        asked = prompt_row_of({"messages": messages[:-1]}, FORMATS["chat"])
        segments = encoder.segments(asked, 1)
        assert list(prompt.segments.known or ()) == segments.encode(tokenizer)[0]
        # SentencePiece's dummy prefix after a special token is a space to a decoder.
        assert prompt.segments.shown.replace("> ", ">") == segments.shown.replace("> ", ">")
        assert prompt.reference.strip() == messages[-1]["content"]


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
def test_prompts_and_answers_of_other_rows_are_theirs(
    chat_tokenizers: dict[str, Path], tokenizer_models: dict[str, Path], tiny_rows: Path, tmp_path: Path, kind: str
) -> None:
    path = tokenizer_models["bpe"] if kind == "sentencepiece" else chat_tokenizers["llama3"]
    options = PrepareOptions([tiny_rows], path, tmp_path / "data", max_seq_length=400, skip_bad_rows=9)
    prepare_data(options)
    rows = [json.loads(line) for line in tiny_rows.read_text().splitlines()]
    tokenizer = load_tokenizer(path)
    found = drawn(tmp_path / "data", {"train": 27}, 0, path)
    assert len(found) == 27
    for prompt in found:
        row = rows[prompt.row - 1]
        assert (prompt.segments.shown, prompt.reference) == (row["prompt"], row["completion"])
        assert list(prompt.segments.known or ()) == tokenizer.encode(row["prompt"])
        line = prompt.labelled({"completion": "x"})
        assert line == {"split": "train", "row": prompt.row, "completion": "x", "reference": row["completion"]}
