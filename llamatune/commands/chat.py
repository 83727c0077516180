"""``llamatune chat``: a conversation on a terminal, or over a pipe for scripts."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from llamatune.command_options.chat import ChatOptions, shown_parameters, with_parameters
from llamatune.commands._console import Console, faults_of_stdout
from llamatune.errors import DataError, LlamatuneError, SpecError, Stopped, printable
from llamatune.events import Event, Notice
from llamatune.output_files import STDOUT, output_file, refuse_inside, write_output
from llamatune.path_expansion import expand_path
from llamatune.stop_signals import stop_signals
from llamatune.strict_json import json_line

if TYPE_CHECKING:
    from llamatune.inference.chat import Answer, Chat

_QUOTES = '"""'
_LONGEST_LINE = 16 << 20
_HELP = """\
/compare        the base's answer before the tuned one, or no longer
/reset          begin again; the system message stays
/system TEXT    the system message from now on; without TEXT none
/params         how answers are drawn; /params temperature=0.2 max_new_tokens=64 changes it
/save FILE      the conversation as chat rows: JSON if FILE ends in .json, else JSON Lines
/help           this list
/quit           the end, as is the end of the input (Ctrl-D)
//TEXT          a message that begins with /
\"""             a line of it begins a message of several lines, and another one ends it
Ctrl-C stops an answer; a second one ends the program."""


def chat(options: ChatOptions, console: Console) -> None:
    """Talk to a model, line by line."""
    with contextlib.ExitStack() as stack:
        with console:
            from llamatune.inference.chat import open_chat

            loading = console.on_event, console.should_stop
            opened = stack.enter_context(open_chat(options, options.template, options.system or "", *loading))
        if console.should_stop():
            raise Stopped("stopped while loading")
        _Talk(options, opened, console.prints_json).run()


