"""``explain``: every exit code, every key of the spec, and every message that the source can raise."""

from __future__ import annotations

import copy
import json
import re
import shlex
from collections.abc import Callable
from typing import Any

import pytest
from raised_messages import FILLED, Raised, error_classes, raised

from llamatune import errors
from llamatune.errors import SpecError
from llamatune.explaining.all_topics import TOPICS, topics_of
from llamatune.explaining.exit_codes import EXIT_CODES
from llamatune.explaining.explain import explain
from llamatune.explaining.key_examples import KEY_EXAMPLES
from llamatune.spec import build_spec
from llamatune.spec_schema import spec_keys
from llamatune.strict_yaml import parse_yaml

MESSAGES = list(raised())
CODES = error_classes()
OF_OTHERS = 40
"""Messages at most whose text the source does not say at the place where they are raised: it is another error's."""


def says_something(message: Raised) -> bool:
    return message.text is not None and len(re.sub(rf"[{FILLED}\W]+", "", message.text)) > 2


def test_messages_are_found() -> None:
    assert len(MESSAGES) > 500
    assert sum(message.text is None for message in MESSAGES) <= OF_OTHERS


def test_every_class_of_errors_has_its_exit_code_in_the_table() -> None:
    told = {kind.__name__ for entry in EXIT_CODES for kind in entry.kinds}
    bases = {"LlamatuneError", "FailedElsewhere"}
    own = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert own - bases == told
    for entry in EXIT_CODES:
        assert {kind.exit_code for kind in entry.kinds} <= {entry.code if entry.code != 130 else 75}
    assert set(CODES.values()) <= {entry.code for entry in EXIT_CODES}


def test_every_message_has_a_topic_of_its_exit_code_among_the_first_three() -> None:
    missing = [
        f"{message.place}: {message.text}"
        for message in MESSAGES
        if says_something(message)
        and not any(topic.code == CODES[message.kind] for topic in topics_of(message.text or "")[:3])
    ]
    assert missing == [], "add their words to a topic in llamatune/explaining"


def literal(message: Raised) -> re.Pattern[str]:
    return re.compile(".+?".join(map(re.escape, (message.text or "").split(FILLED))))


def is_raised(example: str, code: int) -> bool:
    """Whether the source has a message of that exit code of which the example is one."""
    known = [message for message in MESSAGES if says_something(message) and CODES[message.kind] == code]
    return any(len((message.text or "").replace(FILLED, "")) > 5 and literal(message).search(example)
               for message in known)  # fmt: skip


MADE_ELSEWHERE = ("lora.rank: unknown key", "--temperature is -1.0")
"""Examples whose text is put together from parts; each is provoked below."""


def test_every_example_is_a_message_that_exists_and_finds_its_topic() -> None:
    for topic in TOPICS:
        if not any(text in topic.example for text in MADE_ELSEWHERE):
            assert is_raised(topic.example, topic.code), topic.example
        assert topics_of(topic.example)[0] is topic, topic.example
    for entry in EXIT_CODES:
        if entry.kinds and not any(text in entry.example for text in MADE_ELSEWHERE):
            assert is_raised(entry.example, 75 if entry.code == 130 else entry.code), entry.example


def test_examples_that_are_put_together_are_said_so(command: Callable[..., Any]) -> None:
    with pytest.raises(SpecError) as fault:
        build_spec({"model": {"path": "m"}, "data": {"train": "d"}, "training": {"output_dir": "o"},
                    "lora": {"rank": 1}}, "run.yaml")  # fmt: skip
    assert f"error: {fault.value}" == next(entry.example for entry in EXIT_CODES if entry.code == 2)
    told = command("generate", "--model", "m", "--prompt", "x", "--temperature", "-1.0").stderr.strip()
    assert any(topic.example in told for topic in TOPICS), told


