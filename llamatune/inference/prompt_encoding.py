"""Prompts in a template: the segments that a completion continues, and the tokens that end it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llamatune.data.chat_template import ChatTemplate
from llamatune.data.row_json import Row
from llamatune.data.segments import Segment, Segments
from llamatune.data.templates import Template
from llamatune.errors import DataError
from llamatune.events import Notice, OnEvent
from llamatune.inference.prepared_prompts import PreparedPrompt
from llamatune.inference.prompt_files import FilePrompt, Prompt, prompt_text
from llamatune.shapes.llama_config import LlamaConfig
from llamatune.tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llamatune.data.chat_segments import ChatEncoder


class PromptEncoder:
    """A template, or none, and a tokenizer: prompts as the model sees them, the same as in its rows."""

    def __init__(self, tokenizer: Tokenizer, template: Template | ChatTemplate | None) -> None:
        self.template, self._tokenizer = template, tokenizer
        self._chats: ChatEncoder | None = None
        if isinstance(template, ChatTemplate):
            from llamatune.data.chat_segments import ChatEncoder  # importing Jinja takes 40 ms

            self._chats = ChatEncoder(template, tokenizer)

    def segments(self, prompt: Prompt, number: int) -> Segments:
        """A prompt in the template; a text is a user's turn. ``number`` counts prompts from 1, for errors.

        ``DataError`` if the template cannot be filled with it.
        """
        if isinstance(prompt, PreparedPrompt):
            return prompt.segments
        if self._chats is None:
            assert not isinstance(self.template, ChatTemplate)
            text, moved = prompt_text(prompt, self.template, number), ""
            if self.template is not None:
                text, moved = self.template.split_prompt(text)
            return Segments((Segment(text),), moved=moved)
        from llamatune.data.chat_segments import messages_of

        where = f"prompt {number}"
        if isinstance(prompt, FilePrompt):
            where, prompt = prompt.where, prompt.asked
        fields = {"user": prompt} if isinstance(prompt, str) else prompt
        row = Row(dict(fields), "") if isinstance(fields, Mapping) else fields
        try:
            messages = messages_of(row)
        except KeyError:
            texts = ", ".join(map(repr, row.fields)) or "none"
            what = f"no field for the user's turn of the template {self._chats.template.name!r}"
            raise DataError(what, where, f"its text fields are {texts}") from None
        if misfit := self._chats.template.misfit(row):
            raise DataError(misfit, where)
        tools = () if row.irregular is None else row.irregular.tools
        return self._chats.prompt(messages, where, tools, row.irregular is not None)

    def stop_ids(self, config: LlamaConfig) -> set[int]:
        """The tokens that end a completion: the model's and the tokenizer's EOS, and the end of a template's turn."""
        stop = None if self._chats is None else self._chats.stop_id
        return {*config.eos_token_ids, self._tokenizer.eos_id, *([] if stop is None else [stop])}


def encode_prompts(
    tokenizer: Tokenizer,
    prompts: Sequence[Segments],
    configs: Sequence[LlamaConfig],
    where: Path,
    new_tokens: int,
    on_event: OnEvent,
) -> list[list[int]]:
    """Ids of each prompt; a warning if they, or so many new tokens after them, exceed the context of the first model.

    ``DataError`` for a prompt without a token, or with one that a model has no embedding of; ``where`` is the model's.
    """
    ids = [prompt.encode(tokenizer)[0] for prompt in prompts]
    if not all(ids):
        what = f"prompt {ids.index([]) + 1} has no token, and this tokenizer puts no BOS before it"
        raise DataError(what, where, "give a prompt that is not empty")
    rows = min(config.vocab_size for config in configs)
    if (largest := max(map(max, ids), default=0)) >= rows:
        what = f"a prompt holds the token {largest}, and the base has {rows} embedding rows"
        raise DataError(what, where, "leave out --compare")
    known = configs[0].max_position_embeddings
    longest, beyond = max(map(len, ids), default=0), sum(len(prompt) > known for prompt in ids)
    if beyond:
        what = f"{beyond} of {len(ids)} prompts have more than the {known} tokens the model knows"
        on_event(Notice(f"{what}, the longest {longest}", "warning"))
    elif longest + new_tokens > known:
        what = f"a prompt of {longest} tokens and up to {new_tokens} new ones"
        on_event(Notice(f"{what} can become more than the {known} tokens the model knows", "warning"))
    return ids


def shown_answer(tokenizer: Tokenizer, segments: Segments, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """The text of a completion, without the white space that its prompt, whose ids are ``prompt``, ends in."""
    text = tokenizer.continuation(prompt, ids)
    moved = segments.moved
    while not text.startswith(moved):  # the model may have written only the beginning of it
        moved = moved[:-1]
    return text.removeprefix(moved)


def is_chat(prompt: Prompt) -> bool:
    """Whether a prompt is a row of a chat."""
    asked = prompt.asked if isinstance(prompt, FilePrompt) else prompt
    return isinstance(asked, Row) and "user" in asked.fields
