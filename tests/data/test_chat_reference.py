"""Conversations are prepared, and every id and target compared with those of transformers."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from label_rows import TEXTS, random_text
from prepared_rows import read_split
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Library
from transformers import PreTrainedTokenizerFast

from llamatune.command_options.preparation import PrepareOptions
from llamatune.data.prepare import prepare_data

MARKED = {
    "llama2-chat": (
        "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
        "{% set ns.system = '<<SYS>>\\n' + m.content + '\\n<</SYS>>\\n\\n' %}{% elif m.role == 'user' %}"
        "{{ bos_token + '[INST] ' + (ns.system + m.content) | trim + ' [/INST]' }}{% set ns.system = '' %}{% else %}"
        "{% generation %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    ),
    "llama3-chat": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim + '<|eot_id|>' }}{% endgeneration %}"
        "{% else %}{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "chatml": (
        "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}"
        "{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
}
"""The templates as their authors wrote them, with the marks by which transformers knows the assistant's tokens."""


def llama_2_in_json(model: Path) -> PreTrainedTokenizerFast:
    """LLaMA 2's vocabulary as a ``tokenizer.json``: two pieces merge if they are a piece, in the order of scores."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    vocabulary = {str(pieces.id_to_piece(n)): n for n in range(pieces.vocab_size())}
    merges = [
        (-pieces.get_score(number), vocabulary[left], vocabulary[right], left, right)
        for piece, number in vocabulary.items()
        if not (pieces.is_byte(number) or pieces.is_control(number) or pieces.is_unknown(number))
        for left, right in ((piece[:n], piece[n:]) for n in range(1, len(piece)))
        if left in vocabulary and right in vocabulary
    ]
    pairs = [(left, right) for *_, left, right in sorted(merges)]
    library = Library(models.BPE(vocabulary, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    library.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=library, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def judged(shared_fixtures: Path, merging_tokenizer: Path) -> Callable[[str], tuple[Path, PreTrainedTokenizerFast]]:
    """A tokenizer for each template, and transformers' reading of it."""
    llama_2 = shared_fixtures / "data" / "llama2_tokenizer.model"
    paths = {"llama2-chat": llama_2, "llama3-chat": merging_tokenizer, "chatml": merging_tokenizer}

    @functools.cache
    def give(template: str) -> tuple[Path, PreTrainedTokenizerFast]:
        path = paths[template]
        judge = llama_2_in_json(path) if path == llama_2 else PreTrainedTokenizerFast.from_pretrained(path)
        judge.chat_template = MARKED[template]
        return path, judge

    return give


def conversations(chance: random.Random, count: int, texts: list[str] = TEXTS) -> list[list[dict[str, str]]]:
    made = []
    for _ in range(count):
        said = [("system", random_text(chance, texts))] * (chance.random() < 0.4)
        for _ in range(chance.randint(1, 5)):
            said += [("user", random_text(chance, texts)), ("assistant", random_text(chance, texts))]
        made.append([{"role": role, "content": content} for role, content in said])
    return made


def prepared(
    said: list[list[dict[str, str]]], template: str, tokenizer: Path, directory: Path
) -> list[tuple[list[int], list[int]]]:
    (directory / "rows.json").write_text(json.dumps([{"messages": messages} for messages in said]))
    options: dict[str, Any] = {"template": template, "max_seq_length": 1 << 20, "overwrite": True}
    prepare_data(
        PrepareOptions(rows=[directory / "rows.json"], tokenizer=tokenizer, output=directory / "out", **options),
        workers=0,
    )
    rows = read_split(directory / "out")
    assert [row for *_, row in rows] == list(range(1, len(said) + 1))
    return [(ids, mask) for ids, mask, _ in rows]


def assert_same(
    template: str, count: int, judged: Callable[[str], tuple[Path, PreTrainedTokenizerFast]], directory: Path
) -> None:
    path, judge = judged(template)
    said = conversations(random.Random(f"{template} {count}"), count)
    joined = 0
    for messages, (ids, mask) in zip(said, prepared(said, template, path, directory), strict=True):
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        if template == "chatml" and any(answer[0].isspace() for answer in answers):
            joined += 1
            continue
        whole = judge.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert ids == whole["input_ids"], messages
        assert mask == whole["assistant_masks"], messages
        prompt = judge.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert ids[: len(prompt)] == prompt, messages
        assert mask[len(prompt) - 1 : len(prompt) + 1] == [0, 1], messages
    assert joined < 0.7 * count


@pytest.mark.parametrize("template", MARKED)
def test_ids_and_targets_are_those_of_transformers(
    judged: Callable[[str], tuple[Path, PreTrainedTokenizerFast]], tmp_path: Path, template: str
) -> None:
    assert_same(template, 30, judged, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("template", MARKED)
def test_two_thousand_conversations_of_each_template(
    judged: Callable[[str], tuple[Path, PreTrainedTokenizerFast]], tmp_path: Path, template: str
) -> None:
    assert_same(template, 2000, judged, tmp_path)


def test_an_answer_is_no_part_of_the_token_that_ends_its_prompt(
    judged: Callable[[str], tuple[Path, PreTrainedTokenizerFast]], tmp_path: Path
) -> None:
    """transformers joins line breaks that way in a whole conversation, and not in the prompt that it generates from."""
    path, judge = judged("chatml")
    said = [{"role": "user", "content": "seven hills"}, {"role": "assistant", "content": "\n\ngreen stone"}]
    ((ids, mask),) = prepared([said], "chatml", path, tmp_path)
    prompt = judge.apply_chat_template(said[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    answer = judge("\n\ngreen stone<|im_end|>", add_special_tokens=False)["input_ids"]
    ends = judge("\n", add_special_tokens=False)["input_ids"]
    assert ids == prompt + answer + ends
    assert mask == [0] * len(prompt) + [1] * len(answer) + [0]
    assert ids != judge.apply_chat_template(said, return_dict=True)["input_ids"]


@pytest.mark.parametrize("template", MARKED)
def test_a_special_token_that_a_message_spells_is_text_here_and_a_token_there(
    judged: Callable[[str], tuple[Path, PreTrainedTokenizerFast]], tmp_path: Path, template: str
) -> None:
    """The one difference that is wanted; all else of such a row is the same."""
    path, judge = judged(template)
    end = {"llama2-chat": "</s>", "llama3-chat": "<|eot_id|>", "chatml": "<|im_end|>"}[template]
    number = judge.convert_tokens_to_ids(end)
    for place in (0, 1):
        said = [{"role": "user", "content": "seven hills"}, {"role": "assistant", "content": "green stone"}]
        said[place]["content"] += f"{end} rain"
        ((ids, mask),) = prepared([said], template, path, tmp_path)
        theirs = judge.apply_chat_template(said, return_dict=True)["input_ids"]
        assert theirs.count(number) - ids.count(number) == 1
        assert judge.decode(ids).count(end) == judge.decode(theirs).count(end)
        trained = judge.decode([token for token, target in zip(ids, mask, strict=True) if target])
        assert trained.count("rain") == place
        assert trained.count(end) == 1 + place
