"""Segments of conversations: a chat template rendered, its special tokens found, and the assistant's turns marked."""

from __future__ import annotations

import functools
import itertools
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

from llamatune.data.chat_contents import left_out, texts_in, with_texts
from llamatune.data.chat_template import ChatTemplate
from llamatune.data.jinja_engine import Broken, Message, Refused
from llamatune.data.jinja_process import Stuck
from llamatune.data.raw_row import RowError
from llamatune.data.row_json import Row
from llamatune.data.segments import Conversation, Segment, Segments
from llamatune.errors import DataError
from llamatune.tokenizers.tokenizer import Tokenizer

_USER_FIELDS = ("user", "instruction", "question", "prompt")
_MOST_MESSAGES = 2000
"""Of a chat: each answer takes renderings of all that is before it, some seconds in all for so many."""
_PROBE = ("Good morning.", "Good evening.")
Span = tuple[int, int]


class ChatEncoder:
    """A chat template and a tokenizer: conversations to segments.

    A special token's text in a message stays text. While the template is rendered, a character that no message has
    stands within it.
    """

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        self.template, self._tokenizer = template, tokenizer
        texts = sorted((text for text in tokenizer.special_ids if text), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, texts)) or r"(?!)")
        self._hideable = re.compile("|".join(re.escape(text) for text in texts if len(text) > 1) or r"(?!)")

    def row(self, row: Row, completion: str, *, last_only: bool, on_prompt: bool = False) -> Conversation:
        """The segments of a row.

        ``last_only``: of the assistant's turns the last alone is trained; ``on_prompt``: so is all that is not the
        assistant's.

        Raises:
            RowError: the template cannot be rendered with the row, or leaves out a part of it, or the turns that are
                trained (with ``on_prompt`` those that are not) cannot be told.
            LlamatuneError: rendering is beyond the limits of a template.
        """
        odd = row.irregular
        given = [*messages_of(row), _answer(row, completion)]
        if len(given) > _MOST_MESSAGES:
            raise RowError("too_large", f"a chat of {len(given):,} messages; {_MOST_MESSAGES:,} are the most of a row")
        messages, tools, marker = self._hidden(given, () if odd is None else odd.tools, odd is not None)
        turns = _answers(messages)
        wanted = [not last_only or turn == turns[-1] for turn in turns]
        if row.trained:
            wanted = [both and trained for both, trained in zip(wanted, row.trained, strict=True)]
        if misfit := self.template.misfit(row):
            raise RowError("template_misfit", misfit)
        try:
            told = [is_wanted or on_prompt for is_wanted in wanted]
            reply = self._reply({"messages": messages, "tools": tools, "turns": turns, "wanted": told})
        except (Refused, Broken) as fault:
            what = "refuses" if isinstance(fault, Refused) else "cannot be filled with"
            todo = f"; it has {odd.what}: choose another --template, or take them out" if odd else ""
            raise RowError("template_misfit", f"the chat template {what} the row: {fault}{todo}") from None
        text = reply["text"]
        if lost := left_out(messages, tools, text, self._try, marker, odd=odd is not None):
            what = f"the chat template leaves out the {lost}; choose another --template, or take them out of the row"
            raise RowError("template_misfit", what)
        ends, only_last = False, False
        if reply["blocks"]:
            targets = _block_targets(reply["blocks"], wanted)
        else:
            spans = list(itertools.compress(zip(reply["before"], reply["through"], strict=True), wanted))
            only_last = not all(0 <= before <= through for before, through in spans)
            if only_last and (not wanted[-1] or spans[-1][0] < 0):
                raise RowError(
                    "template_misfit", "the assistant's turns cannot be told in what the chat template writes"
                )
            targets, ends = self._turn_targets(text, spans[-1:] if only_last else spans)
        if on_prompt:
            targets = _around(self._untrained(reply, wanted), len(text))
        prompts = [*itertools.compress(reply["before"], wanted)][-1 if only_last else 0 :]
        parts, cuts = self._parts(text, targets, self._known(reply), marker)
        if ends:
            eos = self._tokenizer.eos_id
            parts.append(Segment(self._tokenizer.piece(eos), True, eos))
        return Conversation(Segments(tuple(parts), True, tuple(cuts)), min(prompts, default=0) >= 0, only_last)

    def prompt(
        self, messages: Sequence[Message], where: object = None, tools: Sequence[Any] = (), odd: bool = False
    ) -> Segments:
        """What the assistant's next turn continues; ``odd``: the messages are more than turns of user and assistant.

        ``DataError`` if the template refuses them or leaves a part out.
        """
        hidden, hidden_tools, marker = self._hidden(messages, tools, odd)
        try:
            asked = {"messages": hidden, "tools": hidden_tools, "prompt": True}
            reply = self._reply({**asked, "turns": _answers(hidden), "wanted": []})
        except Refused as fault:
            raise DataError(f"the chat template refuses the prompt: {fault}", where) from None
        except Broken as fault:
            raise self.template.unusable(fault) from None
        render = functools.partial(self._try, prompt=True)
        if len(hidden) > 1 and (lost := left_out(hidden, hidden_tools, reply["text"], render, marker, odd=odd)):
            raise DataError(f"the chat template leaves out the {lost}", where)
        parts, cuts = self._parts(reply["text"], [], self._known(reply), marker)
        return Segments(tuple(parts), True, tuple(cuts))

    def _known(self, reply: Mapping[str, Any]) -> list[int]:
        """Where the prompts of a text end, as far as that can be told."""
        return [before for before in reply["before"] if before >= 0 and self.template.boundary is not None]

    @functools.cached_property
    def stop_id(self) -> int | None:
        """The special token that ends the assistant's turns; None: no special token does, or it cannot be told."""
        reply = self.probe
        text = "" if reply is None else reply["text"]
        answer = text.rfind(_PROBE[1])
        found = self._special.search(text, answer + len(_PROBE[1])) if answer >= 0 else None
        return None if found is None else self._tokenizer.special_ids[found[0]]

    @property
    def ends_untrained(self) -> bool:
        """Whether its generation blocks leave out the token that ends a turn."""
        reply = self.probe
        if reply is None or not reply["blocks"]:
            return False
        begin, end = reply["blocks"][-1]
        return not self._special.search(reply["text"], begin + 1, end)

    @functools.cached_property
    def probe(self) -> Mapping[str, Any] | None:
        """The reply for a small conversation; None: the template refuses it. Its ``error`` if it cannot be rendered."""
        messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), _PROBE, strict=True)]
        try:
            return self._reply({"messages": messages, "turns": [1], "wanted": [True]})
        except Refused:
            return None
        except Broken as fault:
            raise self.template.unusable(fault) from None

    def _reply(self, request: dict[str, Any]) -> dict[str, Any]:
        """The engine's reply, which comes from a process that renders what could be hostile, checked."""
        try:
            reply = self.template.engine.reply(request)
        except Stuck as fault:
            raise self.template.unusable(fault) from None
        text, turns = reply.get("text"), request.get("turns")
        if not isinstance(text, str) or (turns is not None and not _are_places(reply, len(text), len(turns))):
            raise self.template.unusable("its process gave another answer than was asked for")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Broken("it writes a lone surrogate, which is no character") from None
        if "\0" in text:
            raise Broken("it writes a NUL character")
        return {"blocks": [], "before": [], "through": [], **reply}

    def _try(self, messages: Sequence[Message], tools: Sequence[Any] | None, prompt: bool = False) -> str | None:
        """The text of messages; None: the template does not render them."""
        try:
            text: str = self._reply({"messages": messages, "tools": tools, "prompt": prompt})["text"]
        except (Refused, Broken):
            return None
        return text

    def _hidden(
        self, messages: Sequence[Message], tools: Sequence[Any], odd: bool
    ) -> tuple[list[Message], list[Any], str]:
        """The messages and tools with a marker in every special token's text, and the marker."""
        texts = [*texts_in([*messages, *tools])] if odd else [message["content"] for message in messages]
        if not any(map(self._hideable.search, texts)):
            return [*messages], [*tools], ""
        taken = {*"".join(self._tokenizer.special_ids), *"".join(texts)}
        marker = next(chr(code) for code in range(0xF0000, 0xFFFFD) if chr(code) not in taken)
        hidden = with_texts([[*messages], [*tools]], lambda text: self._marked(text, marker))
        return hidden[0], hidden[1], marker

    def _marked(self, text: str, marker: str) -> str:
        while self._hideable.search(text):  # again, since special tokens may overlap
            text = self._hideable.sub(lambda found: found[0][0] + marker + found[0][1:], text)
        return text

    def _untrained(self, reply: Mapping[str, Any], wanted: Sequence[bool]) -> list[Span]:
        """The assistant's turns that are not ``wanted``."""
        unwanted = [not is_wanted for is_wanted in wanted]
        if reply["blocks"]:
            return _block_targets(reply["blocks"], unwanted) if any(unwanted) else []
        spans = [*itertools.compress(zip(reply["before"], reply["through"], strict=True), unwanted)]
        if not all(0 <= before <= through for before, through in spans):
            what = "the assistant's turns that are not trained cannot be told in what the chat template writes"
            raise RowError("template_misfit", what)
        return self._turn_targets(reply["text"], spans)[0]

    def _turn_targets(self, text: str, spans: Sequence[Span]) -> tuple[list[Span], bool]:
        """Turns up to the special token that ends each; and whether the last, at the text's end, has none."""
        targets, ends = [], False
        for begin, end in spans:
            specials = [found.end() for found in self._special.finditer(text, begin, end)]
            closed = bool(specials) and not text[specials[-1] : end].strip()
            targets.append((begin, specials[-1] if closed else end))
            ends = not closed and end == len(text)
        return targets, ends

    def _parts(
        self, text: str, targets: Sequence[Span], prompts: Sequence[int], marker: str
    ) -> tuple[list[Segment], list[int]]:
        """Segments of a rendered text, cut where targets or prompts end too; and the part at which each prompt ends."""
        edges = sorted({0, len(text), *prompts, *(edge for target in targets for edge in target)})
        parts, begins = list[Segment](), list[int]()

        def add(begin: int, end: int, special: int | None = None) -> None:
            trained = any(first < end and begin < last for first, last in targets)
            shown = text[begin:end].replace(marker, "") if marker else text[begin:end]
            parts.append(Segment(shown, trained, special))
            begins.append(begin)

        begin, edge = 0, 1
        for found in [*self._special.finditer(text), None]:
            end = len(text) if found is None else found.start()
            while begin < end:
                while edges[edge] <= begin:
                    edge += 1
                add(begin, min(edges[edge], end))
                begin = min(edges[edge], end)
            if found is not None:
                add(found.start(), found.end(), self._tokenizer.special_ids[found[0]])
                begin = found.end()
        return parts, [bisect_left(begins, prompt) for prompt in prompts]