@pytest.mark.parametrize("entry", EXIT_CODES, ids=lambda entry: str(entry.code))
def test_a_code_is_told_with_an_example(command: Callable[..., Any], entry: Any) -> None:
    done = command("explain", entry.code)
    assert (done.code, done.stderr) == (0, "")
    text = " ".join(done.stdout.split())
    for part in (entry.name, entry.meaning, entry.example, entry.todo):
        assert part in text
    assert (
        json.loads(command("explain", "exit", "code", entry.code, "--json").stdout)["entries"][0]["code"] == entry.code
    )


def test_a_key_is_told_with_its_values_and_as_an_override(command: Callable[..., Any]) -> None:
    done = command("explain", "training.learning_rate")
    assert done.code == 0
    assert "training.learning_rate=" in done.stdout
    assert explain(["learning_rate"]).entries == explain(["training.learning_rate"]).entries
    assert explain(["lora.init=pissa"]).entries[0]["kind"] == "kaiming or gaussian or pissa or olora"
    assert len(explain(["lora"]).entries) == sum(key.name.startswith("lora.") for key in spec_keys())
    assert [entry["key"] for entry in explain(["seed"]).entries] == ["training.seed"]


NEEDED = {
    "model.quantized_cache": ["model.dtype=nf4"],
    "training.nesterov": ["training.momentum=0.9"],
}
"""Beside the example of a key, what the rules between keys want."""


@pytest.mark.parametrize("key", ["lora.ranks", "training.max_time"])
def test_an_override_can_be_pasted_into_a_shell(command: Callable[..., Any], key: str) -> None:
    line = command("explain", key).stdout.splitlines()[-1]
    assert shlex.split(line.partition("command line: ")[2]) == [explain([key]).entries[0]["override"]]


def test_every_key_has_an_example_that_a_spec_takes() -> None:
    """In the spec and on the command line, and it says something: it is neither null, nor empty, nor dots."""
    least = {"model": {"path": "base"}, "data": {"train": "rows"}, "training": {"output_dir": "run"}, "lora": {}}
    keys = list(spec_keys())
    silent = {key.name for key in keys if key.default in (None, [], {})}
    assert silent == KEY_EXAMPLES.keys()
    for key in keys:
        (entry,) = explain([key.name]).entries
        section, _, name = key.name.partition(".")
        given = parse_yaml(entry["example"], key.name)
        assert given[section][name] not in (None, [], {}, "..."), entry["example"]
        assert f"{key.name}={json.dumps(given[section][name])}".replace('"', "") == entry["override"].replace('"', "")
        overrides = [text for text in NEEDED.get(key.name, ()) if not text.startswith(f"{key.name}=")]
        in_file = {**least, section: {**least.get(section, {}), **given[section]}}
        by_override = build_spec(copy.deepcopy(least), key.name, [entry["override"], *overrides])
        assert build_spec(copy.deepcopy(in_file), key.name, overrides) == by_override


def test_an_error_is_told_as_it_was_printed_or_by_its_words(command: Callable[..., Any]) -> None:
    printed = command("merge-lora", "--model", "absent", "--adapter", "gone", "--output", "new").stderr
    for words in ([printed], printed.split(), ["no", "such", "model"]):
        found = explain(words)
        assert (found.kind, found.entries[0]["code"]) == ("error", 4)
        assert "hf download" in found.entries[0]["todo"]
    for subject, code in (
        ("CUDA out of memory", 5),
        ("the loss is not finite", 6),
        ("unknown key", 2),
        ("no field", 3),
    ):
        assert explain([subject]).entries[0]["code"] == code


def test_what_is_not_known_is_refused(command: Callable[..., Any]) -> None:
    for subject in ("9", "77", "xyzzy"):
        done = command("explain", subject)
        assert (done.code, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "did you mean training.learning_rate?" in command("explain", "training.learning_rte").stderr


def test_no_torch_and_no_pydantic_is_loaded() -> None:
    import subprocess
    import sys

    code = "from llamatune.explaining.explain import explain; explain(['4']); explain(['lora'])"
    code += "; import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "pydantic", "yaml", "numpy"} & set(done.stdout.split())
