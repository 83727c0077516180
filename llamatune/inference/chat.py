"""A conversation with a model: what was said, and answers whose text comes as it is generated."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llamatune.checkpoints.broken_weights import with_broken_tensor
from llamatune.command_options.inference import ModelSource, Sampling
from llamatune.data.chat_rows import read_chat
from llamatune.data.chat_template import ChatTemplate
from llamatune.data.chat_template_files import own_chat_template
from llamatune.data.raw_row import RowError
from llamatune.data.row_json import Row
from llamatune.data.templates import Template
from llamatune.errors import DataError, NumericsError, SpecError
from llamatune.events import Notice, OnEvent, ShouldStop, ignore_event, never_stop
from llamatune.inference.engine import Engine
from llamatune.inference.model_source import OpenedModel, open_model
from llamatune.inference.prompt_encoding import PromptEncoder
from llamatune.inference.prompt_files import Prompt
from llamatune.model.transformer import Transformer
from llamatune.tokenizers.tokenizer import TextStream, Tokenizer


class Conversation:
    """The system message and what was said: (message, answer), oldest first.

    Attributes:
        remembers: the template has a place for earlier turns. Without it each message is answered alone.
    """

    def __init__(self, template: Template | ChatTemplate, system: str = "") -> None:
        self._template = template
        # Another template's one field is filled with the message, as generate --prompt does.
        self._takes_chats = isinstance(template, ChatTemplate) or "user" in template.placeholders
        self.remembers = self._takes_chats and (isinstance(template, ChatTemplate) or template.turn is not None)
        self._said: list[tuple[str, str]] = []
        self.system = ""
        if system:
            self.set_system(system)

    def set_system(self, text: str) -> None:
        """Put ``text`` before the turns from now on, "" for nothing; ``SpecError`` if the template has no place."""
        misfit = self._template.misfit(Row({"user": "", "system": text}, ""))
        if text and not self._takes_chats:
            misfit = f"the template {self._template.name!r} has no place for a system message"
        if misfit:
            raise SpecError(misfit, "the system message")
        self.system = text

    def prompt(self, message: str) -> Prompt:
        """What asks for the answer to ``message``: a chat row, read as ``prepare-data`` reads it.

        ``DataError`` for a text that no row may hold.
        """
        said = [text for exchange in self._said for text in exchange] if self.remembers else []
        row = _row(self._messages(*said, message), as_prompt=True)
        return row if self._takes_chats else message

    def add(self, message: str, answer: str) -> None:
        """Go on from an exchange; ``DataError`` if it can be no part of a row: the answer is blank."""
        _row(self._messages(message, answer))
        self._said.append((message, answer))

    def reset(self) -> None:
        """Begin again; the system message stays."""
        self._said.clear()

    def rows(self) -> list[dict[str, Any]]:
        """The conversation as a chat row; where each message is answered alone, a row for each."""
        if self.remembers and self._said:
            return [{"messages": self._messages(*(text for exchange in self._said for text in exchange))}]
        return [{"messages": self._messages(*exchange)} for exchange in self._said]

    def _messages(self, *texts: str) -> list[dict[str, str]]:
        turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
        return [{"role": "system", "content": self.system}, *turns] if self.system else turns


def _row(messages: Sequence[Mapping[str, str]], as_prompt: bool = False) -> Row:
    try:
        for message in messages:
            message["content"].encode()
        return read_chat({"messages": messages}, as_prompt=as_prompt)
    except UnicodeEncodeError:
        raise DataError("the text is not UTF-8", "the conversation") from None
    except RowError as fault:
        raise DataError(fault.message, "the conversation") from None


@dataclass(frozen=True)
class Answer:
    """A whole answer. ``prompt`` is what the model saw; ``finish_reason`` is ``eos``, ``length``, or ``stopped``."""

    prompt: str
    text: str
    ids: list[int]
    finish_reason: str


class Chat:
    """A model, loaded, and the conversation with it; make it with ``open_chat``."""

    def __init__(
        self,
        opened: OpenedModel,
        tokenizer: Tokenizer,
        encoder: PromptEncoder,
        models: Mapping[str, Transformer],
        conversation: Conversation,
    ) -> None:
        self.conversation = conversation
        self._opened, self._tokenizer, self._encoder, self._models = opened, tokenizer, encoder, models
        self._eos_ids = encoder.stop_ids(opened.checkpoint.config)
        self._asked = 0

    @property
    def has_base(self) -> bool:
        """Whether the base answers too."""
        return "base_" in self._models

    def answer(
        self,
        message: str,
        sampling: Sampling,
        should_stop: ShouldStop = never_stop,
        on_event: OnEvent = ignore_event,
        of_base: bool = False,
    ) -> Iterator[str | Answer]:
        """The text of the answer in pieces as it is generated, each of whole characters; at the end the ``Answer``.

        ``should_stop`` ends it early. The conversation stays as it is: ``Conversation.add`` goes on from an answer.

        Raises:
            DataError: the template refuses the conversation.
            NumericsError: the logits hold NaN or infinity.
        """
        self._asked += 1
        segments = self._encoder.segments(self.conversation.prompt(message), self._asked)
        (ids,) = self._opened.encode(self._tokenizer, [segments], sampling.max_new_tokens, on_event)
        chosen, shown = list[int](), 0

        def note(prompt: Sequence[int], so_far: Sequence[int]) -> bool:
            chosen.append(so_far[-1])
            return False

        engine = Engine(self._models["base_" if of_base else ""], self._eos_ids, 1, note, on_event=on_event)
        engine.add(ids, sampling)
        stream, moved, text, reason = TextStream(self._tokenizer, ids), segments.moved, "", "stopped"
        while not engine.is_done and not should_stop():
            try:
                ended = engine.step()
            except NumericsError as fault:
                raise with_broken_tensor(fault, self._opened.checkpoint, self._opened.adapters) from None
            for _, completion in ended:
                reason = completion.finish_reason
            piece = "".join(map(stream.push, chosen[shown:])) + (stream.finish() if engine.is_done else "")
            shown = len(chosen)
            while moved and piece:  # as prompt_encoding.shown_answer takes it off
                piece, moved = (piece[1:], moved[1:]) if piece[0] == moved[0] else (piece, "")
            if piece:
                text += piece
                yield piece
        yield Answer(segments.shown, text, chosen, reason)


@contextlib.contextmanager
def open_chat(
    source: ModelSource,
    template: str | Template | ChatTemplate | None = None,
    system: str = "",
    on_event: OnEvent = ignore_event,
    should_stop: ShouldStop = never_stop,
) -> Iterator[Chat]:
    """Load a model for the length of the block. The base answers too with ``source.compare``, or if that costs nothing.

    ``template`` None: the one stored with the adapter or model, else the model's own chat template.

    Raises:
        SpecError: there is no template, or it has no place for the system message.
        CheckpointError: model, tokenizer or adapter cannot be used or do not belong together.
    """
    opened = open_model(source, on_event)
    if opened.shares_base:
        opened = dataclasses.replace(opened, compare=True)
    tokenizer = opened.tokenizer()
    chosen = opened.template(template, tokenizer, on_event)
    if chosen is None and template is None:
        chosen = own_chat_template(tokenizer, on_event=on_event)
        if chosen is not None:
            on_event(Notice(f"chats are put in the model's own template, of {chosen.where}"))
    if chosen is None:
        raise SpecError("a chat needs a template, and none is stored with the model", source.model, "give --template")
    conversation = Conversation(chosen, system)
    if not conversation.remembers:
        what = f"the template {chosen.name!r} has no place for earlier turns"
        on_event(Notice(f"{what}: each message is answered alone", "warning"))
    encoder = PromptEncoder(tokenizer, chosen)
    with opened.computing(1, opened.memory_advice("begin again with /reset"), on_event):
        models = opened.load(on_event, should_stop, generates=True).by_prefix
        yield Chat(opened, tokenizer, encoder, models, conversation)
