"""Prompt templates as chat templates: rendered as transformers renders them, they give the same texts."""

from __future__ import annotations

import itertools

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llamatune.data.template_as_jinja import as_jinja
from llamatune.data.templates import BOUNDARY, TEMPLATES, Template

TURNS = Template(
    "turns",
    "{user}: 'quoted' \\ {{braces}} {{% raw %}}\n\té🦙",
    system="<{system}>{user}",
    turn="[{user}|{assistant}]",
    before_completion=" => ",
    strip=True,
)
HARD = " it's {{ a }} \\n {% if %}\n \ud7ff"


def rendered(source: str, messages: list[dict[str, str]]) -> str:
    def refuse(why: str) -> str:
        raise ValueError(why)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    return environment.from_string(source).render(messages=messages, bos_token="<s>", eos_token="</s>")


def chat(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    roles = itertools.cycle(("user", "assistant"))
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


@pytest.mark.parametrize("system", [None, " be brief "])
def test_conversations_are_written_as_rows_are(system: str | None) -> None:
    source = as_jinja(TURNS, puts_bos=True)
    assert source is not None
    for turns in range(4):
        texts = [f"{text} {number} " for number in range(turns) for text in (HARD, "an answer")]
        pairs = tuple(zip(texts[::2], texts[1::2], strict=True))
        prompt = "<s>" + TURNS.prompt_of({"user": HARD, "system": system or ""}, pairs)
        assert rendered(source, chat(*texts, HARD, system=system)) == prompt
        whole = f"{prompt}{TURNS.completion_of(' done ')}</s>"
        assert rendered(source, chat(*texts, HARD, " done ", system=system)) == whole


@pytest.mark.parametrize("name", ["alpaca", "gsm8k"])
def test_a_template_of_one_turn_takes_one(name: str) -> None:
    template = TEMPLATES[name]
    source = as_jinja(template, puts_bos=False)
    assert source is not None
    assert rendered(source, chat(HARD)) == template.instruction_prompt(HARD)
    assert rendered(source, chat(HARD, "42")) == template.instruction_prompt(HARD) + "42</s>"
    for messages, why in (
        (chat("a", "b", "c"), "no place for earlier messages"),
        (chat("a", system="s"), "no place for a system message"),
        (chat("a")[:1] * 2, "must take turns"), ([{"role": "tool", "content": "x"}], "must take turns"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=why):
            rendered(source, messages)


@pytest.mark.parametrize("template", [TEMPLATES["text"], TEMPLATES["completion"], Template("t", "{a} {b}"),
                                      Template("m", "\ue000 {user}")], ids=lambda template: template.name)  # fmt: skip
def test_prompts_that_are_no_messages_have_no_chat_template(template: Template) -> None:
    assert as_jinja(template, puts_bos=True) is None


def test_white_space_at_the_end_of_a_prompt_is_written_with_the_answer() -> None:
    """As rows are encoded, so that other programs ask what was trained; under the older rule it is the prompt's."""
    source = as_jinja(Template("spaced", "Q: {user} A: ", boundary=BOUNDARY), puts_bos=False)
    assert source is not None
    assert rendered(source, chat("red?")) == "Q: red? A:"
    assert rendered(source, chat("red?", "a llama")) == "Q: red? A: a llama</s>"
    older = as_jinja(Template("spaced", "Q: {user} A: "), puts_bos=False)
    assert older is not None
    assert rendered(older, chat("red?")) == "Q: red? A: "
