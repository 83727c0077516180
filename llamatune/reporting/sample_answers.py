"""Sample answers before and after tuning: read from a file of ``generate --compare``, or generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llamatune.command_options.inference import ModelSource, Sampling
from llamatune.command_options.training import ReportOptions
from llamatune.errors import CheckpointError, DataError, SpecError, printable
from llamatune.events import OnEvent, ShouldStop
from llamatune.formats.manifest import find_manifest
from llamatune.reporting.run_reader import Run
from llamatune.safe_reading import read_bytes
from llamatune.strict_json import parse_json
from llamatune.training.run_file_names import ADAPTER, MODEL

if TYPE_CHECKING:
    from llamatune.data.chat_template import ChatTemplate
    from llamatune.data.templates import Template
    from llamatune.inference.generate import Generation
    from llamatune.inference.prompt_files import Prompt

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
            values = parse_json(line)
            sample = Sample(values["prompt"], values.get("base_completion"), values["completion"])
            texts = (sample.prompt, sample.tuned, "" if sample.base is None else sample.base)
            if not all(isinstance(text, str) for text in texts):
                raise TypeError
            samples.append(sample)
        except (ValueError, KeyError, TypeError):
            todo = "give a file that llamatune generate --compare --output wrote"
            raise DataError("not a line with prompt and completion", f"{path}:{number}", todo) from None
    return Samples(printable(path.name), samples)


def generate_samples(
    run: Run, prompts: Sequence[Prompt], options: ReportOptions, on_event: OnEvent, should_stop: ShouldStop
) -> Samples:
    """Answer ``prompts`` greedily with the base and with the last weights of ``run``.

    Raises:
        SpecError: the run did not train the base on disk. CheckpointError: no weights yet, or they do not load.
    """
    from llamatune.data.template_choice import stored_template
    from llamatune.inference.generate import generate

    spec, sampling = run.spec, Sampling(options.max_new_tokens, temperature=0)
    if spec.model.init == "random" or spec.model.num_layers is not None:
        raise SpecError("its base is not the model on the disk", run.path, "leave --prompt out, or pass --generations")
    base = ModelSource(Path(spec.model.path), device=options.device, variant=spec.model.variant)

    def ask(source: ModelSource, template: str | Template | ChatTemplate | None = None) -> list[Generation]:
        return generate(source, prompts, sampling, template, on_event, should_stop).results

    if (run.path / ADAPTER).is_dir():
        both = ask(replace(base, adapter=run.path / ADAPTER, compare=True))
        return Samples(run.name, [Sample(answer.prompt, answer.base_completion, answer.completion) for answer in both])
    if not (run.path / MODEL).is_dir():
        raise CheckpointError("no trained weights yet", run.path, "leave --prompt out, or let the run finish")
    tuned = ask(replace(base, model=run.path / MODEL, variant=None))
    manifest = find_manifest(run.path / MODEL)
    trained = None if manifest is None else manifest.template
    before = ask(base, "none" if trained is None else stored_template(trained, run.path / MODEL))
    pairs = zip(before, tuned, strict=True)
    return Samples(run.name, [Sample(new.prompt, old.completion, new.completion) for old, new in pairs])
