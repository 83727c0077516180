"""The panel of a training run on a terminal: progress, losses as a curve, update, speed, time left, memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from llamatune import events
from llamatune.commands._time_left import RunTimeLeft
from llamatune.errors import printable
from llamatune.units import duration, epoch_text, gibibytes, perplexity, perplexity_text

_LEVELS, _ASCII_LEVELS = "▁▂▃▄▅▆▇█", "_.,-=+*#"
_MOST_POINTS = 512
_SHOWN = 80


def losses_text(loss: float, perplexity: float) -> str:
    return f"{loss:.4f}, perplexity {perplexity_text(perplexity)}"


def own_lines(prompts: Sequence[str]) -> list[str]:
    """Each prompt without what those that begin with the same line begin with, and what all end with: the template.

    Whole lines are left out. Prompts that are equal, or one alone, stay whole.
    """
    lines = [prompt.splitlines() for prompt in prompts]
    alike: dict[str, list[list[str]]] = {}  # a template may begin in several ways: with an input, and without
    for each in lines:
        alike.setdefault("".join(each[:1]), []).append(each)
    rest = [each[_count_same(alike["".join(each[:1])]) :] for each in lines]
    tail = _count_same([each[::-1] for each in rest])
    return ["\n".join(each[: len(each) - tail]) for each in rest]


def _count_same(texts: Sequence[Sequence[str]]) -> int:
    """How many first lines all have in common, their last ones apart; none if there are no two different texts."""
    if all(each == texts[0] for each in texts):
        return 0
    shortest = min(map(len, texts))
    return sum(itertools.takewhile(bool, (len({each[place] for each in texts}) == 1 for place in range(shortest - 1))))


class Curve:
    """A series of any length as at most 512 means over equally long stretches, drawn over the width that is free."""

    def __init__(self) -> None:
        self._means: list[float] = []
        self._stretch, self._sum, self._count = 1, 0.0, 0

    def add(self, value: float) -> None:
        self._sum += value
        self._count += 1
        if self._count == self._stretch:
            self._means.append(self._sum / self._count)
            self._sum, self._count = 0.0, 0
        if len(self._means) == _MOST_POINTS:
            self._means = [sum(pair) / 2 for pair in zip(self._means[::2], self._means[1::2], strict=True)]
            self._stretch *= 2

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.sparkline(options.max_width, options.ascii_only), style="cyan", no_wrap=True)

    def sparkline(self, width: int, ascii_only: bool = False) -> str:
        """The curve in ``width`` columns; a point takes several while there are fewer.

        The highest level is reached by the highest tenth: the first losses of a run would flatten all others.
        """
        count, levels = min(width, len(self._means)), _ASCII_LEVELS if ascii_only else _LEVELS
        if not count:
            return ""
        edges = [round(point * len(self._means) / count) for point in range(count + 1)]
        means = [sum(self._means[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
        low, high = min(means), sorted(means)[math.ceil(0.9 * (count - 1))]
        heights = [(min(mean, high) - low) / (high - low) if high > low else 0.0 for mean in means]
        shown = "".join(levels[round(height * (len(levels) - 1))] for height in heights)
        return "".join(shown[column * count // width] for column in range(width))


class TrainingPanel:
    """The state of a run after its events so far, drawn as a panel of any width."""

    def __init__(self, started: events.RunStarted) -> None:
        self._started = started
        self._losses = Curve()
        for loss in started.losses:
            self._losses.add(loss)
        self._time_left = RunTimeLeft()
        self._left_s: float | None = None
        self._best: events.EvalDone | None = None
        self._at_start: float | None = None
        self._step: events.StepDone | None = None
        self._evaluation: events.EvalDone | None = None
        self._answers: events.AnswersDone | None = None
        self._saved: events.CheckpointSaved | None = None
        self._memory: events.MemoryHeld | None = None

    def note(self, event: events.Event) -> None:
        match event:
            case events.StepDone():
                self._losses.add(event.loss)
                self._step, self._left_s = event, self._time_left.after(event)
            case events.EvalDone():
                self._at_start = self._at_start if event.step else event.loss
                self._evaluation = event
                self._best = event if event.best else self._best
            case events.AnswersDone():
                self._answers = event
            case events.CheckpointSaved():
                self._saved = event
            case events.MemoryHeld():
                self._memory = event

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rows = Table.grid(Column(style="dim", no_wrap=True), Column(ratio=1), padding=(0, 2), expand=True)
        for label, content in self._rows():
            rows.add_row(label, content)
        title = Text(printable(f"training on {self._started.device}"))
        panel = Panel(Group(self._progress(), rows), title=title, title_align="left", border_style="dim")
        # The console leaves lines alone that do not fit; inside the frame they are wrapped.
        yield from console.render(panel, options.update(no_wrap=False, overflow="fold"))

    def _progress(self) -> RenderableType:
        step, total, epoch = self._started.resumed_step, self._started.total_steps, ""
        if self._step is not None:
            step, epochs = self._step.step, self._started.num_epochs
            epoch = f", epoch {epoch_text(self._step.epoch, epochs)} of {epochs}"
        line = Table.grid(Column(ratio=1), Column(no_wrap=True, justify="right"), padding=(0, 2), expand=True)
        line.add_row(ProgressBar(total, step, complete_style="cyan"), f"step {step:,} of {total:,}{epoch}")
        return line

    def _rows(self) -> list[tuple[str, RenderableType]]:
        rows: list[tuple[str, RenderableType]] = []
        if (step := self._step) is not None:
            rows += [
                ("loss", self._loss(step)),
                ("update", f"learning rate {step.learning_rate:.2e}, gradient norm {step.grad_norm:.3g}"),
                ("speed", f"{step.tokens_per_second:,.0f} tokens/s"),
                ("time", self._time(step)),
                ("peak memory", self._peak(step)),
            ]
        if self._memory is not None:
            rows.append(("of which", self._held(self._memory)))
        if self._evaluation is not None:
            rows.append(("validation", self._validation(self._evaluation)))
        if self._answers is not None and self._answers.answers:
            rows.append(("an answer", self._answer(self._answers)))
        if self._saved is not None:
            name = printable(Path(self._saved.path).name)
            rows.append(("checkpoint", f"{name}, saved in {self._saved.seconds:.2f} s"))
        return rows

    def _loss(self, step: events.StepDone) -> RenderableType:
        line = Table.grid(Column(overflow="fold"), Column(ratio=1), padding=(0, 2), expand=True)
        line.add_row(losses_text(step.loss, perplexity(step.loss)), self._losses)
        return line

    def _time(self, step: events.StepDone) -> str:
        elapsed = f"{duration(step.elapsed_s)} elapsed"
        return f"{elapsed}, {duration(self._left_s)} left" if self._left_s else elapsed

    def _peak(self, step: events.StepDone) -> str:
        size = f" of {gibibytes(self._memory.device_bytes)}" if self._memory else ""
        reserved = step.peak_reserved_bytes
        rest = "resident" if reserved is None else f"{gibibytes(reserved)} reserved"
        return f"{gibibytes(step.peak_memory_bytes)}{size}, {rest}"

    def _held(self, memory: events.MemoryHeld) -> str:
        weights = gibibytes(memory.frozen_bytes or memory.trained_bytes)
        adapter = f", adapter {gibibytes(memory.trained_bytes)}" if memory.frozen_bytes else ""
        return f"weights {weights}{adapter}, optimizer {gibibytes(memory.optimizer_bytes)}"

    def _answer(self, done: events.AnswersDone) -> str:
        """One of the answers, another at each evaluation, cut to a line or two; its prompt without its template."""
        number = done.step % len(done.answers)
        asked, answer = own_lines([answer.prompt for answer in done.answers])[number], done.answers[number]
        short = (" ".join(text.split()) for text in (asked, answer.answer))
        prompt, text = (one if len(one) <= _SHOWN else f"{one[:_SHOWN]}..." for one in short)
        return f"{prompt} -> {text}" + (f", at step {done.step:,}" if done.step else ", before training")

    def _validation(self, evaluation: events.EvalDone) -> str:
        losses = losses_text(evaluation.loss, evaluation.perplexity)
        if not evaluation.step:
            return f"{losses} before training"
        losses = f"{losses} at step {evaluation.step:,}"
        if evaluation.best:
            losses = f"{losses}, the best"
        elif self._best:
            losses = f"{losses}; best {self._best.loss:.4f} at step {self._best.step:,}"
        return f"{losses}; {self._at_start:.4f} before training" if self._at_start is not None else losses