class _Talk:
    """Reads messages and commands, prints answers to stdout and all else to stderr.

    On a terminal a fault is reported and the conversation goes on; elsewhere it ends it.
    """

    def __init__(self, options: ChatOptions, chat: Chat, as_json: bool) -> None:
        self._options, self._chat, self._as_json = options, chat, as_json
        self._sampling, self._compares = options.sampling, options.compare
        self._is_terminal = not as_json and sys.stdin.isatty() and sys.stdout.isatty()
        self._reading = self._stop = self._ended = False
        self._interrupts = 0
        """Since the last line that was read."""

    def run(self) -> None:
        """Until the input ends, or a command ends it."""
        if self._is_terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (lines can be edited, and earlier ones called back)
            self._say("/help lists the commands")
        goes_on = True
        with stop_signals(self._on_signal):
            while goes_on:
                try:
                    goes_on = self._step()
                except KeyboardInterrupt:
                    if self._interrupts:
                        raise Stopped("interrupted") from None
                    self._interrupts += 1
                    self._say("\nCtrl-C again ends the program")
                except LlamatuneError as fault:
                    if not self._is_terminal or isinstance(fault, Stopped):
                        raise
                    self._say(f"error: {fault}")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Stop the answer; while a line is read, leave it."""
        self._stop = True
        if not self._is_terminal or number != signal.SIGINT:
            self._ended = True
        if self._reading:
            raise Stopped("stopped by a signal") if self._ended else KeyboardInterrupt

    def _step(self) -> bool:
        """Read a message or a command and do it; whether the conversation goes on."""
        line = self._line("> ")
        if line == _QUOTES:
            self._answer("\n".join(self._quoted()))
        elif line is None or (line.startswith("/") and not line.startswith("//")):
            if line is None and self._is_terminal:
                self._print("\n")
            return line is not None and self._command(line)
        elif line.strip():
            self._answer(line.removeprefix("/") if line.startswith("//") else line)
        return True

    def _line(self, prompt: str) -> str | None:
        """The next line; None: the input has ended."""
        self._reading = True
        try:
            if self._ended:
                raise Stopped("stopped by a signal")
            if self._is_terminal:
                line = input(prompt)
            else:
                content = sys.stdin.buffer.readline(_LONGEST_LINE + 1)
                if len(content) > _LONGEST_LINE:
                    raise DataError(f"a line of more than {_LONGEST_LINE:,} bytes", "standard input")
                if not content:
                    return None
                line = content.decode().removesuffix("\n").removesuffix("\r").removeprefix("\ufeff")
        except EOFError:
            return None
        except UnicodeDecodeError as fault:
            raise DataError(f"a line is not UTF-8 at byte {fault.start}", "standard input") from None
        finally:
            self._reading = False
        self._interrupts = 0
        return line

    def _quoted(self) -> list[str]:
        """The lines up to the one that closes a message of several."""
        lines = list[str]()
        while (line := self._line("... ")) != _QUOTES:
            if line is None:
                raise DataError(f"the input ends within a message that {_QUOTES} opened", "standard input")
            lines.append(line)
        return lines

    def _command(self, line: str) -> bool:
        """Do what a line that begins with / says; whether the conversation goes on."""
        name, _, text = line.partition(" ")
        text = text.strip()
        if text and name in ("/compare", "/reset", "/help", "/quit"):
            raise SpecError("nothing may follow it", name)
        match name:
            case "/compare":
                self._compare()
            case "/reset":
                self._chat.conversation.reset()
            case "/system":
                self._chat.conversation.set_system(text)
            case "/params":
                self._sampling = with_parameters(self._sampling, text)
                self._say(shown_parameters(self._sampling))
            case "/save":
                self._save(text)
            case "/help":
                self._say(_HELP)
            case "/quit":
                return False
            case _:
                raise SpecError(f"no command is called {name[:80]!r}", None, "/help lists them")
        return True

    def _compare(self) -> None:
        if not self._chat.has_base:
            todo = "give the tuned one with --adapter"
            if self._options.adapters:
                todo = "give --compare: this adapter replaces weights of the base, so that both are loaded"
            raise SpecError("/compare needs two models", None, todo)
        self._compares = not self._compares
        self._say(f"the base answers {'too' if self._compares else 'no longer'}")

    def _save(self, name: str) -> None:
        from llamatune.strict_json import dump_json_lines

        rows = self._chat.conversation.rows()
        if not name or not rows:
            raise SpecError("nothing was said yet" if name else "no file is named", "/save", "/save FILE writes it")
        path = STDOUT if name == "-" else Path(expand_path(name))
        read = [("--model", self._options.model), *(("--adapter", path) for path in self._options.adapters)]
        refuse_inside(path, read, "/save")
        content = dump_json_lines(rows)
        if path.suffix == ".json":
            content = json.dumps(rows, ensure_ascii=False, indent=1).encode() + b"\n"
        output_file(path, overwrite=False)
        write_output(path, content, overwrite=False)

    def _answer(self, message: str) -> None:
        """Print the answer, before it the base's if they are compared, and go on from it."""
        self._stop = self._ended
        base = self._streamed(message, of_base=True) if self._compares else None
        answer = None if self._stop else self._streamed(message)
        if self._ended:
            raise Stopped("stopped by a signal")
        if self._stop:
            self._interrupts = 1
        kept, why = False, ""
        try:
            if answer is not None:
                self._chat.conversation.add(message, answer.text)
                kept = True
        except DataError as fault:
            why = fault.what
        if self._stop:
            self._say(f"stopped; {'what there is of the answer stays' if kept else 'the message is taken back'}")
        elif not kept:
            self._say(f"warning: the message and this answer are no part of the conversation: {why}")
        elif self._is_terminal and answer is not None and answer.finish_reason == "length":
            self._say(f"cut after {len(answer.ids)} tokens; /params max_new_tokens=N allows more")
        if self._as_json and answer is not None:
            result: dict[str, Any] = {"message": message, "prompt": answer.prompt, "completion": answer.text}
            result |= {"completion_ids": answer.ids, "finish_reason": answer.finish_reason, "kept": kept}
            result |= {} if base is None else {"base_completion": base.text}
            self._print(json_line(result))

    def _streamed(self, message: str, of_base: bool = False) -> Answer | None:
        """The whole answer, printed as it comes."""
        whole: Answer | None = None
        writes, is_named = not self._as_json, self._compares
        for piece in self._chat.answer(message, self._sampling, lambda: self._stop, self._on_event, of_base):
            if not isinstance(piece, str):
                whole = piece
            elif writes:
                self._print(("base: " if of_base else "tuned: ") * is_named + printable(piece, keeps="\n\t"))
                is_named = False
        if writes:
            self._print(("base: " if of_base else "tuned: ") * is_named + "\n")
        return whole

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Notice):
            self._say(f"{event.kind}: {event.message}")

    def _print(self, text: str) -> None:
        with faults_of_stdout():
            sys.stdout.write(text)
            sys.stdout.flush()

    def _say(self, text: str) -> None:
        """To the user, beside the answers."""
        with contextlib.suppress(OSError, ValueError):  # a pipe that was closed
            sys.stderr.write("".join(printable(line) + "\n" for line in text.split("\n")))
            sys.stderr.flush()