def messages_of(row: Row) -> list[Message]:
    """The messages before the completion; of a row that is no chat one. ``KeyError`` if no field is the user's."""
    if row.irregular is not None:
        return [*row.irregular.messages]
    user = next((row.fields[name] for name in _USER_FIELDS if name in row.fields), None)
    if user is None:
        raise KeyError(_USER_FIELDS[0])
    if context := row.fields.get("input"):
        user = f"{user}\n\n{context}"
    said = [("system", row.fields.get("system", ""))] if row.fields.get("system") else []
    for asked, answer in row.turns:
        said += ("user", asked), ("assistant", answer)
    return [{"role": role, "content": text} for role, text in (*said, ("user", user))]


def _answer(row: Row, completion: str) -> Message:
    return {"role": "assistant", "content": completion, **({} if row.irregular is None else row.irregular.answer)}


def _answers(messages: Sequence[Message]) -> list[int]:
    """The numbers of the assistant's messages, from 0."""
    return [number for number, message in enumerate(messages) if message["role"] == "assistant"]


def _block_targets(blocks: Sequence[Span], wanted: Sequence[bool]) -> list[Span]:
    """The generation blocks of the turns that are wanted."""
    if all(wanted):
        return [(begin, end) for begin, end in blocks]
    if len(blocks) != len(wanted):
        what = f"the chat template has {len(blocks)} generation blocks for {len(wanted)} turns of the assistant"
        raise RowError("template_misfit", what)
    return [(begin, end) for (begin, end), is_wanted in zip(blocks, wanted, strict=True) if is_wanted]


def _around(spans: Sequence[Span], length: int) -> list[Span]:
    """What is outside of ``spans`` in a text of ``length`` characters."""
    edges = [0, *itertools.chain.from_iterable(spans), length]
    return [(begin, end) for begin, end in zip(edges[::2], edges[1::2], strict=True) if begin < end]


def _are_places(reply: Mapping[str, Any], length: int, turns: int) -> bool:
    """Whether a reply has places in its text: two for each turn, and spans of blocks."""
    lists = [reply.get(name) for name in ("before", "through", "blocks")]
    if not all(isinstance(places, list) for places in lists):
        return False
    before, through, blocks = ([*places] if isinstance(places, list) else [] for places in lists)
    spans = all(isinstance(block, list) and len(block) == 2 for block in blocks)
    if not spans or len(before) != turns or len(through) != turns:
        return False
    places = [*before, *through, *itertools.chain.from_iterable(blocks)]
    return all(type(place) is int and -1 <= place <= length for place in places)
