"""The ids of a row begin with those that ``generate`` encodes for its prompt, and its text stays what it was."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from chat_tools import PARTS, encoded
from hard_texts import HARD_TEXTS
from prepared_rows import alpaca, read_split
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library
from trained_tokenizers import LLAMA_3_PATTERN, tiktoken_file

from llamatune.data.batches import open_prepared
from llamatune.data.chat_segments import ChatEncoder
from llamatune.data.chat_template import ChatTemplate
from llamatune.data.row_files import read_raw_rows
from llamatune.data.row_formats import FORMATS, row_of
from llamatune.data.row_json import decode_row
from llamatune.data.template_choice import load_template, stored_template
from llamatune.data.templates import BOUNDARY, TEMPLATES, Template
from llamatune.events import Event, Notice
from llamatune.inference.prompt_encoding import PromptEncoder, shown_answer
from llamatune.inference.prompt_files import read_prompts
from llamatune.strict_json import dump_json, read_json
from llamatune.tokenizers.loading import load_tokenizer
from llamatune.tokenizers.tokenizer import Tokenizer

Prepare = Callable[..., SimpleNamespace]
WriteRows = Callable[..., Path]
OWN = {
    "space": "prompt: 'Task: {instruction} {input} Answer: '",
    "tab": 'prompt: "{instruction}\\t"',
    "line": 'prompt: "{instruction}\\n{input}\\n### Response:\\n"',
    "lines": 'prompt: "{instruction}\\n\\n"\nprompt_without_input: "Do {instruction}\\n   \\n"',
    "bare": "prompt: '{instruction}{input}'\nbefore_completion: '-'",
}


@pytest.fixture(scope="module")
def joining(shared_fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer with a token ``:The``, as Llama 3's has it: trained on Alpaca's answers."""
    rows = json.loads((shared_fixtures / "data" / "alpaca_data_200.json").read_text())
    library = Library(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA_3_PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer, library.decoder = pre_tokenizers.Sequence([split, byte_level]), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator([f"### Response:{row['output']}" for row in rows], trainer)
    library.add_special_tokens(["<|end|>"])
    directory = tmp_path_factory.mktemp("joining")
    library.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    return directory


@pytest.fixture(scope="module")
def every_tokenizer(
    joining: Path,
    shared_fixtures: Path,
    json_tokenizers: dict[str, Path],
    tokenizer_models: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """Of each kind that is read."""
    tiktoken, added = (tmp_path_factory.mktemp(name) for name in ("tiktoken", "added"))
    (tiktoken / "tokenizer.model").write_bytes(tiktoken_file(json_tokenizers["llama_3"]))
    (added / "tokenizer.model").write_bytes(tokenizer_models["bpe"].read_bytes())
    (added / "added_tokens.json").write_text('{"<|im_end|>": 512, "Answer": 513, "tool": 514}')
    library = Library.from_file(str(json_tokenizers["llama_2"] / "tokenizer.json"))
    library.add_tokens([AddedToken(text, normalized=False) for text in ("tool", "Answer")])
    words = tmp_path_factory.mktemp("words")
    library.save(str(words / "tokenizer.json"))
    (words / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return {
        "words": words,
        "llama2": shared_fixtures / "data" / "llama2_tokenizer.model", "joining": joining, "tiktoken": tiktoken,
        "added": added, "unigram.model": tokenizer_models["unigram"],
        **{kind: json_tokenizers[kind] for kind in ("llama_3", "smollm", "unigram", "llama_2")},
    }  # fmt: skip


def compare(prepare: Prepare, tokenizer: Path, rows: Path, template: str, out: Path, **options: Any) -> SimpleNamespace:
    """Prepare ``rows``, and compare each with what ``generate`` encodes for it and with its text encoded as a whole."""
    report = prepare(rows, tokenizer=tokenizer, template=template, overwrite=True, **options)
    stored = open_prepared(out).manifest.template
    assert stored is not None
    own, made = load_tokenizer(tokenizer), stored_template(stored)
    assert isinstance(made, Template)
    assert made.boundary == BOUNDARY
    encoder, prompts, forced = PromptEncoder(own, made), read_prompts(rows), 0
    texts = [row_of(decode_row(raw), FORMATS[report.format]).completion for raw in read_raw_rows(rows)]
    for ids, mask, number in read_split(out):
        asked = encoder.segments(prompts[number - 1], number)
        prompt, _ = asked.encode(own)
        assert ids[: len(prompt)] == prompt, asked
        assert mask == [0] * len(prompt) + [1] * (len(ids) - len(prompt))
        text = asked.shown + made.completion_of(texts[number - 1])
        whole = own.encode(text)
        if ids[-1] == own.eos_id:
            assert own.decode(ids) == own.decode(whole)
            assert shown_answer(own, asked, prompt, ids[len(prompt) : -1]) == own.decode(whole)[len(asked.shown) :]
        forced += ids != [*whole, own.eos_id][: report.max_seq_length]
    assert report.prompts_not_prefix == 0
    assert report.forced_boundaries == forced
    assert report.moved_spaces == (report.kept if template.endswith(("space.yaml", "tab.yaml")) else 0)
    return report


def own_template(directory: Path, name: str) -> str:
    if name not in OWN:
        return name
    (directory / f"{name}.yaml").write_text(OWN[name])
    return str(directory / f"{name}.yaml")


@pytest.mark.parametrize("kind", ["llama2", "joining"])
def test_rows_begin_with_the_ids_that_generate_encodes(
    prepare: Prepare, every_tokenizer: dict[str, Path], shared_fixtures: Path, tmp_path: Path, kind: str
) -> None:
    """Alpaca's answers follow a colon at once: LLaMA 2 has pieces such as ``:-``, a byte-level vocabulary ``:The``."""
    rows, tokenizer = shared_fixtures / "data" / "alpaca_data_200.json", every_tokenizer[kind]
    found = {}
    for name in ("alpaca", "space", "line"):
        template = own_template(tmp_path, name)
        found[name] = compare(prepare, tokenizer, rows, template, tmp_path / "out").forced_boundaries
    assert found["alpaca"] == 9 if kind == "llama2" else found["alpaca"] > 20
    assert found["space"] == found["line"] == 0
    questions = shared_fixtures / "data" / "gsm8k_test.jsonl"
    compare(prepare, tokenizer, questions, "gsm8k", tmp_path / "out", limit=300)
    report = compare(prepare, tokenizer, rows, own_template(tmp_path, "space"), tmp_path / "out", max_seq_length=40)
    assert report.truncated > 20


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama2", "joining", "tiktoken", "added", "llama_3", "smollm", "llama_2"])
def test_all_rows_with_every_tokenizer_and_template(
    prepare: Prepare, every_tokenizer: dict[str, Path], shared_fixtures: Path, tmp_path: Path, kind: str
) -> None:
    for name in ("alpaca", *OWN):
        rows = shared_fixtures / "data" / "alpaca_data_200.json"
        compare(prepare, every_tokenizer[kind], rows, own_template(tmp_path, name), tmp_path / "out")
    for rows in ("gsm8k_test.jsonl", "gsm8k_train.jsonl"):
        compare(prepare, every_tokenizer[kind], shared_fixtures / "data" / rows, "gsm8k", tmp_path / "out")


def test_two_parts_of_any_text_are_decoded_to_it(every_tokenizer: dict[str, Path]) -> None:
    texts, chance = [*PARTS, *HARD_TEXTS, "Answer", "tool", " tool ", "<|im_end|>", " \t "], random.Random(4)
    for kind, path in every_tokenizer.items():
        tokenizer, others = load_tokenizer(path), 0
        assert tokenizer.splits == (kind != "words"), "of which some texts cannot be divided"
        for _ in range(250):
            prompt, rest = ("".join(chance.choices(texts, k=chance.randint(0, 4))) for _ in range(2))
            ids, first = tokenizer.encode_apart(prompt, rest)
            whole = tokenizer.encode(prompt + rest)
            assert ids[:first] == tokenizer.encode(prompt) or kind == "words", (kind, prompt, rest)
            assert tokenizer.decode(ids) == tokenizer.decode(whole), (kind, prompt, rest)
            others += ids != whole
        assert others, kind


def test_a_prompt_of_a_row_may_end_in_white_space(
    prepare: Prepare, write_rows: WriteRows, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Of every kind but line breaks; one of white space alone stays as it is."""
    prompts = ["seven ", "seven", "seven\t ", "seven\u3000", "seven\n", "seven \n ", "seven\u00a0"]
    path = write_rows([{"prompt": prompt, "completion": "stone"} for prompt in prompts])
    assert compare_completions(prepare, path, tokenizer, tmp_path) == [1, 0, 2, 1, 0, 1, 1]
    encoder = PromptEncoder(tokenizer, TEMPLATES["completion"])
    assert encoder.segments("seven ", 1).encode(tokenizer) == encoder.segments("seven", 1).encode(tokenizer)
    asked = encoder.segments("seven \t", 1)
    prompt = tokenizer.encode("seven")
    for answer, shown in ((" \tstone", "stone"), (" stone", "stone"), ("stone", "stone"), ("\tstone", "\tstone")):
        assert shown_answer(tokenizer, asked, prompt, tokenizer.encode_continuation(answer, prompt)) == shown
    plain = PromptEncoder(tokenizer, None).segments("seven ", 1)
    assert plain.encode(tokenizer)[0] == tokenizer.encode("seven "), "without a template nothing is changed"


def compare_completions(prepare: Prepare, path: Path, tokenizer: Tokenizer, directory: Path) -> list[int]:
    """How many characters each prompt gave to its completion."""
    report, moved = prepare(path, tokenizer=tokenizer.path), list[int]()
    for prompt, (ids, mask, _) in zip(read_prompts(path), read_split(directory / "out"), strict=True):
        text = str(prompt.asked.fields["prompt"])  # type: ignore[union-attr]
        kept, rest = TEMPLATES["completion"].split_prompt(text)
        first = mask.index(1)
        assert ids[:first] == tokenizer.encode(kept)
        assert tokenizer.decode(ids) == tokenizer.decode(tokenizer.encode(f"{text}stone"))
        moved.append(len(rest))
    assert report.moved_spaces == sum(map(bool, moved))
    return moved


def test_the_report_says_what_was_moved_and_set(
    command: Callable[..., Any], write_rows: WriteRows, joining: Path, tmp_path: Path
) -> None:
    path = write_rows([{"prompt": f"Response{end}", "completion": "The end"} for end in (":", ": ", ":\n", ": ")])
    words = ("prepare-data", path, "--tokenizer", joining, "--output", tmp_path / "out")
    outcome = command(*words)
    lines = [" ".join(line.split()) for line in outcome.stdout.splitlines()]
    assert any(re.search(r"white space moved +2 \(from the end of the prompt", line) for line in lines), outcome.stdout
    assert any(re.search(r"boundaries set +1 \(encoded as a whole they have other tokens", line) for line in lines)
    assert "warning" not in outcome.stderr
    facts = read_json(tmp_path / "out" / "llamatune.json")["facts"]
    assert (facts["moved_spaces"], facts["forced_boundaries"], facts["template"]["boundary"]) == (2, 1, "prompt")
    report = json.loads(command(*words, "--json").stdout)
    assert (report["unchanged"], report["moved_spaces"], report["forced_boundaries"]) == (True, 2, 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_where_a_tokenizer_changes_the_text_rows_are_counted(
    prepare: Prepare, write_rows: WriteRows, tokenizer_models: dict[str, Path], tmp_path: Path, workers: int
) -> None:
    """One that puts its space behind a text; and one that drops spaces, whose rows can be divided all the same."""
    path, notices = write_rows([alpaca(n) for n in range(30)]), list[Event]()
    report = prepare(path, tokenizer=tokenizer_models["suffix"], workers=workers, on_event=notices.append)
    assert (report.prompts_not_prefix, report.forced_boundaries) == (30, 0)
    (warning,) = (event for event in notices if isinstance(event, Notice))
    assert warning.kind == "warning"
    assert "30 of 30 rows begin with other tokens than their prompt encoded alone" in warning.message
    assert "this tokenizer changes white space" in warning.message
    mine = tmp_path / "mine.yaml"
    mine.write_text(OWN["space"])
    normalising = load_tokenizer(tokenizer_models["normalising"])
    assert not normalising.splits
    report = prepare(path, tokenizer=normalising.path, template=str(mine), workers=workers, overwrite=True)
    assert (report.prompts_not_prefix, report.moved_spaces) == (0, 30)
    ids, first = normalising.encode_apart("Answer:", "seven")
    assert (ids[:first], normalising.decode(ids)) == (normalising.encode("Answer:"), "Answer:seven")


def test_directories_and_templates_of_the_older_rule(
    prepare: Prepare, write_rows: WriteRows, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Their counts are unknown, they open, and their prompts are encoded whole, as they were trained."""
    path = write_rows([{"prompt": "seven ", "completion": "stone"}])
    prepare(path)
    manifest = read_json(tmp_path / "out" / "llamatune.json")
    for name in ("prompts_not_prefix", "moved_spaces", "forced_boundaries"):
        del manifest["facts"][name]
    (tmp_path / "out" / "llamatune.json").write_bytes(dump_json(manifest))
    report = prepare(path)
    assert (report.unchanged, report.prompts_not_prefix, report.moved_spaces) == (True, None, None)
    del manifest["facts"]["template"]["boundary"]
    (tmp_path / "out" / "llamatune.json").write_bytes(dump_json(manifest))
    stored = open_prepared(tmp_path / "out").manifest.template
    assert stored is not None
    asked = PromptEncoder(tokenizer, stored_template(stored)).segments("seven ", 1)
    assert (asked.encode(tokenizer)[0], asked.moved) == (tokenizer.encode("seven "), "")


TAILED = (
    "{%- for m in messages -%}{%- if m['role'] == 'user' -%}{{- 'Q: ' + m['content'] + ' A: ' -}}"
    "{%- else -%}{{- m['content'] + eos_token -}}{%- endif -%}{%- endfor -%}"
)


@pytest.mark.parametrize("kind", ["bpe", "joining"])
def test_a_chat_templates_prompt_may_end_in_a_space(
    joining: Path, tokenizer_models: dict[str, Path], kind: str
) -> None:
    """It stays there, since other programs ask with it; earlier turns are encoded in the same way when it is asked."""
    own = load_tokenizer(joining if kind == "joining" else tokenizer_models[kind])
    template = ChatTemplate("tailed", TAILED, {"eos_token": own.piece(own.eos_id)})
    said = [
        {"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(("a", "The", "b", "stone"))
    ]
    encoder = ChatEncoder(template, own)
    for last_only in (False, True):
        ids, mask = encoded(template, own, said, last_only=last_only)
        for turn in (1, 3):
            prompt = encoder.prompt(said[:turn]).encode(own)[0]
            assert ids[: len(prompt)] == prompt
            assert last_only or mask[len(prompt) - 1 : len(prompt) + 1] == [0, 1]
        assert own.decode(ids).replace(" ", "") == "Q:aA:TheQ:bA:stone"
    older = ChatTemplate("tailed", TAILED, template.variables, boundary=None)
    assert encoded(older, own, said)[0] != ids
    assert ChatTemplate.from_dict(template.to_dict()) == template
    assert ChatTemplate.from_dict(older.to_dict()).boundary is None


def test_answers_in_one_run_of_text_are_each_cut_off(tokenizer: Tokenizer) -> None:
    """A template without special tokens between its turns."""
    source = "{% for m in messages %}{{ ('Q: ' if m.role == 'user' else '') + m.content + ' ' }}{% endfor %}"
    template = ChatTemplate("bare", source, {})
    said = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(("a", "in", "b", "the"))]
    ids, mask = encoded(template, tokenizer, said)
    for turn in (1, 3):
        prompt = ChatEncoder(template, tokenizer).prompt(said[:turn]).encode(tokenizer)[0]
        assert ids[: len(prompt)] == prompt
    assert tokenizer.decode(ids) == "Q: a in Q: b the "
    assert mask[-1] == 1


def test_a_template_file_cannot_choose_the_rule(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("prompt: '{instruction}'\nboundary: prompt\n")
    with pytest.raises(Exception, match="a template file has no 'boundary'"):
        load_template(str(tmp_path / "mine.yaml"), tokenizer)
    with pytest.raises(Exception, match="'boundary' of a template is 'word'"):
        stored_template({"name": "a", "prompt": "b", "boundary": "word"})
