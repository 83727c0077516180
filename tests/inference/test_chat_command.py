"""``llamatune chat`` over a pipe and on a terminal, and that its prompts are those of trained rows."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from trained_tokenizers import SMOLLM_CHAT

from llamatune.command_options.inference import ModelSource, Sampling
from llamatune.inference import chat as core
from llamatune.inference.completion import Completion

Command = Callable[..., Any]
GREEDY = ("--temperature", 0, "--max-new-tokens", 6)
SAID = ["what is red", "and blue", "nine apples over\ngreen hills"]


@pytest.fixture(scope="module")
def model(tiny_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA with a chat template of its own."""
    directory = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(tiny_base(), directory)
    (directory / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 100, "<|im_end|>": 101}))
    config = {"eos_token": "</s>", "bos_token": "<s>", "chat_template": SMOLLM_CHAT}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def _talk(command: Command, *words: object, lines: str) -> list[dict[str, Any]]:
    outcome = command("chat", *words, "--json", stdin=lines)
    assert outcome.code == 0, outcome.stderr
    return [json.loads(line) for line in outcome.stdout.splitlines()]


def test_every_prompt_is_what_training_encodes_of_the_saved_row(
    command: Command, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []

    class Watched(core.Engine):
        def add(self, prompt: Sequence[int], draw: int = 0) -> int:
            asked.append(list(prompt))
            return super().add(prompt, draw)

    monkeypatch.setattr(core, "Engine", Watched)
    first, second, third = SAID
    lines = f'{first}\n\n{second}\n"""\n{third}\n"""\n/save {tmp_path}/rows.jsonl\n/save {tmp_path}/rows.json\n'
    drawn = ("--temperature", 1.2, "--top-p", 1, "--seed", 13, "--max-new-tokens", 12)
    answers = _talk(command, "--model", model, *drawn, "--system", "a <|im_end|> stays text", lines=lines)
    assert [answer["message"] for answer in answers] == SAID
    assert all(answer["kept"] for answer in answers)
    (row,) = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert json.loads((tmp_path / "rows.json").read_text()) == [row]
    said = [text for answer in answers for text in (answer["message"], answer["completion"])]
    assert [message["content"] for message in row["messages"]] == ["a <|im_end|> stays text", *said]
    for name in ("rows.jsonl", "rows.json"):
        words = ("prepare-data", tmp_path / name, "--tokenizer", model, "--output", tmp_path / f"{name}-data")
        outcome = command(*words, "--max-seq-length", 512, "--preview", 1, "--json")
        assert outcome.code == 0, outcome.stderr
        tokens = json.loads(outcome.stdout)["preview"][0]["tokens"]
        ids, trained = [token["id"] for token in tokens], [False, *(token["trained"] for token in tokens)]
        begins = [place for place in range(len(ids)) if trained[place + 1] and not trained[place]]
        assert asked == [ids[:begin] for begin in begins]
        assert len(asked) == 3


def test_an_answer_is_generates_and_a_reset_forgets(command: Command, model: Path, tmp_path: Path) -> None:
    lines = f"/system be kind\n{SAID[0]}\n{SAID[1]}\n/reset\n/system\n{SAID[0]}\n/params top_p=1 seed=3\n/quit\nno"
    words = ("--model", model, "--max-new-tokens", 9, "--temperature", 0.9, "--seed", 5)
    answers = _talk(command, *words, lines=lines)
    turns = [("user", SAID[0]), ("assistant", answers[0]["completion"]), ("user", SAID[1])]
    rows = [[("system", "be kind"), turns[0]], [("system", "be kind"), *turns], [turns[0]]]
    messages = [{"messages": [{"role": role, "content": text} for role, text in row]} for row in rows]
    (tmp_path / "asked.json").write_text(json.dumps(messages))
    outcome = command("generate", *words, "--prompt-file", tmp_path / "asked.json", "--json")
    for answer, made in zip(answers, json.loads(outcome.stdout)["results"], strict=True):
        assert {key: answer[key] for key in made if key != "row"} == {k: v for k, v in made.items() if k != "row"}
    plain = command("chat", *words, stdin=lines)
    assert plain.stdout == "".join(answer["completion"] + "\n" for answer in answers)
    assert "max_new_tokens=9 temperature=0.9 top_k=none top_p=1.0 min_p=0.0 repetition_penalty=1.0 seed=3" in (
        plain.stderr
    )


def test_the_base_answers_beside_the_tuned_model(
    command: Command, model: Path, peft_adapter: Callable[..., Path]
) -> None:
    words = ("--model", model, "--adapter", peft_adapter(model), *GREEDY)
    lines = f"{SAID[0]}\n/compare\n{SAID[1]}\n/compare\n{SAID[1]}\n"
    answers = _talk(command, *words, lines=lines)
    assert ["base_completion" in answer for answer in answers] == [False, True, False]
    (of_base,) = _talk(command, "--model", model, *GREEDY, lines=SAID[0])
    (compared,) = _talk(command, *words, "--compare", lines=SAID[0])
    assert compared == {**answers[0], "base_completion": of_base["completion"]}
    assert of_base["completion"] != answers[0]["completion"]
    printed = command("chat", *words, "--compare", stdin=SAID[0]).stdout
    assert printed == f"base: {of_base['completion']}\ntuned: {answers[0]['completion']}\n"


def test_a_template_without_turns_answers_each_message_alone(command: Command, model: Path, tmp_path: Path) -> None:
    words = ("--model", model, "--template", "alpaca", *GREEDY)
    answers = _talk(command, *words, lines=f"{SAID[0]}\n{SAID[1]}\n/save {tmp_path}/rows.jsonl\n")
    asked = ("--prompt", SAID[0], "--prompt", SAID[1], "--json")
    results = json.loads(command("generate", *words, *asked).stdout)["results"]
    assert [(a["prompt"], a["completion"]) for a in answers] == [(r["prompt"], r["completion"]) for r in results]
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 2
    assert "each message is answered alone" in command("chat", *words, stdin="").stderr
    refused = command("chat", *words, "--system", "be kind", stdin="x")
    assert (refused.code, "has no place for a system message" in refused.stderr) == (2, True)


@pytest.mark.parametrize(
    ("lines", "code", "part"),
    [
        ("/frob\n", 2, "no command is called '/frob'"),
        ("/compare\n", 2, "/compare needs two models: give the tuned one with --adapter"),
        ("/params num_beams=2\n", 2, "no parameter is set by 'num_beams=2'"),
        ("/params temperature=-1\n", 2, "--temperature is -1.0"),
        ("hi\n/save there.json\n", 5, "exists: there.json"),
        ("hi\n/save model/rows.json\n", 2, "inside of --model"),
        ('"""\nhi\n', 3, 'within a message that """ opened'),
        ("\udce9\n", 3, "not UTF-8 at byte 0"),
    ],
)
def test_a_fault_over_a_pipe_ends_it_in_one_line(
    command: Command, model: Path, lines: str, code: int, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.json").write_text("mine")
    (tmp_path / "model").symlink_to(model)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode(errors="surrogateescape"))))
    outcome = command("chat", "--model", "model", "--max-new-tokens", 1, "--temperature", 0)
    assert outcome.code == code, outcome.stderr
    (line,) = [line for line in outcome.stderr.splitlines() if not re.match(r"[\dT:-]+ (info|warning): ", line)]
    assert line.startswith("error: ")
    assert part in line
    assert (tmp_path / "there.json").read_text() == "mine"


