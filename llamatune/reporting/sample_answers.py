"""Sample answers before and after tuning: read from a file of ``generate --compare``, or generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamatune.errors import CheckpointError, DataError, SpecError, printable
from llamatune.events import OnEvent, ShouldStop
from llamatune.files import parse_json, read_bytes
from llamatune.reporting.run_reader import Run
from llamatune.training.run_files import ADAPTER, MODEL

if TYPE_CHECKING:
    from llamatune.inference.answer import Answer, Prompt

_LARGEST_FILE = 64 << 20


@dataclass(frozen=True)
class Sample:
    """A prompt as the model read it; ``base`` is the untuned model's answer, None if there is none."""

    prompt: str
    base: str | None
    tuned: str


@dataclass(frozen=True)
class Samples:
    """Answers from one source: the name of a run or of a file."""

    source: str
    samples: list[Sample]


def read_generations(path: Path) -> Samples:
    """Read the JSON Lines of ``llamatune generate --output``, with ``--compare`` or without.

    Raises:
        DataError: no such file, or a line of another format.
    """
    samples = []
    for number, line in enumerate(read_bytes(path, DataError, _LARGEST_FILE).splitlines(), 1):
        try:
            samples.append(_sample(parse_json(line)))
        except (ValueError, KeyError, TypeError):
            todo = "give a file that llamatune generate --compare --output wrote"
            raise DataError("not a line with prompt and completion", f"{path}:{number}", todo) from None
    return Samples(printable(path.name), samples)


def _sample(values: Any) -> Sample:
    sample = Sample(values["prompt"], values.get("base_completion"), values["completion"])
    if not isinstance(sample.prompt, str) or not isinstance(sample.tuned, str):
        raise TypeError
    if not isinstance(sample.base, str | None):
        raise TypeError
    return sample


def generate_samples(
    run: Run, prompts: Sequence[Prompt], max_new_tokens: int, device: str, on_event: OnEvent, should_stop: ShouldStop
) -> Samples:
    """Answer ``prompts`` greedily with the base and with the last weights of ``run``.

    Raises:
        SpecError: the run did not train the base on disk. CheckpointError: no weights yet, or they do not load.
    """
    from llamatune.devices import choose_device
    from llamatune.inference.answer import Request, answer
    from llamatune.inference.sampling import Sampling

    spec = run.spec
    if spec.model.init == "random" or spec.model.num_layers is not None:
        raise SpecError("its base is not the model on the disk", run.path, "leave --prompt out, or pass --generations")
    base, sampling = Path(spec.model.path), Sampling(max_new_tokens, temperature=0)
    on = choose_device(device, on_event)

    def ask(request: Request) -> list[Answer]:
        return answer(request, on_event, should_stop).results

    if (run.path / ADAPTER).is_dir():
        tuned = ask(Request(base, prompts, sampling, run.path / ADAPTER, compare=True, device=on))
        return Samples(run.name, [Sample(new.prompt, new.base_completion, new.completion) for new in tuned])
    if not (run.path / MODEL).is_dir():
        raise CheckpointError("no trained weights yet", run.path, "leave --prompt out, or let the run finish")
    tuned = ask(Request(run.path / MODEL, prompts, sampling, device=on))
    before = ask(Request(base, [new.prompt for new in tuned], sampling, template="none", device=on))
    pairs = zip(before, tuned, strict=True)
    return Samples(run.name, [Sample(new.prompt, old.completion, new.completion) for old, new in pairs])