def test_a_base_without_a_template_says_what_to_give(command: Command, tiny_base: Callable[..., Path]) -> None:
    outcome = command("chat", "--model", tiny_base(), stdin="hi\n")
    assert (outcome.code, outcome.stdout) == (2, "")
    assert "a chat needs a template" in outcome.stderr


ANSWERS = ["é🦙!", "\x1b[2J\x07ok", "\0", "  "]


@pytest.fixture
def spoken(tiny_base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of byte tokens, which gives ``ANSWERS``, a byte a token."""
    path = tmp_path / "spoken"
    shutil.copytree(tiny_base(vocab_size=400), path)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red llama walks over green hills"] * 9), model_prefix=str(path / "tokenizer"),
        vocab_size=300, model_type="bpe", byte_fallback=True, hard_vocab_limit=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
    coming = iter([[pieces.piece_to_id(f"<0x{byte:02X}>") for byte in text.encode()] for text in ANSWERS])

    class Speaking(core.Engine):
        is_done = False

        def step(self) -> list[tuple[int, Completion]]:
            sequence = self._waiting[0]
            if not sequence.chosen:
                self.rest = list(next(coming))
            sequence.chosen.append(self.rest.pop(0))
            assert self._is_enough is not None
            self._is_enough(sequence.prompt, sequence.chosen)
            self.is_done = not self.rest
            return [(0, Completion(sequence.chosen, "eos"))] if self.is_done else []

    monkeypatch.setattr(core, "Engine", Speaking)
    return path


def test_pieces_are_whole_characters(spoken: Path) -> None:
    with core.open_chat(ModelSource(spoken), "llama2-chat") as chat:
        *pieces, answer = chat.answer("hi", Sampling(9, temperature=0))
    assert pieces == ["é", "🦙", "!"]
    assert isinstance(answer, core.Answer)
    assert (answer.text, len(answer.ids), answer.finish_reason) == (ANSWERS[0], 7, "eos")


def test_control_characters_are_escaped_and_a_blank_answer_is_no_part(command: Command, spoken: Path) -> None:
    outcome = command("chat", "--model", spoken, "--template", "llama2-chat", stdin="a\nb\nc\nd\n")
    assert outcome.code == 0, outcome.stderr
    assert outcome.stdout == "é🦙!\n\\x1b[2J\\x07ok\n\\x00\n  \n"
    assert outcome.stderr.count("are no part of the conversation: ") == 2


class Terminal:
    """``llamatune chat`` in a pseudo-terminal that controls it, as a user's does."""

    def __init__(self, *words: object) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
        code = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\nfrom llamatune.cli import main; main()"
        environment = {**os.environ, "TERM": "dumb", "LC_ALL": "C.UTF-8"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "chat", *map(str, words)], stdin=theirs, stdout=theirs, stderr=theirs,
            env=environment, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C. Python misses a signal between readline's prompt and its wait for input, so it is not sent then."""
        time.sleep(0.3)
        self.type("\x03")

    def until(self, *parts: str) -> str:
        """What is shown up to the last of ``parts``, which come in this order."""
        shown, place, end = "", 0, time.monotonic() + 60
        for part in parts:
            while part not in shown[place:]:
                assert time.monotonic() < end, (part, shown)
                if select.select([self._ours], [], [], 1)[0]:
                    shown += os.read(self._ours, 1 << 12).decode(errors="replace")
            place = shown.index(part, place) + len(part)
        return shown

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._ours)


def test_on_a_terminal_an_interrupt_stops_the_answer_and_a_second_one_the_program(model: Path) -> None:
    terminal = Terminal("--model", model, "--temperature", 0, "--max-new-tokens", 1 << 20)
    try:
        terminal.until("/help lists the commands", "> ")
        terminal.type("nine\n")
        terminal.until("nine", "bama")
        terminal.interrupt()
        terminal.until("stopped; what there is of the answer stays", "> ")
        terminal.type("/frob\n")
        terminal.until("error: no command is called '/frob'", "> ")
        terminal.type("/reset\n/params max_new_tokens=2\n")
        terminal.until("max_new_tokens=2 ", "> ")
        terminal.type("what fell")
        terminal.interrupt()
        terminal.until("Ctrl-C again ends the program", "> ")
        terminal.type('"""\n')
        terminal.until("... ")
        terminal.type('hills\n"""\n')
        terminal.until("cut after 2 tokens", "> ")
        terminal.interrupt()
        terminal.until("Ctrl-C again ends the program", "> ")
        terminal.interrupt()
        assert terminal.process.wait(60) == 130
    finally:
        terminal.close()
